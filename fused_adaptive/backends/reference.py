"""The reference backend: every algorithm in plain PyTorch, on any device.

It is written for readability: it documents what a step does, and the tests compare every kernel with it. It reads
scalars on the host, so on a GPU it synchronizes and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core import masters
from ..core.view import ParamView, applied, numbers_of
from ..engine.memory import check_memory

if TYPE_CHECKING:
    from ..core.random_rates import RandomRates
    from ..engine.participants import Participants

name = "reference"
supports_masters = True


def why_not(devices: Iterable[torch.device]) -> str:
    """Returns "": this backend runs on all devices."""
    return ""


def step(
    participants: Participants, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: RandomRates | None
) -> None:
    """Performs one optimizer step in place.

    Args:
        participants: the views of all parameters that have state, those without a gradient included, and the views of
            each policy.
        found_inf: nonzero if a gradient is not finite (AMP), or None. If nonzero, nothing changes.
        grad_scale: the number to divide gradients by (AMP), or None.
        random_rates: ASLR's random factors of the rates in this step, or None.

    Raises:
        RuntimeError: for a gradient that cannot be used, and while a CUDA graph is being captured. Nothing has changed
            then.
        TypeError, ValueError: for a hyperparameter that is not a number. Nothing has changed then.
    """
    participants.check_gradients()
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the reference backend reads scalars on the host and cannot be captured in a CUDA graph: call step() "
            "outside of the capture, or choose another backend"
        )
    if found_inf is not None and bool(found_inf):
        return
    check_memory(participants.views)
    participants.follow_data()
    for group in participants.groups:
        numbers_of(group)
    for view in participants.views:  # views are kept between steps; these two attributes are of this step only
        view.grad_scale, view.rate_factor = grad_scale, 1.0
    if random_rates is not None:
        random_rates.assign(participants.views)
        random_rates.count(None)
    policies = participants.members
    ending = {policy: policy.ends(members) for policy, members in policies.items()}
    for policy, members in policies.items():
        policy.before_update(members, ending[policy])
    for view in applied(participants.views):
        update(view)
    for policy, members in policies.items():
        policy.after_update(members, ending[policy])


def end_interval(participants: Participants) -> None:
    """Ends the running interval of every policy, outside of a step."""
    check_memory(participants.views)
    for policy, members in participants.members.items():
        policy.end_interval(members)


def update(view: ParamView) -> None:
    """Updates one parameter: decay, then ``p ← p − α·u``."""
    # bfloat16 and float16 parameters are decayed and updated in float32 and rounded once.
    p = view.weight()
    grad = view.coupled_grad(p)

    alpha, element_gain = view.lr * view.rate_factor, None
    for policy in view.policies:
        if policy.elementwise:
            element_gain = policy.gain(view.state)
        else:
            alpha = alpha * policy.gain(view.state)

    weight_decay = float(view.group["weight_decay"]) if view.group["decoupled_weight_decay"] else 0.0
    adapts = any(policy.adapts for policy in view.policies)
    direction = view.backbone.update(grad, view.state, view.group)
    for policy in view.policies:
        policy.observe(view, direction)

    if element_gain is None:
        if weight_decay != 0 and not adapts:
            p.mul_(1 - alpha * weight_decay)  # as in torch, which does not clamp
        elif weight_decay != 0:
            # p · max(0, 1 − α·wd), without the half ulp of error from rounding the factor to float32
            p.sub_(p, alpha=min(1.0, alpha * weight_decay))
        direction.descend_(p, alpha)
    else:
        alpha = element_gain * alpha
        if weight_decay != 0:
            p.sub_(p * (alpha * weight_decay).clamp_(max=1))
        p.sub_(alpha * direction.tensor())
    masters.write(p, view.param, view.state, view.group, view.index)
