"""Machine code of the CUDA kernels for each architecture: registers, spills and the width of memory accesses.

Compilation takes minutes. Results are cached in build/ until the sources change.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from fused_adaptive.core.declarations import STRUCTURES

CSRC = Path(__file__).parents[2] / "csrc"
CACHE = CSRC.parent / "build" / "machine_code"
ARCHITECTURES = ["80", "90", "100"]
FILES = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))
# As in setup.py.
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-lineinfo", "-Xcompiler", "-ffp-contract=off", "-Xptxas", "-v"]


def find(tool: str) -> str | None:
    """Finds a CUDA tool: on the path, in CUDA's folder, or in a Python package."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [Path(home, "bin") for home in homes if home]
    folders += [
        p for entry in sys.path for g in ("nvidia/*/bin", "triton/backends/nvidia/bin") for p in Path(entry).glob(g)
    ]
    return shutil.which(tool) or next((str(f / tool) for f in folders if (f / tool).exists()), None)


NVCC = find("nvcc")
pytestmark = [pytest.mark.heavy, pytest.mark.skipif(NVCC is None, reason="no nvcc")]


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel, as reported by ptxas."""

    registers: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Code:
    cubin: Path
    ptx: str
    log: str


def with_includes(path: Path) -> set[Path]:
    """Returns a source and all our files that it includes."""
    names = re.findall(r'#include "(.*)"', path.read_text())
    own = {path.parent / name if (path.parent / name).exists() else CSRC / name for name in names}
    return {path}.union(*map(with_includes, own))


def compiled(name: str, architecture: str) -> Code:
    text = "\0".join(path.read_text() for path in sorted(with_includes(CSRC / "cuda" / f"{name}.cu")))
    digest = hashlib.sha256("\0".join([*FLAGS, str(NVCC), text]).encode()).hexdigest()[:16]
    folder = CACHE / f"{digest}-{name}-{architecture}"
    cubin, log = folder / f"{name}.cubin", folder / "log"
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        command = [
            str(NVCC),
            *FLAGS,
            *target,
            f"-I{CSRC}",
            "-cubin",
            "--keep",
            "--keep-dir",
            str(folder),
            "-o",
            str(cubin),
        ]
        done = subprocess.run([*command, str(CSRC / "cuda" / f"{name}.cu")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for kept in folder.iterdir():
            if kept.suffix not in (".cubin", ".ptx"):
                kept.unlink()
        log.write_text(done.stdout + done.stderr)
    return Code(cubin, next(folder.glob("*.ptx")).read_text(), log.read_text())


@cache
def built(name: str) -> dict[str, Code]:
    """Compiles a file for each architecture, two at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock, ThreadPoolExecutor(2) as workers:  # tests run in parallel
        fcntl.flock(lock, fcntl.LOCK_EX)
        return dict(zip(ARCHITECTURES, workers.map(lambda a: compiled(name, a), ARCHITECTURES), strict=True))


def usages(name: str, architecture: str) -> dict[str, Usage]:
    """Returns the resources of every kernel of a file, by demangled name."""
    found = {}
    for block in built(name)[architecture].log.split("Compiling entry function")[1:]:
        mangled = re.findall(r"'(\S+)'", block)[0]
        own = block[block.index(f"Function properties for {mangled}") :]
        stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack|spill)", own)[:3])
        registers = int(re.findall(r"Used (\d+) registers", own)[0])
        found[mangled] = Usage(registers, stack, stores + loads)
    names = subprocess.run(["c++filt"], input="\n".join(found), capture_output=True, text=True).stdout.split("\n")
    return dict(zip(names, found.values(), strict=False))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", FILES)
def test_no_kernel_spills(name, architecture):
    found = usages(name, architecture)
    assert {kernel: u for kernel, u in found.items() if u.spills} == {}
    if name.startswith("step_"):
        assert len(found) == 8 * len(STRUCTURES)  # 4 modes, 2 decays
        assert {kernel: u for kernel, u in found.items() if u.stack} == {}
    if name == "step_f32":
        # At least four blocks a multiprocessor. Three are enough for kernels with seven or more arrays.
        few = {kernel: u for kernel, u in found.items() if arrays(kernel) <= 6}
        assert len(few) == 66
        assert max(u.registers for u in few.values()) <= 64
        assert max(u.registers for u in found.values()) <= 80
    if name in ("step_bf16", "step_f16"):
        # Three blocks for kernels with four arrays, or with ActiveLR's.
        few = {k: u for k, u in found.items() if arrays(k) <= 4 or (arrays(k) <= 6 and ", 2, " in k)}
        assert len(few) == 36
        assert max(u.registers for u in few.values()) <= 80


def arrays(kernel: str) -> int:
    """Returns the number of arrays that an update kernel accesses, from its demangled name; see multi_tensor.cuh."""
    match = re.search(r"update<fused_adaptive::(\w+)(?:<(.*?)>)?, (\d), ", kernel)
    assert match is not None, kernel
    backbone, structure, mode = match[1], match[2] or "", int(match[3])
    states = int(")0" not in structure) if backbone == "Sgd" else 2 + structure.endswith("true")
    stores = mode == 0 and (backbone == "NAdam" or (backbone == "Sgd" and ")1" not in structure))
    return 2 + states + (2 if mode & 2 else 0) + (mode & 1) + stores


