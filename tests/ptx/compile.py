"""A cache in build/ptx of files that take long to make, by the contents of their sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path

from ..cuda_emulation import build as emulation

HERE = Path(__file__).parent
CACHE = emulation.ROOT / "build" / "ptx"
FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-w"]
INCLUDE = [f"-I{HERE}", f"-I{emulation.HERE}"]


def cached(kind: str, suffix: str, key: Sequence[str], make: Callable[[Path], None]) -> Path:
    """Returns the path of a file or folder with this key; makes it if it does not exist."""
    name = digest({str(i): text for i, text in enumerate([kind, str(emulation.compiler()), *FLAGS, *key])})
    path = CACHE / f"{kind}-{name}{suffix}"
    if not path.exists():
        partial = CACHE / f"{os.getpid()}-{path.name}"
        try:
            make(partial)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
    return path


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Locks a name: tests run in parallel, and one of them makes the file for all."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"lock-{name}", "w") as lock:
        flock(lock, LOCK_EX)
        yield


def digest(texts: Mapping[str, str]) -> str:
    text = "\0".join(f"{name}\0{texts[name]}" for name in sorted(texts))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def headers() -> dict[str, str]:
    """Returns headers that translated kernels and their runtime include."""
    return {path.name: path.read_text() for folder in (HERE, emulation.HERE) for path in folder.glob("*.h")}


def translated(code: str, kind: str, suffix: str, *options: str) -> Path:
    """Compiles translated kernels to an object or a library. Not optimized: they are long, and run for a short time."""

    def make(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            source = Path(scratch, "kernels.cpp")
            source.write_text(code)
            compiled([source], target, "-O0", *options)

    return cached(kind, suffix, [code, digest(headers()), *options], make)


def compiled(sources: Sequence[Path], target: Path, *options: str) -> None:
    run([emulation.compiler() or "g++", *FLAGS, *options, *INCLUDE, "-o", str(target), *map(str, sources)])


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-5000:]}"
