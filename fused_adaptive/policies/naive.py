"""The trial evaluation of the naive TrainableLR [TLR, Algorithm 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..slot import Slot, applied, inner_product
from .base import ascend
from .trainable import TrainableLR


def needs_trial(param_groups: Sequence[dict[str, Any]]) -> bool:
    """False where no parameter can move: all lr are 0, or all gradients are."""
    return any(
        float(group["lr"]) != 0 and any(p.grad is not None and bool((p.grad != 0).any()) for p in group["params"])
        for group in param_groups
    )


def evaluate_trial(policy: TrainableLR, slots: Sequence[Slot], closure: Callable[[], Any]) -> None:
    """``γ ← max(0, γ + η·Σ ⟨g', g⟩/lr)`` with ``g'`` the gradients at ``p − α g``.

    Parameters and gradients are afterwards what they were, bit for bit, also when the closure raises.
    """
    moving = applied(slots)
    before = [(slot.param.clone(), slot.param.grad, slot.grad()) for slot in moving]
    slopes = []
    try:
        for slot, (_, _, grad) in zip(moving, before, strict=True):
            slot.param.add_(grad, alpha=-slot.lr * policy.gain(slot.state))
            slot.param.grad = None
        with torch.enable_grad():
            closure()
        for slot, (_, _, grad) in zip(moving, before, strict=True):
            if slot.param.grad is not None and slot.lr != 0:
                slopes.append(inner_product(slot.grad(), grad) / slot.lr)
    finally:
        for slot, (param, grad, _) in zip(moving, before, strict=True):
            slot.param.copy_(param)
            slot.param.grad = grad
    assert policy.eta is not None
    ascend(slots, policy.eta * sum(slopes))
