"""Pitfalls of compiled libraries: other CUDA versions, torch's ABI, older processors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..common.breaking import fails
from ..packaging.test_build import LIBRARY, OPERATORS, assert_portable, build, copy_tree, needs_compiler

built = pytest.mark.skipif(not LIBRARY.exists(), reason="the native library is not built")
CXX = next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")


def shared_library(folder: Path, source: str, *flags: str) -> Path:
    (folder / "source.cpp").write_text(source)
    library = folder / "library.so"
    command = [CXX, "-O3", "-shared", "-fPIC", *flags, str(folder / "source.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


# ---- 1: a CUDA version other than torch's ----

#: An nvcc of a version that no torch was built with. It compiles plain C++.
NVCC = """#!{python}
import subprocess, sys
arguments = sys.argv[1:]
if "--version" in arguments or "-V" in arguments:
    print("Cuda compilation tools, release 99.9, V99.9.1")
elif "--list-gpu-arch" in arguments:
    print("compute_90")
else:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument in ("-lineinfo", "--fmad=false", "-compress-all"):
            skip = False
        elif argument in ("-Xcompiler", "--compiler-options", "-Xfatbin", "-gencode", "-ccbin"):
            skip = True
        elif not argument.startswith(("-gencode", "--expt", "--generate", "-D__CUDA", "-DCUDA")):
            kept.append(argument)
    sys.exit(subprocess.run(["{cxx}", "-fPIC", "-x", "c++", *kept]).returncode)
"""

SOURCES = {
    "bindings/ops.cpp": OPERATORS,
    "cpu/one.cpp": "int one() { return 1; }\n",
    "cuda/kernel.cu": "int two() { return 2; }\n",
}


def another_cuda(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "lib64").mkdir()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(python=sys.executable, cxx=CXX))
    nvcc.chmod(0o755)
    subprocess.run(["ar", "rcs", str(folder / "lib64" / "libcudart_static.a")], check=True)
    return folder


@pytest.mark.heavy
@needs_compiler
@pytest.mark.skipif(not shutil.which("ar"), reason="no ar")
def test_another_cuda_version_can_be_used_to_build(tmp_path):
    tree = copy_tree(tmp_path / "tree", SOURCES)
    setup = (tree / "setup.py").read_text()
    of_torch = '"""Build."""\nimport torch\n\ntorch.version.cuda = "12.8"\n' + setup
    (tree / "setup.py").write_text(of_torch)
    home = {"CUDA_HOME": str(another_cuda(tmp_path / "cuda"))}
    what, _ = build(tree, **home)
    assert (what["cpu"], what["cuda"], what["left_out"]) == (True, "9.0+PTX", {})
    # The remedy in the message: build only the CPU kernels.
    what, _ = build(tree, FUSED_ADAPTIVE_BUILD="cpu", **home)
    assert (what["cpu"], what["cuda"]) == (True, None)
    checking = of_torch.replace(
        "cpp_extension.CUDA_HOME, cpp_extension._check_cuda_version = str(home), lambda *_: None",
        "cpp_extension.CUDA_HOME = str(home)",
    )
    assert checking != of_torch
    (tree / "setup.py").write_text(checking)
    what, _ = build(tree, **home)
    assert what["cuda"] is None
    assert "it failed to compile" in what["left_out"]["cuda"]


# ---- 2: torch's ABI ----


@built
@needs_compiler
@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("readelf"), reason="no nm and readelf")
def test_only_torchs_stable_interface_is_used(tmp_path):
    assert_portable(LIBRARY)
    source = (
        'namespace c10 { void inner(); }\nextern "C" void aoti_torch_x();\nvoid f() { aoti_torch_x(); c10::inner(); }'
    )
    other = shared_library(tmp_path, source)
    assert fails(lambda: assert_portable(other) is None)


WRONG_LIBRARY = """
import sys, torch
from pathlib import Path
import fused_adaptive as fa
from fused_adaptive.core import library

library.FOLDER, broken = Path(sys.argv[1]), sys.argv[2]
(library.FOLDER / "_C.abi3.so").write_bytes(b"of another torch")
if broken == "broken":
    library._try_to_load = lambda: torch.ops.load_library(str(library.FOLDER / "_C.abi3.so")) or ""
optimizer = fa.AdamW([torch.ones(1, requires_grad=True)])
print(optimizer._step_backend.name, fa.backends.available()["native"])
"""


def an_unusable_library_gives_a_message(folder: Path, broken: str) -> bool:
    command = [sys.executable, "-c", WRONG_LIBRARY, str(folder), broken]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_ADAPTIVE")}
    done = subprocess.run(command, cwd=LIBRARY.parent.parent, env=environment, capture_output=True, text=True)
    told = r"^(?!native)\w+ the library at .* cannot be loaded with torch 2.*; rebuild it .*make build"
    return done.returncode == 0 and re.search(told, done.stdout) is not None


@pytest.mark.heavy
def test_an_unusable_library_gives_a_message_and_no_error(tmp_path):
    assert an_unusable_library_gives_a_message(tmp_path, "")
    assert fails(lambda: an_unusable_library_gives_a_message(tmp_path, "broken"))


# ---- 3: older processors ----


def functions_with(instruction: str, library: Path) -> dict[str, int]:
    """Returns how often functions use an instruction whose name matches."""
    command = ["objdump", "-d", "--no-show-raw-insn", "-C", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for function in re.split(r"\n\n", text):
        name = re.search(r"^[0-9a-f]+ <(.*)>:$", function, re.MULTILINE)
        times = len(re.findall(rf"^ +[0-9a-f]+:\s+{instruction} ", function, re.MULTILINE))
        if name and times:
            found[name[1]] = times
    return found


AVX = r"v[a-z]+\w*"


LOOP = """
#include <algorithm>
namespace fused_adaptive::cpu::v3 {
void step(float* p, const float* g, long n) { for (long i = 0; i < n; ++i) p[i] -= std::max(g[i], 0.5f); }
}
void shared(float* p, const float* g, long n) { for (long i = 0; i < n; ++i) p[i] -= g[i]; }
"""


@built
@needs_compiler
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="for x86-64")
def test_code_not_selected_at_run_time_uses_only_baseline_instructions(tmp_path):
    """This includes templates from headers, which the linker may take from a file compiled for a newer processor."""

    def chosen(name: str) -> bool:
        return re.search(r"::(null_)?v[34]::", name) is not None

    found = functions_with(AVX, LIBRARY)
    assert {name for name in found if not chosen(name)} == set()
    assert sum(map(chosen, found)) > 100
    for_newer_ones = functions_with(AVX, shared_library(tmp_path, LOOP, "-mavx2"))
    assert {name for name in for_newer_ones if not chosen(name)} >= {"shared(float*, float const*, long)"}
