"""The optimizers that the papers compare, by backbone and policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

import fused_adaptive as fa

#: Of a plain backbone and of its forms that adapt.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "weight_decay": 5e-4},
    "AdamW": {"weight_decay": 1e-2},
    "RAdam": {},
    "AdaBelief": {},
}
#: What the authors' scripts pass: gains, not increments of the rate.
AUTHORS: dict[str, Any] = {"high": 2.0, "low": 0.5}
PLAIN, ACTIVE, GAINS = "plain", "active", "authors' gains"


def adaptive(backbone: str, policy: str, parameters: list[Tensor], lr: float, steps: int) -> Optimizer:
    """One of ours.

    Args:
        policy: plain; active, ActiveLR as it is by default; authors' gains, ActiveLR as its authors' scripts have it.
        steps: of an epoch, which is ActiveLR's interval.
    """
    made = {
        PLAIN: lambda: None,
        ACTIVE: lambda: fa.ActiveLR(interval=steps),
        GAINS: lambda: fa.ActiveLR(interval=steps, **AUTHORS),
    }[policy]()
    return getattr(fa, backbone)(parameters, lr=lr, policy=made, **ARGUMENTS[backbone])


def name(backbone: str, policy: str) -> str:
    if policy == PLAIN:
        return backbone
    return f"Active{backbone}" + ("" if policy == ACTIVE else f", {policy}")


TRAINED_BY: tuple[object, ...] = (adaptive, ARGUMENTS, AUTHORS)
