"""Measurements of a step besides its time: launches, as the profiler counts them, state bytes, host time, threads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's messages about its own start and stop

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fused_adaptive.core import library


def count_launches(step: Callable[[], object], device: torch.device) -> int:
    """Counts the kernels, copies and fills of a step on a GPU; on a CPU the operators at the top level."""
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
    """Sums the time of native updates on a CPU. The rest of a step's time is host time.

    ``seconds`` is the sum so far; it changes only within :meth:`running`.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Returns a context in which the calls of the native operator that updates parameters are timed."""
        ops = torch.ops.fused_adaptive
        operator = getattr(ops, "plan_step", None)
        if operator is None:  # the native library is missing
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

#: Threads that pass a cache line to and fro in fewer seconds share a cache. On an AMD EPYC of the fifth generation it
#: takes 90 ns within a part of the processor (a core complex) and 380 ns or more between two.
NEAR = 200e-9
#: Threads that take more seconds wait for each other on one core.
ON_ONE_CORE = 2e-6


def placement_of_threads() -> str:
    """Returns where torch's first two threads on a CPU are now: ``"near"`` if they share a cache, ``"apart"`` if not.

    ``"on one core"`` if the system has given them one for more than some milliseconds; ``""`` with a single thread or
    without the native library.
    """
    if library.why_not() or torch.get_num_threads() == 1:
        return ""
    for _ in range(5):  # threads that have just been woken may share a core for a moment
        seconds = torch.ops.fused_adaptive.round_trip()
        if seconds < ON_ONE_CORE:
            return "near" if seconds < NEAR else "apart"
    return "on one core"


def _has_operator_above(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if "::" in parent.name:
            return True
        parent = parent.cpu_parent
    return False


def state_bytes(optimizer: Any, numel: int) -> float | None:
    """Returns the bytes of state per parameter; None if ``optimizer`` has no ``state`` attribute."""
    state = getattr(optimizer, "state", None)
    if state is None:
        return None
    tensors = [
        t for own in state.values() if isinstance(own, dict) for t in own.values() if isinstance(t, torch.Tensor)
    ]
    return round(sum(t.numel() * t.element_size() for t in tensors) / numel, 3)
