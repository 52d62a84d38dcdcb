"""The trial evaluation of the naive TrainableLR [TLR, Algorithm 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import any_rank, local_part, whole_products
from ..slot import applied, inner_product
from .trainable import TrainableLR

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..gather import Gathered


class Trial(NamedTuple):
    """The policy that evaluates the loss once more before the update, and the step so far."""

    policy: TrainableLR
    gathered: Gathered
    is_new: bool
    found_inf: Tensor | None
    grad_scale: Tensor | None


def needs_trial(param_groups: Sequence[dict[str, Any]], process_group: ProcessGroup | None = None) -> bool:
    """False where no parameter can move on any rank: all lr are 0, or all gradients are."""
    moves = any(
        float(group["lr"]) != 0
        and any(p.grad is not None and bool((local_part(p.grad) != 0).any()) for p in group["params"])
        for group in param_groups
    )
    return any_rank(chain.from_iterable(group["params"] for group in param_groups), process_group, moves)


def evaluate_trial(
    policy: TrainableLR,
    gathered: Gathered,
    params: Iterable[Tensor],
    closure: Callable[[], Any],
    grad_scale: Tensor | None,
) -> None:
    """``γ ← max(0, γ + η·Σ lr·⟨g', g⟩/L²)`` with ``g'`` the gradients at ``p − α g``.

    Parameters and gradients are afterwards what they were, bit for bit, also when the closure raises.

    Args:
        policy: of all tensors.
        gathered: the tensors that have state.
        params: all parameters of the optimizer: the trial may give gradients to some that had none.
        closure: evaluates the loss and its gradients.
        grad_scale: what gradients are to be divided by (AMP), or None.
    """
    slots = gathered.members[policy]
    gathered.bring_gradients()
    for slot in slots:
        slot.grad_scale = grad_scale
    moving = applied(slots)
    values, grads = [slot.param.clone() for slot in moving], [slot.grad() for slot in moving]
    kept = [(p, p.grad) for p in params]
    products = []
    try:
        for slot, grad in zip(moving, grads, strict=True):
            slot.param.copy_(slot.weight().add(grad, alpha=-slot.lr * policy.gain(slot.state)))
        for p, _ in kept:
            p.grad = None
        with torch.enable_grad():
            closure()
        gathered.bring_gradients()
        for slot, grad in zip(moving, grads, strict=True):
            products.append((inner_product(slot.grad(), grad) if slot.applies else 0.0,))
    finally:
        for slot, value in zip(moving, values, strict=True):
            slot.param.copy_(value)
        for p, grad in kept:
            p.grad = grad
    assert policy.eta is not None
    whole = zip(moving, whole_products(moving, products), strict=True)
    policy.ascend(slots, policy.eta, sum(slot.lr * product for slot, (product,) in whole if slot.has_rate))
