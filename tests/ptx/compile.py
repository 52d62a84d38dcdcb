"""Files that take long to make, once for each content of what they are made of; in build/ptx."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..cuda_emulation import build as emulation

HERE = Path(__file__).parent
CACHE = emulation.ROOT / "build" / "ptx"
FLAGS = ["-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-w", "-fvisibility=hidden"]
FLAGS += ["-fno-gnu-unique", "-DFUSED_ADAPTIVE_WITH_CUDA"]
#: Of translated kernels: they are long, and run for a short time.
OBJECT_FLAGS = [*FLAGS, "-O0", f"-I{HERE}", f"-I{emulation.HERE}"]


def cached(kind: str, suffix: str, key: Sequence[str], make: Callable[[Path], None]) -> Path:
    """The path of a file, or of a folder, that is made unless there is one of that key."""
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


def digest(texts: Mapping[str, str]) -> str:
    text = "\0".join(f"{name}\0{texts[name]}" for name in sorted(texts))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def compiled(source: Path, target: Path, *options: str) -> None:
    include = [f"-I{emulation.HERE}"] if not options else []
    run([emulation.compiler() or "g++", *FLAGS, "-O1", *options, *include, "-c", str(source), "-o", str(target)])


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-5000:]}"
