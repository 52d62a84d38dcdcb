"""What a step does besides taking time: launches, as the profiler counts them, and the state that it keeps."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own beginning and end

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def count_launches(step: Callable[[], object], device: torch.device) -> int:
    """Kernels, copies and fills of a step on a GPU; on a CPU the operators that it calls, not what those call."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, acc_events=True) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events: list[Any] = list(profiler.events() or [])
    if device.type == "cuda":
        return sum(e.device_type == DeviceType.CUDA and not e.is_user_annotation for e in events)
    return sum("::" in e.name and not _has_operator_above(e) for e in events)


def _has_operator_above(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if "::" in parent.name:
            return True
        parent = parent.cpu_parent
    return False


def state_bytes(optimizer: Any, numel: int) -> float | None:
    """Bytes of state a parameter; None for what does not show its state as optimizers do."""
    state = getattr(optimizer, "state", None)
    if state is None:
        return None
    tensors = [
        t for own in state.values() if isinstance(own, dict) for t in own.values() if isinstance(t, torch.Tensor)
    ]
    return round(sum(t.numel() * t.element_size() for t in tensors) / numel, 3)
