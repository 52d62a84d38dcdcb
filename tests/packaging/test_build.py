"""The native library: which parts are built, the messages about missing parts, and errors of an unusable library.

Most tests build a library of a few lines in a copy of the tree. The heavy ones build more often, or the real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.core import declarations

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "fused_adaptive" / "_C.abi3.so"
NVCC = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()

if not (ROOT / "setup.py").exists():
    pytest.skip("the sources are not here", allow_module_level=True)
pytest.importorskip("setuptools")
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(not NVCC, reason="no nvcc")
needs_pip = pytest.mark.skipif(
    subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0, reason="no pip"
)

OPERATORS = """
        #include <torch/csrc/stable/library.h>
        #include <string>
        std::string build_version() { return FUSED_ADAPTIVE_VERSION; }
        std::string declarations() { return DECLARATIONS; }
  STABLE_TORCH_LIBRARY_FRAGMENT(fused_adaptive, m) { m.def("build_version() -> str"), m.def("declarations() -> str"); }
        STABLE_TORCH_LIBRARY_IMPL(fused_adaptive, CompositeExplicitAutograd, m) {
          m.impl("build_version", TORCH_BOX(&build_version)), m.impl("declarations", TORCH_BOX(&declarations));
        }
""".replace("DECLARATIONS", json.dumps(declarations.text()))

SMALL = {
    "bindings/ops.cpp": OPERATORS
    + """
        #include "plan/three.h"
        int64_t number() { return three(); }
        STABLE_TORCH_LIBRARY_FRAGMENT(fused_adaptive, n) { n.def("number() -> int"); }
        STABLE_TORCH_LIBRARY_IMPL(fused_adaptive, CompositeImplicitAutograd, n) {
          n.impl("number", TORCH_BOX(&number));
        }
    """,
    "plan/three.h": "int three();\n",
    "cpu/three.cpp": '#include "plan/three.h"\nint three() { return 3; }\n',
    "cuda/kernel.cu": "__global__ void kernel(float* x) { *x = 3; }\nvoid launch(float* x) { kernel<<<1, 1>>>(x); }\n",
    "cuda/launch.cpp": """
        #include <cuda_runtime_api.h>
        #ifndef FUSED_ADAPTIVE_WITH_CUDA
        #error the CUDA sources are compiled without knowing it
        #endif
        void launch(float* x);
        int launch_and_check(float* x) { launch(x); return cudaGetLastError(); }
    """,
}


def copy_tree(to: Path, sources: dict[str, str] | None = SMALL) -> Path:
    """Copies the tree of a fresh checkout, with these sources instead of the kernels (None: with the kernels)."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for name in ("fused_adaptive", "csrc"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, to / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    if sources is not None:
        shutil.rmtree(to / "csrc", ignore_errors=True)
        for name, text in sources.items():
            (to / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
            (to / "csrc" / name).write_text(text)
    return to


def run(*command: str | Path, cwd: Path, ok: bool = True, **environment: str) -> str:
    """Returns the output of a command. ``ok``: whether it must succeed or fail."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith("FUSED_ADAPTIVE") and k not in ("PYTHONPATH", "CXX")
    }
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=clean | {"MAX_JOBS": "2"} | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def build(tree: Path, ok: bool = True, **environment: str) -> tuple[dict, str]:
    """Builds in place. Returns the contents of ``_build.json`` and the output."""
    (tree / "fused_adaptive" / "_build.json").unlink(missing_ok=True)
    environment = {"FUSED_ADAPTIVE_BUILD": "auto", **environment}
    output = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, ok=ok, **environment)
    built = json.loads((tree / "fused_adaptive" / "_build.json").read_text())
    assert (tree / "fused_adaptive" / "_C.abi3.so").exists() == built["cpu"]
    assert (built["version"], built["torch"] or torch.__version__) == (fa.__version__, torch.__version__)
    for part, reason in built["left_out"].items():
        assert f"fused_adaptive: left out {part}: {reason}" in output
    return built, output


def in_tree(tree: Path, code: str, **environment: str) -> str:
    return run(sys.executable, "-c", code, cwd=tree, **environment)


NUMBER = "import torch, fused_adaptive.core.library as e; e.load(); print(torch.ops.fused_adaptive.number())"


@pytest.mark.heavy
@needs_compiler
def test_without_nvcc_the_cpu_kernels_are_built_and_a_reason_is_given(tmp_path):
    tree = copy_tree(tmp_path)
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    home = {"CUDA_HOME": str(tmp_path / "cuda")}
    built, output = build(tree, **home)
    assert built["cpu"] is True
    assert built["cuda"] is None
    assert built["left_out"] == {
        "cuda": f"no nvcc with a libcudart_static.a was found in {tmp_path}/cuda; set CUDA_HOME"
    }
    assert output.rstrip().splitlines()[-2] == "fused_adaptive: CPU kernels"
    assert in_tree(tree, NUMBER) == "3\n"
    report = run(sys.executable, "-m", "fused_adaptive", cwd=tree)
    assert re.search(r"native library  loaded\n  built         CPU kernels\n.*\n  left out      cuda: no nvcc", report)
    # No flag changes results or needs a newer machine.
    compiled = [line for line in output.splitlines() if "three.cpp" in line]
    assert compiled
    for line in compiled:
        assert {"-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"} <= set(
            line.split()
        )
        assert not re.search(r"-march|-mavx|-mfma|-mtune|-ffast-math|-Ofast|-funsafe", line)


@pytest.mark.heavy
@needs_compiler
def test_required_and_selected_parts_of_a_build(tmp_path):
    tree = copy_tree(tmp_path)
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    home = {"CUDA_HOME": str(tmp_path / "cuda")}
    # A part that was not selected may be missing.
    built, _ = build(tree, FUSED_ADAPTIVE_BUILD="cpu", FUSED_ADAPTIVE_REQUIRE_EXT="1")
    assert built["left_out"] == {"cuda": "FUSED_ADAPTIVE_BUILD=cpu did not ask for it"}
    build(tree, FUSED_ADAPTIVE_REQUIRE_EXT="cpu", **home)
    _, output = build(tree, ok=False, FUSED_ADAPTIVE_REQUIRE_EXT="1", **home)
    assert "FUSED_ADAPTIVE_REQUIRE_EXT=1 forbids to leave this out:\ncuda: no nvcc" in output
    # An nvcc that supports none of our architectures, and one that fails.
    (tmp_path / "cuda" / "lib64").mkdir()
    (tmp_path / "cuda" / "lib64" / "libcudart_static.a").touch()
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    for knows, reason in (("compute_52", "knows none of 8.0, 9.0, 10.0"), ("compute_80", "it failed to compile")):
        nvcc.write_text(f'#!/bin/sh\ntest "$1" = --list-gpu-arch && echo {knows}\n')
        nvcc.chmod(0o755)
        built, _ = build(tree, **home)
        assert built["cpu"] is True
        assert reason in built["left_out"]["cuda"]
    # The next build, with no parts, removes all of this.
    built, output = build(tree, FUSED_ADAPTIVE_BUILD="none")
    assert built["cpu"] is False
    assert "fused_adaptive: pure Python, no kernels" in output


@pytest.mark.heavy
def test_without_a_compiler_or_torch_it_is_pure_python_and_a_reason_is_given(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_torch").mkdir()
    (tmp_path / "no_torch" / "torch.py").write_text("raise ImportError('torch is not here')\n")
    cases = [
        ({"CXX": "/nonexistent"}, "no C++ compiler was found (/nonexistent); install g++ or set CXX"),
        ({"PATH": str(tmp_path / "empty")}, "no C++ compiler was found (c++, g++, clang++); install g++ or set CXX"),
    ]
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        without_torch = {"PYTHONPATH": str(tmp_path / "no_torch")}
        cases.append(
            (
                without_torch,
                "torch is not there to build with (torch is not here); use pip install --no-build-isolation",
            )
        )
    for environment, reason in cases:
        built, output = build(tree, **environment)
        assert (built["cpu"], built["cuda"]) == (False, None)
        assert reason in built["left_out"]["cpu"]
        assert "fused_adaptive: pure Python, no kernels" in output
        _, output = build(tree, ok=False, FUSED_ADAPTIVE_REQUIRE_EXT="1", **environment)
        assert reason in output.split("forbids to leave this out:")[1]
        build(tree, ok=False, FUSED_ADAPTIVE_REQUIRE_EXT="cpu", **environment)
    run(sys.executable, "setup.py", "build_ext", cwd=tree, ok=False, FUSED_ADAPTIVE_BUILD="gpu")
    build(tree, CXX="/nonexistent")
    told = in_tree(tree, "from fused_adaptive.core import library; print(library.why_not(), library.has_cuda())")
    assert "was not built: no C++ compiler was found (/nonexistent)" in told
    assert told.endswith(" False\n")


@pytest.mark.heavy
@needs_compiler
def test_code_that_does_not_compile_is_left_out(tmp_path):
    tree = copy_tree(tmp_path, SMALL | {"cpu/three.cpp": "no C++\n"})
    built, output = build(tree, CUDA_HOME="/nonexistent")
    assert built["cpu"] is False
    assert "it failed to compile" in built["left_out"]["cpu"]
    assert "three.cpp:1" in output


@pytest.mark.heavy
@needs_compiler
@needs_nvcc
def test_cuda_kernels_need_no_gpu_no_cuda_library_and_no_whole_build(tmp_path):
    tree = copy_tree(tmp_path)
    built, output = build(tree, FUSED_ADAPTIVE_REQUIRE_EXT="1", TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX")
    assert (built["cpu"], built["cuda"], built["left_out"]) == (True, "8.0;9.0+PTX", {})
    assert "code=sm_80" in output
    assert "--fmad=false" in output
    assert in_tree(tree, NUMBER + "; print(e.has_cuda())") == "3\nTrue\n"
    assert_portable(tree / "fused_adaptive" / "_C.abi3.so")
    kernel = tree / "csrc" / "cuda" / "kernel.cu"
    kernel.write_text(kernel.read_text() + "no CUDA\n")
    built, output = build(tree, ok=False, FUSED_ADAPTIVE_REQUIRE_EXT="1", TORCH_CUDA_ARCH_LIST="8.0")
    assert (built["cpu"], built["cuda"]) == (True, None)
    assert "it failed to compile" in built["left_out"]["cuda"]
    assert "kernel.cu(3)" in output
    assert in_tree(tree, NUMBER + "; print(e.has_cuda())") == "3\nFalse\n"


def assert_portable(library: Path) -> None:
    """The library uses only torch's stable C interface and the system's libraries."""
    undefined = run("nm", "-D", "--undefined-only", library, cwd=library.parent)
    assert "aoti_torch_" in undefined
    assert not re.search(r" _Z\w*(2at|3c10|5torch|6caffe2)", undefined)
    assert not re.search(r" U (cuda|cu[A-Z]|Py|_Py)", undefined)
    needed = set(re.findall(r"NEEDED.*\[(\w+)", run("readelf", "-d", library, cwd=library.parent)))
    assert needed <= {"libtorch_cpu", "libstdc", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread", "ld"}


@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("readelf"), reason="no nm and readelf")
@pytest.mark.skipif(not LIBRARY.exists(), reason="the native library is not built")
def test_the_library_uses_only_the_stable_interface():
    assert_portable(LIBRARY)


WRONG = """
import json, sys, torch, fused_adaptive as fa
from fused_adaptive.core import library as e
from pathlib import Path

def told(**record):
    e._reason = None
    if record:
        (e.FOLDER / "_build.json").write_text(json.dumps(record))
    print(e.why_not())
    assert e.why_not() is e._reason and not e.has_cuda()
    try:
        e.load()
    except RuntimeError as error:
        assert str(error) == e.why_not()
    else:
        raise AssertionError("it loads")
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    fa.AdamW([p]).step()
    assert bool((p != 0).all())

good, e.FOLDER = e.FOLDER, Path(sys.argv[1])
told()
told(left_out={"cpu": "the dog ate it"})
(e.FOLDER / "_C.abi3.so").write_bytes(b"garbage")
told(version=fa.__version__, platform="linux-sparc")
told(version="0.0.1")
e.FOLDER = good
(good / "_build.json").unlink()
from fused_adaptive.core import version
version.__version__ = "9.9.9"
told()
"""


@needs_compiler
def test_an_unusable_library_gives_a_message_with_a_remedy_and_no_error(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    (tmp_path / "elsewhere").mkdir()
    build(tree, FUSED_ADAPTIVE_BUILD="cpu")
    output = run(sys.executable, "-W", "ignore::UserWarning", "-c", WRONG, tmp_path / "elsewhere", cwd=tree)
    none, eaten, garbage, old, other = output.splitlines()
    library, here = tmp_path / "elsewhere" / "_C.abi3.so", tree / "fused_adaptive" / "_C.abi3.so"
    assert none.startswith("the native library was not built: no build has run; then rebuild it")
    assert eaten.startswith("the native library was not built: the dog ate it; then rebuild it")
    assert garbage.startswith(f"the library at {library} cannot be loaded with torch {torch.__version__}: {library}: ")
    assert "it was built on linux-sparc, and this is" in garbage
    assert old.startswith(f"the library at {library} is that of fused_adaptive 0.0.1, and this is {fa.__version__}; ")
    assert other.startswith(f"the library at {here} is that of fused_adaptive {fa.__version__}, and this is 9.9.9; ")
    assert all("make build" in line and "--no-build-isolation" in line for line in output.splitlines())


def environment_with(*arguments: str | Path, folder: Path, **variables: str) -> Path:
    """Returns the Python of an environment with torch, in which pip installs this package with these arguments."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path file in these folders, such as that of an editable install, has no effect here.
    (site / "torch.pth").write_text(
        "\n".join({str(Path(sys.modules[m].__file__ or "").parents[1]) for m in ("torch", "pytest")})
    )
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run(*pip, *arguments, cwd=folder, **variables)
    return python


STEP = """
import torch, fused_adaptive as fa
print(fa.__file__)
p = torch.zeros(5, requires_grad=True)
p.grad = torch.arange(5.0)
optimizer = fa.AdamW([p], lr=0.5, backend="{backend}")
optimizer.step()
assert p[0] == 0 and torch.allclose(p[1:], torch.tensor(-0.5)), p
print(optimizer._step_backend.name)
"""


def wheel_by_way_of_sdist(tree: Path, **variables: str) -> tuple[Path, set[str]]:
    run(sys.executable, "setup.py", "sdist", "-d", "dist", cwd=tree)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "wheels",
        sdist,
    ]
    run(*pip, cwd=tree, **variables)
    (wheel,) = (tree / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel, set(archive.namelist())


@pytest.mark.heavy
@needs_compiler
@needs_pip
def test_sdist_and_wheel(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    build(tree, FUSED_ADAPTIVE_BUILD="cpu")  # must not be in the wheel
    wheel, names = wheel_by_way_of_sdist(tree, FUSED_ADAPTIVE_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "fused_adaptive/_build.json" in names
    assert "fused_adaptive/_C.abi3.so" not in names
    wheel.unlink()
    wheel, names = wheel_by_way_of_sdist(tree, FUSED_ADAPTIVE_BUILD="cpu")
    assert re.search(r"-cp310-abi3-\w+\.whl$", wheel.name)
    assert {"fused_adaptive/_build.json", "fused_adaptive/_C.abi3.so", "fused_adaptive/py.typed"} <= names
    assert not any("csrc" in name for name in names)
    python = environment_with(wheel, folder=tmp_path / "environment")
    report = run(python, "-m", "fused_adaptive", cwd=tmp_path)
    assert "native library  loaded\n  built         CPU kernels\n" in report
    assert "left out      cuda: FUSED_ADAPTIVE_BUILD=cpu did not ask for it" in report
    where, backend = run(python, "-c", STEP.format(backend="reference"), cwd=tmp_path).splitlines()
    assert Path(where).is_relative_to(tmp_path / "environment")
    assert backend == "reference"


@pytest.mark.heavy
@needs_compiler
@needs_pip
def test_editable(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    arguments = ["--no-build-isolation", "-e", tree]
    python = environment_with(*arguments, folder=tmp_path / "environment", FUSED_ADAPTIVE_BUILD="cpu")
    assert (
        run(python, "-c", NUMBER + "; print(e.__file__)", cwd=tmp_path) == f"3\n{tree}/fused_adaptive/core/library.py\n"
    )
