"""``lr_ref``, a param group's reference rate: the largest lr that it has had.

Whatever adds to a gain divides by it instead of by the momentary lr, so that a schedule multiplies the learning rate as
a whole, and increments do not explode where lr is almost 0: at the end of a cosine, at a restart, in a warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..core.plain import plain
from ..policies import from_plain

#: What schedulers leave in a group besides ``lr``: the rate that they start from or climb to.
SCHEDULED = ("lr", "initial_lr", "max_lr")


def meet(group: dict[str, Any]) -> None:
    """Starts ``lr_ref`` at lr where an adapting policy meets the group; drops it where no policy adapts any more.

    A tensor lr is read here, which on a GPU waits for the device.
    """
    if not any(policy.adapts for policy in from_plain(group["policy"])):
        group.pop("lr_ref", None)
    elif "lr_ref" not in group:
        group["lr_ref"] = float(group["lr"])


def follow(groups: Iterable[dict[str, Any]]) -> None:
    """Raises ``lr_ref`` to the largest rate that the groups have now, or are known to get. Never waits for a device."""
    for group in groups:
        if "lr_ref" in group:
            for name in SCHEDULED:
                rate = _number(group.get(name))
                if rate > group["lr_ref"]:
                    group["lr_ref"] = rate


def is_on_host(rate: Tensor) -> bool:
    """Whether reading the number waits for nothing."""
    return rate.device.type == "cpu" and rate.numel() == 1


def _number(rate: Any) -> float:
    """0 for what only a device knows, or is no rate."""
    if isinstance(rate, Tensor):
        rate = rate.item() if is_on_host(rate) else 0.0
    elif not isinstance(rate, (int, float)):
        rate = plain(rate)  # a schedule by hand may leave numpy's
    return float(rate) if isinstance(rate, (int, float)) and math.isfinite(rate) else 0.0
