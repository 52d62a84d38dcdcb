"""What a measurement is made on and with: names, versions, memory, caches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fused_adaptive as fa
from fused_adaptive.core import library

RIVALS = ("torch-optimi", "pytorch_optimizer", "flashoptim", "bitsandbytes", "triton")


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Machine, versions, commit, and the instruction set or GPU that the kernels ran on."""
    native = not library.why_not()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "driver": driver() if device.type == "cuda" else None,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "kernels": torch.ops.fused_adaptive.cpu_capability() if native else None,
        "memory": round(available_memory(device) / 1e9, 1),
        "cache": cache_bytes(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version for name in RIVALS if (version := version_of(name))},
        "fused_adaptive": fa.__version__,
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2),
    }


def circumstances() -> dict[str, Any]:
    """What of this decides a training run's result: not how long it takes."""
    return {
        "commit": commit(),
        "machine": {"cpu": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "fused_adaptive": fa.__version__},
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def available_memory(device: torch.device) -> int:
    """Bytes that can be had without swapping; 4 GB where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:  # a container may have less
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        found.append(most - used)
    except (OSError, ValueError):
        pass
    return min(found, default=4 * 10**9)


def cache_bytes(device: torch.device) -> int:
    """The last cache before memory: a GPU's L2, a CPU's largest; 32 MiB where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}.get(text[-1], 0))
    return max(sizes, default=0) or 2**25


def commit() -> str | None:
    """The commit of this code, with ``-dirty`` if it was changed since; None outside of a git checkout.

    ``BENCH_COMMIT`` says it for a copy that lacks ``.git``.
    """
    if said := os.environ.get("BENCH_COMMIT"):
        return said
    try:
        describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        command = ["git", "-C", str(Path(__file__).parent), *describe]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
