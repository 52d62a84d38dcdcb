"""What a step consists of: launches, as the profiler counts them, the state that it keeps, and what is the host's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
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


class UpdateClock:
    """Time spent in native updates on a CPU, where the host waits for them. What is left of a step is the host's own.

    ``seconds`` is the sum so far; it stands still outside of :meth:`running`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, our native steps are timed from the call of the operator that updates until it returns."""
        ops = torch.ops.fused_adaptive
        operator = getattr(ops, "plan_step", None)
        if operator is None:  # no native library
            yield
            return

        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = operator.default(*arguments)
            self.seconds += time.perf_counter() - begin
            return result

        setattr(ops, "plan_step", SimpleNamespace(default=timed))  # noqa: B010
        try:
            yield
        finally:
            setattr(ops, "plan_step", operator)  # noqa: B010


update_clock = UpdateClock()


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
