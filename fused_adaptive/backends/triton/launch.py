"""Steps over all plans, and AMP on the host or the device. ``plan.py`` has the launches of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...policies.base import ScalarPolicy
from .. import plans, reference
from .interpreter import is_interpreted
from .plan import TritonPlan, on_device

if TYPE_CHECKING:
    from ...core.random_rates import RandomRates
    from ...engine.participants import Participants


def step(
    participants: Participants, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: RandomRates | None
) -> None:
    on_host = found_inf is not None and found_inf.device.type == "cpu"
    if on_host and is_interpreted():  # in the interpreter, the CPU is the device
        on_host = not all(map(on_device, participants.views))
    if found_inf is not None and on_host and bool(found_inf):
        participants.check_gradients()
        return
    ready = plans.ready(participants, _plans, "Triton")
    if ready is None:
        reference.step(participants, found_inf, grad_scale, random_rates)
        return
    found_inf = None if on_host else found_inf
    table = None if random_rates is None else random_rates.table_on([plan.device for plan in ready])
    for plan in ready:
        participants.keep(plan.step(found_inf, grad_scale, table))
    if random_rates is not None:
        random_rates.count(found_inf)


def end_interval(participants: Participants) -> None:
    plans.end_interval(participants, _plans)


def _plans(participants: Participants, for_step: bool) -> list[TritonPlan] | None:
    """Returns one plan per device and location of counters.

    Returns None if tensors of several plans share a gain, or if a gain depends on inner products over several ranks.
    """
    if participants.plans is None:
        scalar = (views for policy, views in participants.members.items() if isinstance(policy, ScalarPolicy))
        if any(view.ranks is not None for views in scalar for view in views):
            return None
        views_of = plans.views_of_plans(participants, on_device)
        if views_of is None:
            return None
        participants.plans = [TritonPlan(views, participants, for_step) for views in views_of]
    return participants.plans
