"""What a measurement was made on and with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fused_adaptive as fa
from fused_adaptive import _extension


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Machine, versions, commit, and the instruction set or GPU that the kernels ran on."""
    native = not _extension.why_not()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "kernels": torch.ops.fused_adaptive.cpu_capability() if native else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fused_adaptive": fa.__version__,
        "commit": commit(),
        "load": os.getloadavg()[0],
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def commit() -> str | None:
    """The commit of this code, with ``-dirty`` if it was changed since; None outside of a git checkout."""
    try:
        describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        command = ["git", "-C", str(Path(__file__).parent), *describe]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
