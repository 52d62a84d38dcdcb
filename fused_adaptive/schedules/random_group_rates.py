"""ASLR's random rates for optimizers of other packages: one a param group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from ..core.random_rates import RandomRates
from .lr import read_lrs, write_lrs


class RandomGroupRates:
    """Draws one rate a param group, around each step of an optimizer that knows nothing of it.

    The group's lr is the center again as soon as the step is over, also when the step raised.
    """

    def __init__(self, optimizer: Optimizer, random_rates: RandomRates) -> None:
        self._rates = random_rates
        self._centers: list[float] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def restore(self, groups: Iterable[dict[str, Any]]) -> None:
        """Puts the centers back if a step has left without doing so (it raised)."""
        if self._centers is not None:
            write_lrs(groups, self._centers)
            self._centers = None

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore(optimizer.param_groups)
        centers = read_lrs(optimizer.param_groups)
        factors = self._rates.factors(torch.arange(len(centers))).tolist()
        write_lrs(optimizer.param_groups, [c * f for c, f in zip(centers, factors, strict=True)])
        self._centers = centers

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._centers is None:  # torch calls hooks once more where step() has called super().step(), which drew
            return
        self.restore(optimizer.param_groups)
        self._rates.count(getattr(optimizer, "found_inf", None))
