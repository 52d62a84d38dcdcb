"""ActiveLR: one gain per element, from the signs of cumulative gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..core.backbone import Backbone, Group
from ..core.state import COUNTER, ELEMENTS, State, StateSpec
from ..core.view import ParamView, applied
from .base import REQUIRED, Policy, check_bounds, check_interval, check_number, set_field

#: Default of ``high`` in a tuple with TrainableLR, which sets the scale of the rate.
HIGH_IN_TUPLE = 0.1
#: Default of ``low`` if ``increment`` or ``high`` is given: the paper's value.
LOW = 0.9
#: Advice is given if rates need more intervals than these to come down from lr.
MANY_INTERVALS = 40


@dataclass(frozen=True)
class ActiveLR(Policy):
    """Learning rates that grow where the cumulative gradient keeps its sign, and shrink where its sign changes.

    Source: Wadi, Fredette, Senecal, "Read the Signs", Algorithm 1. Each element sums its gradients over an interval,
    ``c ← c + g``. At the end of an interval, after the update of its last step, with ``s = sign(c)·sign(c_prev)``::

        γ ← γ + high   if s > 0          # high = increment / lr_ref, or given
        γ ← γ · low    if s < 0
        see on_zero    if s = 0

    With ``increment=a`` the learning rate itself grows by ``a``, whatever the initial rate is, so the result does not
    depend on the initial rate. If signs agree half of the time, the rate is about ``a / (1 − low)``. If lr is meant as
    a limit (fine-tuning), pass ``high=0.1`` or a smaller increment: with ``high + low = 1`` a rate stays near lr.

    Args:
        interval: number of optimizer steps in an interval (the paper's epoch); None: only ``optimizer.end_interval()``
            ends an interval.
        increment: amount by which a learning rate grows, absolute, >= 0. Default: 0.01 with SGD, 1e-4 with the adaptive
            backbones, by experiment (the paper prints 0.1, with which SGD with momentum trains badly:
            ``docs/policies/active.md``); none in a tuple with TrainableLR.
        high: amount by which a gain grows instead, relative to lr, >= 0. Default None; 0.1 in a tuple with TrainableLR.
        low: factor by which a gain shrinks, in (0, 1]. Default 0.9; 0.5 with SGD's default increment.
        on_zero: ``"hold"`` (default) keeps the gain where signs cannot be compared: at the end of the first interval,
            and where a sum is exactly 0 (a row of an embedding that was not looked up). ``"shrink"`` follows the
            paper's Algorithm 1 literally.
        gain_bounds: ``(lo, hi)`` with ``0 <= lo <= 1 <= hi``, relative to lr: gains are clamped when they are adjusted.
            Default None.

    State: 9 bytes per element in float32 (gain 4, sum 4, sign 1). Where ``c`` is not finite, the gain shrinks and the
    sum restarts. If lr was 0 at the last step of an interval, gains and signs do not change, since nothing has moved.

    Raises:
        TypeError, ValueError: for any argument outside of the above, or ``increment`` together with ``high``.
    """

    elementwise: ClassVar[bool] = True
    counter: ClassVar[str | None] = "active_step"

    interval: int | None = field(default=REQUIRED, kw_only=True)
    increment: float | None = None
    high: float | None = None
    low: float | None = None
    on_zero: str = "hold"
    gain_bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.increment is not None and self.high is not None:
            raise ValueError(
                f"ActiveLR: increment={self.increment!r} (of the learning rate) and high={self.high!r} (of the gain) "
                "exclude each other: pass one of them"
            )
        for name, what in (("increment", "a learning rate"), ("high", "a gain")):
            if getattr(self, name) is not None:
                condition = f"finite and >= 0 (it is added to {what}), or None"
                set_field(self, name, check_number("ActiveLR", name, getattr(self, name), lambda x: x >= 0, condition))
        if self.low is not None:
            condition = "in (0, 1] (a gain is multiplied by it)"
            set_field(self, "low", check_number("ActiveLR", "low", self.low, lambda x: 0 < x <= 1, condition))
        elif not self._has_default_growth:
            set_field(self, "low", LOW)
        set_field(self, "interval", check_interval("ActiveLR", self.interval))
        if self.on_zero not in ("hold", "shrink"):
            raise ValueError(f"ActiveLR: on_zero must be 'hold' or 'shrink', got {self.on_zero!r}")
        set_field(self, "gain_bounds", check_bounds("ActiveLR", self.gain_bounds))

    def resolve(self, backbone: Backbone, groups: Sequence[Group]) -> ActiveLR:
        if not self._has_default_growth:
            return self
        return replace(self, increment=backbone.increment, low=backbone.low if self.low is None else self.low)

    def beside_a_scalar_policy(self) -> ActiveLR:
        """Returns the policy with its defaults in a tuple, where the scalar policy sets the scale of the rate."""
        return replace(self, high=HIGH_IN_TUPLE) if self._has_default_growth else self

    def advice(self, backbone: Backbone, groups: Sequence[Group]) -> str:
        # A group with lr 0 is frozen or starts a warm-up: it has no rate yet to compare with.
        lrs = [lr for group in groups if (lr := float(group["lr"])) > 0]
        if not self._has_default_growth or not lrs:
            return ""
        lr, low = min(lrs), backbone.low if self.low is None else self.low
        limit = backbone.increment / (1 - low) if low < 1 else math.inf
        falls = math.log(max(lrs) / limit) / -math.log(low) if low > 0 and limit < max(lrs) else 0
        if falls > MANY_INTERVALS:
            return (
                f"ActiveLR: lr={max(lrs):g} is only a start, and a high one: rates fall by low={low:g} an interval at "
                f"most, so it takes {falls:.0f} intervals to come down to increment/(1 - low) = {limit:g}. Begin lower"
            )
        if backbone.increment <= 2 * lr:
            return ""
        return (
            f"ActiveLR: lr={lr:g} is only a start, since the default increment={backbone.increment:g} is more than "
            f"twice that: rates can reach about increment/(1 - low) = {limit:g}. To stay near lr (fine-tuning) pass "
            "high=0.1, or a smaller increment"
        )

    @property
    def _has_default_growth(self) -> bool:
        """Whether neither ``increment`` nor ``high`` is given."""
        return self.increment is None and self.high is None

    def state_spec(self, backbone: Backbone, group: Group) -> dict[str, StateSpec]:
        return {
            "element_gain": StateSpec(fill=1.0),
            "grad_sum": ELEMENTS,
            "grad_sign_prev": StateSpec(dtype=torch.int8),
            "active_step": COUNTER,
            "active_applied": COUNTER,
        }

    def gain(self, state: State) -> Tensor:
        return state["element_gain"]

    def after_update(self, views: Sequence[ParamView], ending: bool) -> None:
        super().after_update(views, ending)
        for view in applied(views):
            view.state["grad_sum"] += view.grad()
            # The sign stores for end_interval() whether lr was 0 at the last step, when nothing moved.
            count = view.state["active_applied"].abs_().add_(1)
            if not view.has_rate:
                count.neg_()
        if ending:
            self.end_interval(views)

    def end_interval(self, views: Sequence[ParamView]) -> None:
        for view in views:
            if view.state["active_applied"] > 0:
                self._adjust(view)
            elif view.state["active_applied"] < 0:
                view.state["grad_sum"].zero_()
            view.state["active_step"].zero_()
            view.state["active_applied"].zero_()

    def _adjust(self, view: ParamView) -> None:
        assert self.low is not None
        gain, total, sign_prev = (view.state[name] for name in ("element_gain", "grad_sum", "grad_sign_prev"))
        high = self.high if self.increment is None else self.increment / view.lr_ref
        finite = total.isfinite()
        # The product of signs, since the product of two sums can underflow.
        sign = torch.where(finite, total.sign(), 0).to(torch.int8)
        product = sign * sign_prev
        adjusted = torch.where(product > 0, gain + high, gain * self.low)
        if self.gain_bounds is not None:
            adjusted.clamp_(*self.gain_bounds)
        if self.on_zero == "hold":
            adjusted = torch.where(finite & (product == 0), gain, adjusted)
            sign = torch.where(finite & (sign == 0), sign_prev, sign)
        gain.copy_(adjusted)
        sign_prev.copy_(sign)
        total.zero_()
