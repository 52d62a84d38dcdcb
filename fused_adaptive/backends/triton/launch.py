"""A step: which plans, and what of AMP is decided where. The launches of a plan are in ``plan.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ...policies.base import ScalarPolicy
from .. import plans, reference
from . import is_interpreted
from .plan import Plan, on_device

if TYPE_CHECKING:
    from ...core.rate_noise import RateDraw
    from ...engine.views import Gathered


def step(gathered: Gathered, found_inf: Tensor | None, grad_scale: Tensor | None, draw: RateDraw | None) -> None:
    on_host = found_inf is not None and found_inf.device.type == "cpu"
    if on_host and is_interpreted():  # there, the CPU is the device
        on_host = not all(map(on_device, gathered.slots))
    if found_inf is not None and on_host and bool(found_inf):
        gathered.check_gradients()
        return
    ready = plans.ready(gathered, _plans, "Triton")
    if ready is None:
        reference.step(gathered, found_inf, grad_scale, draw)
        return
    found_inf = None if on_host else found_inf
    table = None if draw is None else draw.table_on([plan.device for plan in ready])
    for plan in ready:
        gathered.keep(plan.step(found_inf, grad_scale, table))
    if draw is not None:
        draw.count(found_inf)


def end_interval(gathered: Gathered) -> None:
    plans.end_interval(gathered, _plans)


def _plans(gathered: Gathered) -> list[Plan] | None:
    """One plan a device and place of the counters.

    None where a gain is shared by tensors of several plans, or follows inner products that are summed over ranks.
    """
    if gathered.compiled is None:
        scalar = (slots for policy, slots in gathered.members.items() if isinstance(policy, ScalarPolicy))
        if any(slot.ranks is not None for slots in scalar for slot in slots):
            return None
        slots_of = plans.parts(gathered, on_device)
        if slots_of is None:
            return None
        gathered.compiled = [Plan(slots, gathered) for slots in slots_of]
    return gathered.compiled
