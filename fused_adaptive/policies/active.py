"""ActiveLR: a gain for each element, from the signs of cumulative gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..backbones import Backbone, Group
from ..slot import Slot, applied
from ..state import COUNTER, ELEMENTS, State, StateSpec
from .base import REQUIRED, Policy, check_interval, check_number, set_field

#: ``grad_sign_prev`` of an element that has seen no whole interval; not sign 0, which is a sign that shrinks.
NONE_YET = 2


@dataclass(frozen=True)
class ActiveLR(Policy):
    """Learning rates that grow where the cumulative gradient keeps its sign, and shrink where it does not.

    Source: Wadi, Fredette, Senecal, "Read the Signs", Algorithm 1. Each element sums its gradients over an interval,
    ``c ← c + g``; when the interval ends, after that step's update::

        γ ← γ + high   if sign(c) · sign(c_prev) > 0,   else γ · low

    Args:
        interval: optimizer steps in an interval (the paper's epoch); None: only ``optimizer.end_interval()`` ends one.
        high: what a gain grows by, dimensionless, >= 0. Default 0.1; the paper recommends ``high + low = 1``.
        low: what a gain shrinks by, in (0, 1]. Default 0.9.
        first_interval: ``"hold"`` (default) leaves the gains at the end of the first interval, which has none before
            it; ``"shrink"`` is the paper's Algorithm 1 to the letter.
        gain_bounds: ``(lo, hi)`` with ``0 <= lo <= 1 <= hi``: gains are clamped when they are adjusted. Default None.

    State: 9 bytes a parameter in float32 (gain 4, sum 4, sign 1). Wherever ``c`` is not finite the gain shrinks and
    the sum starts anew.

    Raises:
        TypeError, ValueError: on any argument outside of the above.
    """

    elementwise: ClassVar[bool] = True
    counter: ClassVar[str | None] = "active_step"

    interval: int | None = field(default=REQUIRED, kw_only=True)
    high: float = 0.1
    low: float = 0.9
    first_interval: str = "hold"
    gain_bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        high = check_number("ActiveLR", "high", self.high, lambda x: x >= 0, "finite and >= 0 (it is added to a gain)")
        low = check_number("ActiveLR", "low", self.low, lambda x: 0 < x <= 1, "in (0, 1] (a gain is multiplied by it)")
        set_field(self, "interval", check_interval("ActiveLR", self.interval))
        set_field(self, "high", high)
        set_field(self, "low", low)
        if self.first_interval not in ("hold", "shrink"):
            raise ValueError(f"ActiveLR: first_interval must be 'hold' or 'shrink', got {self.first_interval!r}")
        if self.gain_bounds is not None:
            set_field(self, "gain_bounds", _check_bounds(self.gain_bounds))

    def arguments(self) -> dict[str, Any]:
        arguments = super().arguments()
        low, high = arguments.pop("gain_bounds") or (None, None)
        return arguments | {"gain_min": low, "gain_max": high}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> ActiveLR:
        arguments = dict(arguments)
        bounds = (arguments.pop("gain_min", None), arguments.pop("gain_max", None))
        if bounds != (None, None):
            arguments["gain_bounds"] = bounds
        return cls(**arguments)

    def state_spec(self, backbone: Backbone, group: Group) -> dict[str, StateSpec]:
        return {
            "element_gain": StateSpec(fill=1.0),
            "grad_sum": ELEMENTS,
            "grad_sign_prev": StateSpec(dtype=torch.int8, fill=NONE_YET),
            "active_step": COUNTER,
            "active_applied": COUNTER,
        }

    def gain(self, state: State) -> Tensor:
        return state["element_gain"]

    def after_update(self, slots: Sequence[Slot], ending: bool) -> None:
        super().after_update(slots, ending)
        for slot in applied(slots):
            slot.state["grad_sum"] += slot.grad()
            slot.state["active_applied"] += 1
        if ending:
            self.end_interval(slots)

    def end_interval(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.state["active_applied"] > 0:
                self._adjust(slot.state)
            slot.state["active_step"].zero_()
            slot.state["active_applied"].zero_()

    def _adjust(self, state: State) -> None:
        gain, total, sign_prev = state["element_gain"], state["grad_sum"], state["grad_sign_prev"]
        finite = total.isfinite()
        # Signs are compared, never the product of two sums, which underflows.
        sign = torch.where(finite, total.sign(), 0).to(torch.int8)
        agree = sign * sign_prev == 1
        adjusted = torch.where(agree, gain + self.high, gain * self.low)
        if self.gain_bounds is not None:
            adjusted.clamp_(*self.gain_bounds)
        if self.first_interval == "hold":
            adjusted = torch.where(finite & (sign_prev == NONE_YET), gain, adjusted)
        gain.copy_(adjusted)
        sign_prev.copy_(sign)
        total.zero_()


def _check_bounds(bounds: Any) -> tuple[float, float]:
    try:
        lo, hi = map(float, bounds)
    except (TypeError, ValueError):
        raise TypeError(f"ActiveLR: gain_bounds must be a pair (lo, hi) or None, got {bounds!r}") from None
    if not 0 <= lo <= 1 <= hi:
        raise ValueError(f"ActiveLR: gain_bounds must be (lo, hi) with 0 <= lo <= 1 <= hi, got {(lo, hi)}")
    return lo, hi
