"""A step: which plans, and what of AMP is decided where. The launches of a plan are in ``plan.py``."""

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
    if on_host and is_interpreted():  # there, the CPU is the device
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


def _plans(participants: Participants) -> list[TritonPlan] | None:
    """One plan a device and place of the counters.

    None where a gain is shared by tensors of several plans, or follows inner products that are summed over ranks.
    """
    if participants.plans is None:
        scalar = (views for policy, views in participants.members.items() if isinstance(policy, ScalarPolicy))
        if any(view.ranks is not None for views in scalar for view in views):
            return None
        views_of = plans.views_of_plans(participants, on_device)
        if views_of is None:
            return None
        participants.plans = [TritonPlan(views, participants) for views in views_of]
    return participants.plans
