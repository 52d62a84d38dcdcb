"""Triton backend: steps for NVIDIA and AMD GPUs from one source, without a compiler at installation.

``math.py`` has the updates of backbones, ``kernels.py`` the update kernel, ``prepare.py`` the kernel that computes
scalars and flags of a step on the device, ``reduce.py`` the inner products, ``tables.py`` the tables on the device,
``plan.py`` the launches, and ``launch.py`` the step over all plans. Triton is imported in the first step.

With ``TRITON_INTERPRET=1`` in the environment, set before Triton is imported, kernels run on CPU tensors through
Triton's interpreter. This is slow and for tests only.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..plans import POLICIES
from .interpreter import is_interpreted

if TYPE_CHECKING:
    from ...core.random_rates import RandomRates
    from ...engine.participants import Participants

name = "triton"
policies = POLICIES

OLDEST = (3, 6)
INSTALL = "pip install 'triton>=3.6'"


def why_not(devices: Iterable[torch.device]) -> str:
    """Returns why this backend cannot run on these devices, and what to do; "" if it can. Does not import Triton."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return f"Triton is not installed: {INSTALL}"
    if tuple(map(int, re.findall(r"\d+", installed)[:2])) < OLDEST:
        return f"Triton 3.6 or later is needed, and {installed} is installed: {INSTALL}"
    for device in devices:
        reason = _why_not_interpreted(device) if is_interpreted() else _why_not_on(device)
        if reason:
            return reason
    return ""


def _why_not_interpreted(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    return (
        f"TRITON_INTERPRET is set, so Triton runs kernels on the CPU, where it cannot reach tensors on {device.type}: "
        "unset it"
    )


def _why_not_on(device: torch.device) -> str:
    if device.type == "cpu":
        return (
            "there are Triton kernels for GPUs, not for the CPU; with TRITON_INTERPRET=1 in the environment they run "
            "there through Triton's interpreter, slowly, for tests"
        )
    if device.type != "cuda":
        return f"there are Triton kernels for NVIDIA and AMD GPUs, not for {device.type}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton builds its launcher with a C compiler at the first step, and finds none: install gcc or set CC"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton's kernels need compute capability 8.0 or later"
    return ""


def step(
    participants: Participants, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: RandomRates | None
) -> None:
    """Takes one optimizer step in place. Arguments and errors are those of :func:`reference.step`.

    The host neither waits for the device nor reads from it. The first step of a process compiles its kernels, which
    takes seconds; Triton caches them on disk.

    Raises:
        RuntimeError: also during the capture of a CUDA graph, if counts are on the host or tables have to be built.
    """
    from . import launch

    launch.step(participants, found_inf, grad_scale, random_rates)


def end_interval(participants: Participants) -> None:
    """Ends the running interval of every policy, outside of a step."""
    from . import launch

    launch.end_interval(participants)
