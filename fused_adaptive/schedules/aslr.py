"""ASLR: a search on a decimal grid of learning rates, with a random rate around it for each tensor and step."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_UP, Context, Decimal, InvalidOperation
from typing import Any

from torch.optim import Optimizer

from ..core.plain import plain_flag, plain_int, plain_number
from ..core.random_rates import RandomRates
from ..core.warning import warn
from ..optimizers.base import AdaptiveOptimizer
from .controller import Controller
from .random_group_rates import RandomGroupRates

#: Used in place of the thread's decimal context, which the user may have changed.
_EXACT = Context(prec=28)


class ASLR(Controller):
    """Adaptive Scheduler for Learning Rate: searches around the rate whenever the validation cost stops improving.

    Source: Khodamoradi, Denolf, Vissers, Kastner, "ASLR: an Adaptive Scheduler for Learning Rate", Algorithm 1 and
    Eq. 10. With ``s = 10^⌊log10 c⌋``, once an epoch::

        cost > best or not finite:  c ← c + dir·s (0.9·c where that is 0)
                                    after `range` such moves: range += 1, dir = −dir
        else:                       best ← cost;  dir = range = 1

    The center moves on a decimal grid of one significant digit in exact arithmetic: 0.3 − 0.1 is 0.2. In every step
    each tensor's rate is drawn from ``U(c − s/2, c + s/2)`` by a counter-based generator, with the same result on every
    rank and backend and after a resume. For an optimizer of another package, one rate per param group is drawn
    instead, and ``param_group["lr"]`` holds it during the step; groups that share one lr tensor share a draw. The draws
    end with ``remove()``, and with another controller.

    Args:
        optimizer: any ``torch.optim`` optimizer. Its first group's lr, rounded half up to one significant digit, is the
            first center; the other groups keep their ratios to it.
        seed: the seed of the draws, an int of which the low 64 bits are used. Default 0.
        min_lr: lower bound of the center, > 0, rounded up to one significant digit. Default None.
        max_lr: upper bound of the center, rounded down to one significant digit. Default None.
        jitter: whether rates are drawn; if False, every step uses the center. Default True.
        process_group: the ranks that decide together, on their mean cost, as with AALR. Default: the default group if
            ``torch.distributed`` is initialized.
        takes_over: whether another scheduler, such as a warm-up, has driven the optimizer before and is not stepped
            again. Default False.

    Attributes:
        center: ``c``, which is also ``param_groups[0]["lr"]``.
        width: ``s``, the width of the range that rates are drawn from.

    Raises:
        TypeError, ValueError: for invalid arguments, and from ``step`` for a metric that is not a number.
        RuntimeError: if another scheduler or controller drives the optimizer.
    """

    _is_attached = False
    _group_rates: RandomGroupRates | None = None

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        seed: int = 0,
        min_lr: float | None = None,
        max_lr: float | None = None,
        jitter: bool = True,
        process_group: Any = None,
        takes_over: bool = False,
    ) -> None:
        seed, jitter = plain_int("ASLR: seed", seed), plain_flag("ASLR: jitter", jitter)
        self._bounds = _bounds(min_lr, max_lr)
        super().__init__(optimizer, process_group, takes_over)
        first = _one_digit(self._last_lr[0], ROUND_HALF_UP)
        if abs(float(first) / self._last_lr[0] - 1) > 1e-3:
            warn(
                f"ASLR: the lr of param group 0, {self._last_lr[0]:g}, becomes {float(first):g}: the search is on a "
                "grid of one significant digit. Construct the optimizer with such a rate"
            )
        self._center = self._clamp(first)
        self._best = math.inf
        self._direction, self._range, self._moves = 1, 1, 0
        self._random_rates = RandomRates(seed, 0.0) if jitter else None
        self._claim()
        self._attach()
        self._set_center()

    @property
    def center(self) -> float:
        return float(self._center)

    @property
    def width(self) -> float:
        return float(_unit(self._center))

    def remove(self) -> None:
        super().remove()
        self._detach()

    def _decide(self, metric: float) -> None:
        if metric <= self._best and math.isfinite(metric):
            self._best = metric
            self._direction, self._range, self._moves = 1, 1, 0
            return
        moved = _EXACT.add(self._center, self._direction * _unit(self._center))
        self._center = self._clamp(moved if moved > 0 else _EXACT.multiply(Decimal("0.9"), self._center))
        self._moves += 1
        if self._moves == self._range:
            self._direction, self._range, self._moves = -self._direction, self._range + 1, 0
        self._set_center()

    def _clamp(self, center: Decimal) -> Decimal:
        low, high = self._bounds
        center = center if low is None else max(low, center)
        return center if high is None else min(high, center)

    def _set_center(self) -> None:
        self._set_lr(self.center)
        self._scale_random_rates()

    def _scale_random_rates(self) -> None:
        if self._random_rates is not None:
            self._random_rates.relative_width = self.width / self.center

    def _check_owner(self) -> None:
        if self._group_rates is not None:
            self._group_rates.restore(self.optimizer.param_groups)
        super()._check_owner()

    def _state(self) -> dict[str, Any]:
        low, high = self._bounds
        return {
            "center": str(self._center),
            "width": str(_unit(self._center)),
            "best": self._best,
            "dir": self._direction,
            "range": self._range,
            "steps": self._moves,
            "min_lr": None if low is None else str(low),
            "max_lr": None if high is None else str(high),
            "seed": None if self._random_rates is None else self._random_rates.seed,
            "n": None if self._random_rates is None else int(self._random_rates.step),
        }

    def _load(self, state_dict: dict[str, Any]) -> float:
        s = state_dict
        center, best, direction = self._saved_rate(s, "center"), float(s["best"]), int(s["dir"])
        search_range, moves, seed, n = int(s["range"]), int(s["steps"]), s["seed"], s["n"]
        low, high = (None if s[name] is None else self._saved_rate(s, name) for name in ("min_lr", "max_lr"))
        if math.isnan(best) or abs(direction) != 1 or not 0 <= moves < search_range:
            raise self._damaged(f"best={best}, dir={direction}, range={search_range}, steps={moves}")
        random_rates = None if seed is None else RandomRates(seed, 0.0, n)
        self._detach()
        self._bounds = low, high
        self._center, self._best, self._direction = center, best, direction
        self._range, self._moves = search_range, moves
        self._random_rates = random_rates
        self._attach()
        self._scale_random_rates()
        return self.center

    def _saved_rate(self, state_dict: dict[str, Any], name: str) -> Decimal:
        try:
            rate = Decimal(state_dict[name])
        except (InvalidOperation, TypeError, ValueError):
            rate = Decimal("NaN")
        if not (rate.is_finite() and rate > 0):
            raise self._damaged(f"{name} is {state_dict[name]!r}, and must be a number > 0")
        return rate

    # ---- attaching to the optimizer: repeated after pickling and deep copies, which drop hooks ----

    def _attach(self) -> None:
        if self._random_rates is None:
            return
        self._is_attached = True
        if isinstance(self.optimizer, AdaptiveOptimizer):
            self.optimizer._random_rates = self._random_rates
        else:
            self._group_rates = RandomGroupRates(self.optimizer, self._random_rates)

    def _detach(self) -> None:
        if not self._is_attached:
            return
        self._is_attached = False
        if isinstance(self.optimizer, AdaptiveOptimizer):
            self.optimizer._random_rates = None
        if self._group_rates is not None:
            self._group_rates.restore(self.optimizer.param_groups)
            self._group_rates.remove()
            self._group_rates = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_is_attached": False, "_group_rates": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._drives():
            self._attach()


def _unit(center: Decimal) -> Decimal:
    """Returns ``s = 10^⌊log10 c⌋``."""
    return _EXACT.scaleb(Decimal(1), center.adjusted())


def _one_digit(value: float, rounding: str) -> Decimal:
    """Rounds to one significant digit the shortest decimal that reads as the same double as ``value``."""
    exact = Decimal(repr(float(value)))
    return exact.quantize(_unit(exact), rounding, _EXACT).normalize(_EXACT)


def _bounds(min_lr: float | None, max_lr: float | None) -> tuple[Decimal | None, Decimal | None]:
    min_lr, max_lr = (
        bound if bound is None else float(plain_number(f"ASLR: {name}", bound))
        for name, bound in (("min_lr", min_lr), ("max_lr", max_lr))
    )
    for name, bound in (("min_lr", min_lr), ("max_lr", max_lr)):
        if bound is not None and not (bound > 0 and math.isfinite(bound)):
            raise ValueError(f"ASLR: {name} must be finite and > 0, or None, got {bound}")
    low = None if min_lr is None else _one_digit(min_lr, ROUND_CEILING)
    high = None if max_lr is None else _one_digit(max_lr, ROUND_FLOOR)
    if low is not None and high is not None and low > high:
        raise ValueError(f"ASLR: no rate of one significant digit lies in [{min_lr}, {max_lr}]: widen the bounds")
    return low, high
