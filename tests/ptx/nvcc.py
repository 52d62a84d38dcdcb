"""csrc/cuda compiled by nvcc and run on the CPU: nvcc's host objects, with the kernels' PTX for the device code.

All of the package is compiled as for a GPU. ``cudart.cpp`` replaces libcudart: its launches run the PTX, translated to
C++.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from ..cuda_emulation import build as emulation
from .compile import CACHE, HERE, cached, compiled, digest, headers, locked, run, translated
from .parse import Module, parse
from .translate import translate

#: The flags of setup.py that affect kernels.
NVCC_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-Xcompiler", "-ffp-contract=off,-fPIC,-fvisibility=hidden,-w"]
NVCC_FLAGS += ["-DFUSED_ADAPTIVE_WITH_CUDA", "-gencode", "arch=compute_90,code=compute_90"]
#: Several libraries in one process must not share their tables.
HOST_FLAGS = ["-O1", "-fvisibility=hidden", "-fno-gnu-unique", "-DFUSED_ADAPTIVE_WITH_CUDA", "-c"]
#: Number of kernels in a translated file. Several files are compiled in parallel.
ENTRIES = 10

Patch = tuple[str, str, str]


@cache
def nvcc() -> str | None:
    from ..backends.test_cuda_machine_code import find

    return find("nvcc")


def why_not() -> str:
    """Returns why the library cannot be made here; "" if it can."""
    if emulation.compiler() is None:
        return "no C++ compiler"
    return "" if nvcc() else "no nvcc"


def library(patches: Sequence[Patch] = (), small: bool = False) -> Path:
    """Returns the path of the library, which has the interface of tests/cuda_emulation's.

    Args:
        patches: as in :func:`tests.cuda_emulation.build.library`.
        small: builds update kernels of AdamW in float32 with decoupled decay only, and Hypergradient for AdamW.
    """
    texts = sources(patches, small)
    own = {f"ptx/{p.name}": p.read_text() for p in sorted(HERE.iterdir()) if p.suffix in (".h", ".cpp", ".py")}
    with locked("nvcc"):
        key = [digest({**texts, **own, **headers()}), *NVCC_FLAGS, *HOST_FLAGS, str(nvcc())]
        return cached("library", ".so", key, lambda to: make(to, texts))


def ptx_of(source: str) -> str:
    """Returns nvcc's PTX of csrc/cuda's ``source``.cu."""
    texts = sources((), False)
    with locked("nvcc"), tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        write(texts, Path(scratch))
        made = cuda_files(Path(scratch), included(texts), f"cuda/{source}.cu")
        return next(p for p in made if p.suffix == ".ptx").read_text()


def sources(patches: Sequence[Patch], small: bool) -> dict[str, str]:
    texts = emulation.sources("rules/*", "plan/*.h", "cuda/*")
    if small:
        texts = {name: text for name, text in texts.items() if "step_" not in name}
        texts["cuda/stubs.cu"] = (HERE / "stubs.cu").read_text()
        patches = [*patches, ("cuda/reduce.cu", "FA_FOR_EACH_BACKBONE(FA_CASE)", "FA_CASE(AdamWPlain)")]
    emulation.patch(texts, *patches)
    others = [p for p in emulation.HERE.glob("*.cpp") if p.name not in ("emulation.cpp", "stubs.cpp")]
    return texts | {f"emulation/{p.name}": p.read_text() for p in others}


def included(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in texts.items() if not name.endswith((".cpp", ".cu"))}


def make(target: Path, texts: Mapping[str, str]) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch, ThreadPoolExecutor(2) as workers:
        folder, ours = Path(scratch), included(texts)
        write(texts, folder)

        def host(name: str) -> list[Path]:
            """Compiles a source to an object, and a .cu to an object and PTX."""
            if name.endswith(".cu"):
                return cuda_files(folder, ours, name)
            key = [name, digest({**ours, name: texts[name]}), *HOST_FLAGS, str(nvcc())]
            options = [*HOST_FLAGS, f"-I{folder}", f"-I{cuda_headers()}"]
            return [cached("host", ".o", key, lambda to: compiled([folder / name], to, *options))]

        units = sorted(set(texts) - set(ours), key=lambda name: -("step_" in name))  # long ones first
        made = [path for paths in workers.map(host, units) for path in paths]
        kernels = [code for path in made if path.suffix == ".ptx" for code in translations(path.read_text())]
        objects = [path for path in made if path.suffix == ".o"]
        objects += workers.map(lambda code: translated(code, "kernels", ".o", *HOST_FLAGS[1:]), kernels)
        objects += map(runtime_object, (HERE / "cudart.cpp", HERE / "runtime.cpp", emulation.HERE / "emulation.cpp"))
        run([emulation.compiler() or "g++", "-shared", "-o", str(target), *map(str, objects), "-ldl"])


def runtime_object(source: Path) -> Path:
    # The include path has the emulated cuda_runtime.h before NVIDIA's, which has cuda_runtime_api.h.
    options = [*HOST_FLAGS, f"-idirafter{cuda_headers()}"]
    key = [digest({**headers(), source.name: source.read_text()}), *options]
    return cached("runtime", ".o", key, lambda to: compiled([source], to, *options))


def write(texts: Mapping[str, str], folder: Path) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def cuda_files(folder: Path, ours: Mapping[str, str], name: str) -> list[Path]:
    """Returns the object and the PTX of a .cu in a folder of sources."""
    key = [name, digest({**ours, name: (folder / name).read_text()}), *NVCC_FLAGS, str(nvcc())]
    made = cached("cuda", "", key, lambda to: compile_cuda(folder / name, to))
    return sorted(made.iterdir())


def compile_cuda(source: Path, folder: Path) -> None:
    folder.mkdir()
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        options = [*NVCC_FLAGS, "--keep", "--keep-dir", scratch, f"-I{source.parents[1]}"]
        run([nvcc() or "nvcc", *options, "-c", "-o", str(folder / f"{source.stem}.o"), str(source)])
        shutil.copy(Path(scratch, f"{source.stem}.ptx"), folder)


def translations(text: str) -> list[str]:
    module = parse(text)
    entries = entries_of(module)
    return [translate(module, entries[i : i + ENTRIES]) for i in range(0, len(entries), ENTRIES)]


def entries_of(module: Module) -> list[str]:
    return sorted(f.name for f in module.functions.values() if f.is_entry)


@cache
def cuda_headers() -> Path:
    """Returns the folder of cuda_runtime_api.h."""
    done = subprocess.run([nvcc() or "nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    line = next(line for line in done.stderr.splitlines() if "INCLUDES=" in line)
    return Path(line.partition("-I")[2].split('"')[0])
