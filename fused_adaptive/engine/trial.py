"""Trial evaluation of the loss for the naive TrainableLR [TLR, Algorithm 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_gradients
from ..core.ranks import any_rank, local_part
from ..core.shards import whole_products
from ..core.view import applied, inner_product
from ..policies.base import Policy
from ..policies.trainable import TrainableLR

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..core.random_rates import RandomRates
    from .participants import Participants


def check_naive(policies: Sequence[tuple[Policy, ...]]) -> None:
    """Raises ValueError if a naive policy drives only some param groups. ``policies``: policies of each group."""
    if any(p.naive for group in policies for p in group) and len(set(policies)) > 1:
        raise ValueError(
            "TrainableLR(naive=True) evaluates the loss of the whole model at a trial point: all param groups must "
            "have that same policy"
        )


def trial_policy(
    policies: Iterable[Policy],
    param_groups: Sequence[dict[str, Any]],
    closure: Callable[[], Any] | None,
    process_group: ProcessGroup | None,
) -> TrainableLR | None:
    """Returns the policy whose trial this step needs, or None.

    A step in which nothing can move needs no trial: it only creates state.
    """
    naive = next((p for p in policies if isinstance(p, TrainableLR) and p.naive), None)
    if naive is None:
        return None
    check_gradients(param_groups)  # needs_trial() reads their values
    if not needs_trial(param_groups, process_group):
        return None
    if closure is None:
        raise RuntimeError(
            "TrainableLR(naive=True) evaluates the loss twice: pass step(closure) a function that clears the "
            "gradients, evaluates the loss, calls backward() and returns the loss"
        )
    return naive


def needs_trial(param_groups: Sequence[dict[str, Any]], process_group: ProcessGroup | None = None) -> bool:
    """Returns whether a parameter can move on any rank: it cannot if all lr, or all gradients, are 0."""
    moves = any(
        float(group["lr"]) != 0
        and any(p.grad is not None and bool((local_part(p.grad) != 0).any()) for p in group["params"])
        for group in param_groups
    )
    return any_rank(chain.from_iterable(group["params"] for group in param_groups), process_group, moves)


class Trial(NamedTuple):
    """A step before the second evaluation of the loss.

    Args:
        policy: policy of all tensors.
        participants: tensors that have state.
        found_inf, grad_scale: from AMP and clipping.
    """

    policy: TrainableLR
    participants: Participants
    found_inf: Tensor | None
    grad_scale: Tensor | None


def evaluate_trial(
    trial: Trial, params: Iterable[Tensor], closure: Callable[[], Any], random_rates: RandomRates | None
) -> None:
    """Computes ``γ ← max(0, γ + η·Σ lr·⟨g', g⟩/L²)`` with ``g'`` the gradients at ``p − α g``.

    Restores parameters and gradients bit for bit, also if the closure raises.

    Args:
        trial: the step.
        params: all parameters of the optimizer, since the trial may set gradients of some that had none.
        closure: evaluates the loss and its gradients.
        random_rates: the draws of ASLR, which are part of ``α``; None without ASLR.
    """
    policy, participants = trial.policy, trial.participants
    views = participants.members[policy]
    participants.localize_gradients()
    for view in views:
        view.grad_scale, view.rate_factor = trial.grad_scale, 1.0
    if random_rates is not None:
        random_rates.assign(views)
    moving = applied(views)
    values, grads = [view.param.clone() for view in moving], [view.grad() for view in moving]
    kept = [(p, p.grad) for p in params]
    products = []
    try:
        for view, grad in zip(moving, grads, strict=True):
            view.param.copy_(view.weight().add(grad, alpha=-view.lr * view.rate_factor * policy.gain(view.state)))
        for p, _ in kept:
            p.grad = None
        with torch.enable_grad():
            closure()
        participants.localize_gradients()
        for view, grad in zip(moving, grads, strict=True):
            products.append((inner_product(view.grad(), grad) if view.applies else 0.0,))
    finally:
        for view, value in zip(moving, values, strict=True):
            view.param.copy_(value)
        for p, grad in kept:
            p.grad = grad
    assert policy.eta is not None
    whole = zip(moving, whole_products(moving, products), strict=True)
    slope = sum(view.lr * view.rate_factor * product for view, (product,) in whole if view.has_rate)
    policy.ascend(views, policy.eta, slope)
