"""``python -m fused_adaptive``: what this machine has, a screen to paste into a bug report; ``--json`` for programs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import textwrap
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import backends
from .core import library
from .core.version import __version__

#: Environment variables that change what is built, chosen or computed: these, and all that begin like the others.
VARIABLES = (
    "CC",
    "CUDA_HOME",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_CUDA_ARCH_LIST",
)
PREFIXES = ("FUSED_ADAPTIVE_", "TORCHINDUCTOR_", "TRITON_")
#: Packages whose versions are reported where they are installed, besides those that always are.
PACKAGES = ("accelerate", "lightning", "transformers")
WIDTH = 120


def information() -> dict[str, Any]:
    """The environment as plain data, what ``--json`` prints: versions, devices, the native library, backends.

    Wherever something is missing there is a reason; ``""`` is the reason of what is there.
    """
    why_not, cuda = library.why_not(), torch.cuda.is_available()
    has_name = not why_not and hasattr(torch.ops.fused_adaptive, "cpu_capability")
    return {
        "fused_adaptive": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "packages": {name: _version(name) for name in ("torch", "triton", "numpy", *PACKAGES)},
        "cpu": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.backends.cpu.get_cpu_capability(),
            "kernels": torch.ops.fused_adaptive.cpu_capability() if has_name else None,
        },
        "cuda": {
            "torch": torch.version.cuda,
            "why_not": "" if cuda else _why_no_cuda(),
            "devices": [_device(i) for i in range(torch.cuda.device_count())] if cuda else [],
        },
        "library": {"why_not": why_not, **library.built()},
        "backends": backends.available(),
        "auto": {device: _chosen(device) for device in (["cpu", "cuda"] if cuda else ["cpu"])},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k in VARIABLES or k.startswith(PREFIXES)},
    }


def report() -> str:
    """The same as text."""
    found = information()
    packages, cpu, cuda = found["packages"], found["cpu"], found["cuda"]
    kernels = f", kernels for {cpu['kernels']}" if cpu["kernels"] else ""
    lines = [
        f"fused_adaptive  {found['fused_adaptive']}",
        f"python          {found['python']} on {found['platform']}",
        f"torch           {packages['torch']}  (CUDA {cuda['torch'] or 'not in this build'})",
        f"triton          {packages['triton'] or 'not installed'}",
        f"numpy           {packages['numpy'] or 'not installed'}",
        *(f"{name:<16}{packages[name]}" for name in PACKAGES if packages[name]),
        "",
        f"cpu             {cpu['cores']} logical cores, {cpu['threads']} torch threads, {cpu['torch']}{kernels}",
    ]
    for i, device in enumerate(cuda["devices"]):
        capability = ".".join(map(str, device["capability"]))
        lines.append(f"cuda:{i:<11}{device['name']}, compute capability {capability}, {device['memory_gib']} GiB")
    lines += [f"cuda            none: {cuda['why_not']}"] if cuda["why_not"] else []
    lines += ["", *_native_library(found["library"]), ""]
    lines.append("backends (backend=..., or the environment variable FUSED_ADAPTIVE_BACKEND):")
    for name, reason in found["backends"].items():
        lines.append(f"  {name:<14}{'can run' if not reason else f'cannot run: {reason}'}")
    lines += [f'"auto" takes    {name} for parameters on {device}' for device, name in found["auto"].items()]
    if found["environment"]:
        lines += ["", "environment"]
        lines += [f"  {name:<14}{' ' if len(name) > 13 else ''}{value}" for name, value in found["environment"].items()]
    return "\n".join(wrapped for line in lines for wrapped in _wrap(line))


def _wrap(line: str) -> list[str]:
    """Reasons are sentences, and longer than a line: the rest stands below, in the column of the first."""
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False) or [
        ""
    ]


def _native_library(found: dict[str, Any]) -> list[str]:
    """What was built, for which architectures, and what was left out and why."""
    lines = [f"native library  {'not loaded: ' + found['why_not'] if found['why_not'] else 'loaded'}"]
    if found.get("cpu"):
        cuda = f", CUDA kernels for {found['cuda']}" if found.get("cuda") else ""
        lines.append(f"  built         CPU kernels{cuda}")
        lines.append(f"                with torch {found.get('torch')} on {found.get('platform')}")
        lines += [f"  left out      {part}: {why}" for part, why in found.get("left_out", {}).items()]
    return lines


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_gib": round(properties.total_memory / 2**30),
    }


def _chosen(device: str) -> str:
    try:
        return repr(backends.select("auto", [torch.device(device)]).name)
    except (ValueError, RuntimeError) as error:
        return f"nothing ({error})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is a CPU build; install one with CUDA to use a GPU"
    return "torch finds no GPU; check the driver with nvidia-smi"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_adaptive", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    as_json = parser.parse_args().json
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report itself says what is missing
        text = json.dumps(information(), indent=2) if as_json else report()
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))  # a path may have any character


if __name__ == "__main__":
    main()
