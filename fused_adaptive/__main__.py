"""``python -m fused_adaptive``: what this machine has, which backends can run, and what to do about the others."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import backends
from .core import library
from .core.version import __version__


def report() -> str:
    """The environment as text: versions, devices, backends with reasons, and which one "auto" takes where."""
    lines = [
        f"fused_adaptive  {__version__}",
        f"python          {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch           {torch.__version__}  (CUDA {torch.version.cuda or 'not in this build'})",
        f"triton          {_version('triton')}",
        f"numpy           {_version('numpy')}",
        "",
        f"cpu             {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}          {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        lines.append(f"cuda            none: {_why_no_cuda()}")
    lines += ["", *_native_library(), "", "backends (backend=…, or the environment variable FUSED_ADAPTIVE_BACKEND):"]
    for name, reason in backends.available().items():
        lines.append(f"  {name:<14}{'can run' if not reason else f'cannot run: {reason}'}")
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        lines.append(f'"auto" takes    {_chosen(device)} for parameters on {device}')
    return "\n".join(lines)


def _native_library() -> list[str]:
    """What was built, for which architectures, and what was left out and why."""
    built, reason = library.built(), library.why_not()
    lines = [f"native library  {f'not loaded: {reason}' if reason else 'loaded'}"]
    if built.get("cpu"):
        lines.append(f"  built         CPU kernels{', CUDA kernels for ' + built['cuda'] if built.get('cuda') else ''}")
        lines.append(f"                with torch {built.get('torch')} on {built.get('platform')}")
        lines += [f"  left out      {part}: {why}" for part, why in built.get("left_out", {}).items()]
    return lines


def _chosen(device: str) -> str:
    try:
        return repr(backends.select("auto", [torch.device(device)]).name)
    except (ValueError, RuntimeError) as error:
        return f"nothing ({error})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is a CPU build; install one with CUDA to use a GPU"
    return "torch finds no GPU; check the driver with nvidia-smi"


if __name__ == "__main__":
    print(report())
