"""``lr_ref``, the reference rate of a param group: the largest lr that it has had.

Terms that are added to a gain are divided by it instead of by the present lr. So a schedule multiplies the learning
rate as a whole, and increments do not explode where lr is almost 0: at the end of a cosine, at a restart, in a warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..core.plain import plain
from ..policies import from_plain

#: Rates in a param group: ``lr``, and those that schedulers store, from which they start or to which they rise.
SCHEDULED = ("lr", "initial_lr", "max_lr")


def meet(group: dict[str, Any]) -> None:
    """Sets ``lr_ref`` to lr if a policy of the group adapts and there is none; removes it if no policy adapts.

    Reads lr: a tensor on a GPU makes the host wait.
    """
    if not any(policy.adapts for policy in from_plain(group["policy"])):
        group.pop("lr_ref", None)
    elif "lr_ref" not in group:
        group["lr_ref"] = float(group["lr"])


def follow(groups: Iterable[dict[str, Any]]) -> None:
    """Increases ``lr_ref`` to the largest rate that each group has or is known to get. Never waits for a device."""
    for group in groups:
        if "lr_ref" in group:
            for name in SCHEDULED:
                rate = _number(group.get(name))
                if rate > group["lr_ref"]:
                    group["lr_ref"] = rate


def is_on_host(rate: Tensor) -> bool:
    """Returns whether the number can be read without waiting for a device."""
    return rate.device.type == "cpu" and rate.numel() == 1


def _number(rate: Any) -> float:
    """Returns the rate as a float; 0 if it is on a device, or not a rate."""
    if isinstance(rate, Tensor):
        rate = rate.item() if is_on_host(rate) else 0.0
    elif not isinstance(rate, (int, float)):
        rate = plain(rate)  # a schedule written by hand may set a number of numpy
    return float(rate) if isinstance(rate, (int, float)) and math.isfinite(rate) else 0.0
