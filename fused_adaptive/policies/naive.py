"""The trial evaluation of the naive TrainableLR [TLR, Algorithm 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..slot import Slot, applied, inner_product
from .base import ascend
from .trainable import TrainableLR


def needs_trial(param_groups: Sequence[dict[str, Any]]) -> bool:
    """False where no parameter can move: all lr are 0, or all gradients are."""
    return any(
        float(group["lr"]) != 0 and any(p.grad is not None and bool((p.grad != 0).any()) for p in group["params"])
        for group in param_groups
    )


def evaluate_trial(
    policy: TrainableLR,
    slots: Sequence[Slot],
    params: Iterable[Tensor],
    closure: Callable[[], Any],
    grad_scale: Tensor | None,
) -> None:
    """``γ ← max(0, γ + η·Σ ⟨g', g⟩/lr)`` with ``g'`` the gradients at ``p − α g``.

    Parameters and gradients are afterwards what they were, bit for bit, also when the closure raises.

    Args:
        policy: of all tensors.
        slots: the tensors that have state.
        params: all parameters of the optimizer: the trial may give gradients to some that had none.
        closure: evaluates the loss and its gradients.
        grad_scale: what gradients are to be divided by (AMP), or None.
    """
    for slot in slots:
        slot.grad_scale = grad_scale
    moving = applied(slots)
    values, grads = [slot.param.clone() for slot in moving], [slot.grad() for slot in moving]
    kept = [(p, p.grad) for p in params]
    slopes = []
    try:
        for slot, grad in zip(moving, grads, strict=True):
            slot.param.copy_(slot.weight().add(grad, alpha=-slot.lr * policy.gain(slot.state)))
        for p, _ in kept:
            p.grad = None
        with torch.enable_grad():
            closure()
        for slot, grad in zip(moving, grads, strict=True):
            if slot.param.grad is not None and slot.lr != 0:
                slopes.append(inner_product(slot.grad(), grad) / slot.lr)
    finally:
        for slot, value in zip(moving, values, strict=True):
            slot.param.copy_(value)
        for p, grad in kept:
            p.grad = grad
    assert policy.eta is not None
    ascend(slots, policy.eta * sum(slopes))
