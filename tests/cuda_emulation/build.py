"""Builds csrc/cuda with g++ against the emulated runtime of this directory, once for each content of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_emulation"
#: The flags of the extension that affect results.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-DFUSED_ADAPTIVE_WITH_CUDA"]
#: Several libraries in one process must not share their tables.
FLAGS += ["-fvisibility=hidden", "-fno-gnu-unique"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def library(patches: Sequence[tuple[str, str, str]] = (), small: bool = False) -> Path:
    """Returns the path of the library.

    Args:
        patches: (file in csrc, a text that occurs in it exactly once, its replacement).
        small: builds one update kernel only, ActiveAdamW in float32 with decoupled decay, and no Hypergradient.
    """
    texts = sources("rules/*", "plan/*.h", "cuda/*")
    if small:
        texts = {name: text for name, text in texts.items() if "step_" not in name}
        patches = [*patches, ("cuda/reduce.cu", "FA_FOR_EACH_BACKBONE(FA_CASE)", "")]
    patch(texts, *patches)
    texts |= {f"emulation/{p.name}": p.read_text() for p in sorted(HERE.iterdir()) if p.suffix in (".h", ".cpp")}
    if not small:
        del texts["emulation/stubs.cpp"]
    return cached(texts)


def sources(*patterns: str) -> dict[str, str]:
    """Returns files of csrc by name."""
    files = [path for pattern in patterns for path in sorted(CSRC.glob(pattern))]
    return {path.relative_to(CSRC).as_posix(): path.read_text() for path in files}


def patch(texts: dict[str, str], *patches: tuple[str, str, str]) -> None:
    """Replaces one text in a file for each patch."""
    for name, old, new in patches:
        assert texts[name].count(old) == 1, f"{name} has {texts[name].count(old)} times what a patch replaces: {old}"
        texts[name] = texts[name].replace(old, new)


def cached(texts: Mapping[str, str], flags: Sequence[str] = ()) -> Path:
    """Returns the library of these sources; builds it if it does not exist."""
    CACHE.mkdir(parents=True, exist_ok=True)
    target = CACHE / f"{_digest(texts, flags)}.so"
    with open(CACHE / "lock", "w") as lock:  # tests run in parallel
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _build(texts, target, flags)
    return target


def _build(texts: Mapping[str, str], target: Path, flags: Sequence[str]) -> None:
    headers = {name: text for name, text in texts.items() if not name.endswith((".cpp", ".cu"))}
    units = [name for name in texts if name not in headers]
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        for name, text in texts.items():
            path = Path(scratch, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

        def compile_one(name: str) -> Path:
            # Objects are cached too: a patched executor does not change the kernels.
            own = () if name.startswith(("cuda/", "emulation/")) else flags  # sources without torch are shared
            done = CACHE / f"{_digest({**headers, name: texts[name]}, own)}.o"
            if not done.exists():
                made = Path(scratch, name + ".o")
                include = [f"-I{scratch}/emulation", f"-I{scratch}"]
                _run(
                    [
                        compiler() or "g++",
                        *FLAGS,
                        *own,
                        *include,
                        "-c",
                        "-x",
                        "c++",
                        f"{scratch}/{name}",
                        "-o",
                        str(made),
                    ]
                )
                made.replace(done)
            return done

        units.sort(key=lambda name: -("step_" in name))  # long ones first
        with ThreadPoolExecutor(2) as workers:
            objects = list(workers.map(compile_one, units))
        made = Path(scratch, "library.so")
        _run([compiler() or "g++", "-shared", "-o", str(made), *map(str, objects), *flags, "-ldl"])
        made.replace(target)


def _digest(texts: Mapping[str, str], flags: Sequence[str]) -> str:
    text = "\0".join([str(compiler()), *FLAGS, *flags, *(f"{name}\0{texts[name]}" for name in sorted(texts))])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
