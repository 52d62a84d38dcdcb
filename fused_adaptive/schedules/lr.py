"""Functions that read and write the learning rates of param groups, which may be floats or tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def read_lrs(groups: Iterable[dict[str, Any]]) -> list[float]:
    """Returns every group's lr as a float. Waits for the device if an lr is a tensor there."""
    return [float(group["lr"]) for group in groups]


def write_lrs(groups: Iterable[dict[str, Any]], lrs: Sequence[float]) -> None:
    """Sets every group's lr. Fills a tensor in place, since compiled and captured steps hold references to it."""
    for group, lr in zip(groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