#: Modes of AdamW and ActiveAdamW with decoupled decay in mangled names.
MODES = {"AdamW": 0, "ActiveAdamW": 2}


NO_SASS = "" if find("nvdisasm") and find("cuobjdump") else "no nvdisasm or no cuobjdump"


def disassembled(code: Code, kernel: str) -> list[str]:
    """Returns the machine instructions of a kernel, in order."""
    path = f"{Path(find('nvdisasm') or '').parent}{os.pathsep}{os.environ['PATH']}"
    command = [find("cuobjdump") or "cuobjdump", "-sass", "-fun", kernel, str(code.cubin)]
    text = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path}).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["step_f32", "step_bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_memory_is_accessed_by_16_bytes(name, architecture, mode):
    code = built(name)[architecture]
    kernel = re.search(rf"\b(_ZN\S*6updateINS_5AdamWILb0EEELi{MODES[mode]}ELb0E\S*)\(", code.ptx)
    assert kernel is not None
    body = code.ptx[kernel.start() :]
    body = body[: body.index("\n}")]
    arrays = 4 if mode == "AdamW" else 6  # parameter, gradient, two moments; gain and sum
    words = 1 if name == "step_f32" else 2  # words of state for 16 bytes of bf16 parameters
    wide = 2 + (arrays - 2) * words
    assert len(re.findall(r"ld\.global\.(?:cs\.)?(?:v4\.[bfu]32|v2\.[bfu]64)", body)) >= wide
    assert len(re.findall(r"ld\.global\.cs\.v4\.[bu]32", body)) == 1  # only the gradient is not kept in the cache
    assert len(re.findall(r"st\.global\.(?:v4\.[bfu]32|v2\.[bfu]64)", body)) >= wide - 1
    if NO_SASS:
        return  # the compiler's assembly is enough
    sass = "\n".join(disassembled(code, kernel[1]))
    assert len(re.findall(r"LDG\.E\.[\w.]*128", sass)) >= wide
    assert len(re.findall(r"STG\.E\.[\w.]*128", sass)) >= wide - 1
    assert "LDL" not in sass
    assert "STL" not in sass


REGISTERS_OF_A_MULTIPROCESSOR, THREADS = 65536, 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", MODES)
def test_four_blocks_fit_on_a_multiprocessor(mode, architecture):
    """Kernels of float32 parameters with decoupled decay."""
    name = f"update<fused_adaptive::AdamW<false>, {MODES[mode]}, false, float>"
    (usage,) = [u for kernel, u in usages("step_f32", architecture).items() if name in kernel]
    of_a_block = -(-usage.registers // 8) * 8 * THREADS  # registers are allocated in units of eight
    assert REGISTERS_OF_A_MULTIPROCESSOR // of_a_block == 4
    assert usage.spills == usage.stack == 0


def registers_of(operands: str, wide: int = 1) -> set[int]:
    """Returns the numbers of the registers in operands; an address takes two."""
    found = set()
    for number, suffix in re.findall(r"\bR(\d+)(\.64)?", operands):
        found |= set(range(int(number), int(number) + (2 if suffix else wide)))
    return found


WIDE, SINGLE = r"LDG\.E\.[\w.]*128", r"@!?P\d LDG\.E(\.EF)? "


def used_early(sass: list[str], count: int, load: str = WIDE) -> list[str]:
    """Returns the instructions that read one of the first ``count`` loads before the last of them is issued."""
    loads = [i for i, line in enumerate(sass) if re.search(load, line)][:count]
    assert len(loads) == count
    loaded, early = set[int](), []
    for i in range(loads[0], loads[-1] + 1):
        opcode, operands = re.findall(r"(?:@!?\w+ )?(\S+)\s*(.*)", sass[i])[0]
        target, _, read = operands.partition(",")
        if registers_of(operands if opcode.startswith("ST") else read) & loaded:
            early.append(sass[i])
        if i in loads:
            loaded |= registers_of(target, wide=4 if load == WIDE else 1)
    return early


@pytest.mark.skipif(NO_SASS != "", reason=NO_SASS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", MODES)
def test_all_loads_are_issued_before_one_is_used(mode, architecture):
    code = built("step_f32")[architecture]
    kernel = re.search(rf"\b(_ZN\S*6updateINS_5AdamWILb0EEELi{MODES[mode]}ELb0E\S*)\(", code.ptx)
    assert kernel is not None
    arrays = 4 if mode == "AdamW" else 6
    assert used_early(disassembled(code, kernel[1]), arrays) == []


@pytest.mark.skipif(NO_SASS != "", reason=NO_SASS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_loads_of_misaligned_tensors_are_issued_before_one_is_used(architecture):
    """Four elements of each of four arrays are loaded."""
    code = built("step_f32")[architecture]
    kernel = re.search(r"\b(_ZN\S*6updateINS_5AdamWILb0EEELi0ELb0E\S*)\(", code.ptx)
    assert kernel is not None
    assert used_early(disassembled(code, kernel[1]), 16, SINGLE) == []


def test_a_load_that_is_used_early_is_noticed():
    lines = [
        "LDG.E.128 R16, desc[UR12][R16.64] ",
        "IADD3 R2, R3, R4, RZ ",
        "FADD R5, R19, R4 ",
        "LDG.E.128 R20, desc[UR12][R52.64] ",
    ]
    assert used_early(lines, 2) == [lines[2]]
    assert used_early([lines[0], lines[1], lines[3], lines[2]], 2) == []
