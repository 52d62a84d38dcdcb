"""Reading and writing the learning rates of param groups, which may be floats or tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def read_lrs(groups: Iterable[dict[str, Any]]) -> list[float]:
    """Every group's lr as a float; waits for the device where it is a tensor there."""
    return [float(group["lr"]) for group in groups]


def write_lrs(groups: Iterable[dict[str, Any]], lrs: Sequence[float]) -> None:
    """Sets every group's lr. A tensor is filled in place: compiled and captured steps hold on to it."""
    for group, lr in zip(groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
