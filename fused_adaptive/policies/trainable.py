"""TrainableLR: a Newton step on the learning rate, from inner products of consecutive intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..core.backbone import Backbone, Group
from ..core.plain import plain_flag
from ..core.shards import whole_products
from ..core.state import COUNTER, ELEMENTS, GAIN, SUM, StateSpec
from ..core.view import ParamView, applied, inner_product
from .base import (
    REQUIRED,
    Policy,
    ScalarPolicy,
    check_bounds,
    check_granularity,
    check_interval,
    check_number,
    set_field,
)

SHRINK = 0.75
#: Fewer steps than so many times the memory of momentum, ``1/(1 − momentum)``, keep displacements aligned.
_MEMORIES = 2 - 1e-9


@dataclass(frozen=True)
class TrainableLR(ScalarPolicy):
    """Learning rates that take a Newton step on the loss along the last interval's direction.

    Source: "Trainable Learning Rate", ICLR 2022 submission, Algorithm 2, §4 and D.4. When an interval ends, with ``G``
    its mean gradient and ``G_prev`` that of the one before (0 at first)::

        num = ⟨G, G_prev⟩;   sq = ⟨G, G⟩;   den = max(4·(sq − num), num / c)
        γ ← γ · (1 + num / den)                          # Eq. 9; in (3/4, 1 + c]

    Args:
        interval: optimizer steps in an interval, the paper's default is a third of an epoch; None: only
            ``optimizer.end_interval()`` ends one.
        granularity: ``"global"`` (default; the paper's sgd_tlr), one gain for all tensors of all groups that have an
            equal policy, or ``"tensor"`` (sgd_tlr_pl), one for each.
        source: where ``G`` comes from. ``"displacement"`` (Eq. 10): what the parameters moved by, over ``γ·Σ lr``; it
            costs nothing between interval ends, 8 bytes a parameter in float32. ``"gradient"``: the mean of the
            gradients; 8 bytes. ``"preconditioned"`` (ours): ``num = ⟨G, U_prev⟩, sq = ⟨G, U⟩`` with ``U`` the mean
            direction; 12 bytes. With ``"gradient"`` the gain changes before the interval's last update, else after it.
            Default with SGD ``"displacement"`` if ``interval·(1 − momentum) >= 2``, with the largest momentum of the
            groups under the policy, or interval is None; else, and together with ActiveLR, ``"gradient"``: momentum
            carries one interval's direction into the next, and in shorter ones the gain runs away.
        c: the largest relative growth at one interval's end, > 0. Default 1/4; without meaning to ``eta``.
        gain_bounds: ``(lo, hi)`` with ``0 <= lo <= 1 <= hi``, relative to lr: the gain is clamped when it is adjusted.
            Default None. After a schedule's restart, which the Newton step has undone, ``hi`` limits the rate.
        eta: a fixed rate in place of the Newton step [D.4], with ``L`` the largest reference rate (``group["lr_ref"]``)
            of the groups under the gain: ``γ ← max(0, γ + eta·Σ lr·⟨ΣG, ΣG_prev⟩/L²)``.
        naive: Algorithm 1, every step, with a second evaluation of the loss: ``step(closure)``,
            ``γ ← max(0, γ + eta·Σ lr·⟨g', g⟩/L²)`` with ``g'`` at the trial point ``p − α g``. SGD without momentum and
            decay, ``eta`` required, no ``interval``. The closure runs twice, so random numbers and BatchNorm
            statistics advance twice. The parameters' gradients are left at ``g``.

    Inner products that are not finite shrink the gain and restart ``G_prev`` at 0. A tensor whose rates were all 0 in
    an interval takes no part in it. A gain that has come to 0 stays there, but for ``source="gradient"`` with ``eta``.
    At a tiny rate a displacement drowns in the rounding of the parameters.

    Raises:
        TypeError, ValueError: on any argument outside of the above; at the optimizer's construction where the policy
            cannot drive its backbone.
    """

    counter: ClassVar[str | None] = "tlr_step"

    interval: int | None = field(default=REQUIRED, kw_only=True)
    granularity: str = "global"
    source: str | None = None
    c: float = 0.25
    gain_bounds: tuple[float, float] | None = None
    eta: float | None = None
    naive: bool = False

    def __post_init__(self) -> None:
        set_field(self, "naive", bool(plain_flag("TrainableLR: naive", self.naive)))
        if self.naive:
            self._check_naive()
            set_field(self, "interval", None)
            set_field(self, "counter", None)  # it has no intervals: its trial evaluation is in naive.py
        set_field(self, "interval", check_interval("TrainableLR", self.interval))
        check_granularity("TrainableLR", self.granularity)
        if self.source not in (None, "displacement", "gradient", "preconditioned"):
            raise ValueError(
                "TrainableLR: source must be 'displacement', 'gradient', 'preconditioned' or None (the backbone's "
                f"default), got {self.source!r}"
            )
        set_field(self, "c", check_number("TrainableLR", "c", self.c, lambda x: x > 0, "finite and > 0"))
        set_field(self, "gain_bounds", check_bounds("TrainableLR", self.gain_bounds))
        if self.eta is not None:
            eta = check_number("TrainableLR", "eta", self.eta, lambda x: x >= 0, "finite and >= 0, or None")
            set_field(self, "eta", eta)
            if self.source == "preconditioned":
                raise ValueError("TrainableLR: eta goes with source 'displacement' or 'gradient', not 'preconditioned'")

    def _check_naive(self) -> None:
        if self.eta is None:
            raise ValueError("TrainableLR(naive=True) needs eta=, the rate of the learning rate (Algorithm 1's η)")
        if self.interval not in (REQUIRED, None):
            raise ValueError("TrainableLR(naive=True) adapts at every step: leave interval= out")
        if self.granularity != "global" or self.source is not None:
            raise ValueError(
                "TrainableLR(naive=True) is global and evaluates its own gradients: leave granularity= and source= out"
            )

    def resolve(self, backbone: Backbone, groups: Sequence[Group]) -> TrainableLR:
        if self.naive or self.source is not None:
            return self
        displaces = not backbone.adaptive and self._outlasts_momentum(groups)
        return self.with_source("displacement" if displaces else "gradient")

    def with_source(self, source: str) -> TrainableLR:
        """The same policy with another ``source``."""
        return replace(self, source=source)

    def advice(self, backbone: Backbone, groups: Sequence[Group]) -> str:
        if self.source != "displacement" or backbone.adaptive or self._outlasts_momentum(groups):
            return ""
        momentum = max(float(group["momentum"]) for group in groups)
        enough = f"an interval of at least {math.ceil(_MEMORIES / (1 - momentum))} steps, or " if momentum < 1 else ""
        return (
            f"TrainableLR(source='displacement') with interval={self.interval} and momentum={momentum:g}: momentum "
            "carries one interval's direction into the next, so displacements stay aligned whatever the rate, and the "
            f"gain can run away; use {enough}source='gradient'"
        )

    def _outlasts_momentum(self, groups: Sequence[Group]) -> bool:
        """Whether an interval is so long that its displacement is its own."""
        if self.interval is None:
            return True
        return self.interval * (1 - max(float(group["momentum"]) for group in groups)) >= _MEMORIES

    def check(self, backbone: Backbone, group: Group) -> None:
        if self.source == "displacement" and backbone.adaptive:
            raise ValueError(
                f"TrainableLR(source='displacement') cannot drive {backbone.name}: the directions of an adaptive "
                "backbone stay aligned whatever the rate, so the gain would run away; use source='gradient' or "
                "'preconditioned'"
            )
        if self.naive and (backbone.adaptive or group["momentum"] != 0 or float(group["weight_decay"]) != 0):
            raise ValueError(
                "TrainableLR(naive=True) is defined for SGD with momentum=0 and weight_decay=0 only; use "
                "TrainableLR(interval=…) with this optimizer"
            )

    def state_spec(self, backbone: Backbone, group: Group) -> dict[str, StateSpec]:
        spec = {"gain": GAIN}
        if self.naive:
            return spec
        spec |= {"lr_sum": SUM, "tlr_step": COUNTER, "tlr_applied": COUNTER, "tlr_applied_prev": COUNTER}
        if self.eta is not None:
            spec |= {"lr_last": SUM}
        if self.source != "gradient":
            spec |= {"interval_start": StateSpec(fill="parameter"), "direction_prev": ELEMENTS}
        if self.source != "displacement":
            spec |= {"grad_mean_sum": ELEMENTS}
        if self.source == "gradient":
            spec |= {"grad_mean_prev": ELEMENTS}
        return spec

    def continues(self, earlier: Policy) -> bool:
        return isinstance(earlier, TrainableLR) and _measures(self) == _measures(earlier)

    def before_update(self, views: Sequence[ParamView], ending: bool) -> None:
        if self.naive:
            return
        for view in applied(views):
            view.state["tlr_applied"] += 1
            view.state["lr_sum"] += view.lr * view.rate_factor
            if self.source != "displacement":
                view.state["grad_mean_sum"] += view.grad()
        if self.eta is not None:
            for view in views:
                view.state["lr_last"].fill_(view.lr)
        if ending and self.source == "gradient":
            self._adapt(views)

    def after_update(self, views: Sequence[ParamView], ending: bool) -> None:
        if self.naive:
            return
        super().after_update(views, ending)
        if ending:
            if self.source != "gradient":
                self._adapt(views)
            self._begin(views)

    def end_interval(self, views: Sequence[ParamView]) -> None:
        if not self.naive:
            self._adapt(views)
            self._begin(views)

    def _begin(self, views: Sequence[ParamView]) -> None:
        for view in views:
            for name in ("tlr_step", "tlr_applied", "lr_sum", "grad_mean_sum"):
                if name in view.state:
                    view.state[name].zero_()
            if "interval_start" in view.state:
                view.state["interval_start"].copy_(view.weight())

    def _adapt(self, views: Sequence[ParamView]) -> None:
        tensors = [view for view in views if self._is_measurable(view)]
        products = whole_products(tensors, [self._measure(view) for view in tensors])
        products_of = {id(view): (num, sq) for view, (num, sq) in zip(tensors, products, strict=True)}
        for unit in self.units(views):
            measured = [view for view in unit if id(view) in products_of]
            if not measured:
                continue
            if self.eta is not None:
                self.ascend(unit, self.eta, sum(self._slope(view, *products_of[id(view)]) for view in measured))
                continue
            num, sq = (sum(column) for column in zip(*(products_of[id(view)] for view in measured), strict=True))
            for view in unit:
                view.state["gain"].mul_(newton_factor(num, sq, self.c))
            self.clamp(unit)
            if not (math.isfinite(num) and math.isfinite(sq)):
                for view in measured:
                    self._previous(view).zero_()

    def _is_measurable(self, view: ParamView) -> bool:
        """Whether it could move in the interval; by measured directions, also by its gain."""
        could_move = view.state["lr_sum"] != 0
        return bool(could_move if self.source == "gradient" else could_move and view.state["gain"] != 0)

    def _previous(self, view: ParamView):
        return view.state["grad_mean_prev" if self.source == "gradient" else "direction_prev"]

    def _measure(self, view: ParamView) -> tuple[float, float]:
        """``num`` and ``sq`` of one tensor, or of a part of it, whose running interval becomes the previous one."""
        state = view.state
        if self.source == "gradient":
            mean = direction = state["grad_mean_sum"] / state["tlr_applied"].item()
        else:
            moved = state["interval_start"] - view.weight()
            direction = moved / (state["gain"] * state["lr_sum"]).item()
            mean = direction
        if self.source == "preconditioned":
            mean = state["grad_mean_sum"] / state["tlr_applied"].item()
        num, sq = inner_product(mean, self._previous(view)), inner_product(mean, direction)
        self._previous(view).copy_(direction)
        return num, sq

    def _slope(self, view: ParamView, num: float, sq: float) -> float:
        """``lr·⟨ΣG, ΣG_prev⟩`` of one tensor [D.4]."""
        state = view.state
        steps = state["tlr_applied"].item() * state["tlr_applied_prev"].item()
        if not (math.isfinite(num) and math.isfinite(sq)):
            self._previous(view).zero_()
        state["tlr_applied_prev"].copy_(state["tlr_applied"])
        return state["lr_last"].item() * (num * steps)


def _measures(policy: TrainableLR) -> tuple[Any, ...]:
    return type(policy), policy.source, policy.naive, policy.eta is not None


def newton_factor(num: float, sq: float, c: float) -> float:
    """``1 + num/den`` of Eq. 9, within [3/4, 1 + c]; 3/4 where they are not finite or the curvature is negative."""
    if not (math.isfinite(num) and math.isfinite(sq)):
        return SHRINK
    if num == 0:
        return 1.0
    den = max(4 * (sq - num), num / c)
    return SHRINK if den <= 0 else min(max(1 + num / den, SHRINK), 1 + c)
