"""Checks of the tensors of a plan, since kernels only get their addresses."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...core.declarations import ROLES
from ...core.state import state_dtype
from ...core.view import ParamView
from .counts import COUNTERS


def check_state(
    bound: Mapping[str, Mapping[int, Tensor]],
    views: Sequence[ParamView],
    dense: Sequence[Tensor],
    parked: Container[int],
    counts_on_device: bool,
) -> None:
    """Checks shapes, dtypes, devices and overlaps of state.

    Args:
        bound: state by role and member, see plans.collect_state.
        views: views of the plan.
        dense: tensors that are updated.
        parked: members without memory.
        counts_on_device: whether counts are where the parameters are; else they are on the host.

    Raises:
        RuntimeError: for state that kernels cannot use.
    """
    ranges = []
    for role, own in bound.items():
        for i, t in own.items():
            p, index = dense[i], views[i].index
            shaped = t.shape == p.shape and (t.dim() or p.dim() == 0) and ROLES[role].shaped
            device = p.device if counts_on_device or role not in COUNTERS else torch.device("cpu")
            if not (shaped or (not ROLES[role].shaped and t.numel() == 1)) or t.dtype not in _dtypes(role, p):
                raise RuntimeError(f"the state {role!r} of parameter {index} has the wrong shape or dtype ({t.dtype})")
            if t.device != device:
                raise RuntimeError(
                    f"the state {role!r} of parameter {index} is on {t.device} and has to be on {device}: choose "
                    "capturable and fused at construction, before there is state"
                )
            if shaped:
                ranges.append((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()))
    updated = [p for i, p in enumerate(dense) if i not in parked]
    ranges += [(p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in updated]
    ranges = sorted(r for r in ranges if r[0] != r[1])
    if any(a[1] > b[0] for a, b in pairwise(ranges)):
        raise RuntimeError(
            "two of the optimizer's parameters or state tensors share memory: an update in place would write it "
            "twice; clone one of them"
        )


def _dtypes(role: str, param: Tensor) -> tuple[torch.dtype, ...]:
    declared = ROLES[role].dtype
    if declared == "step":
        return torch.float32, torch.float64
    return (state_dtype(param) if declared == "state" else getattr(torch, declared),)
