"""ASLR's random rates for optimizers of other packages: one per param group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from ..core.random_rates import RandomRates
from .lr import read_lrs, write_lrs


class RandomGroupRates:
    """Draws one rate per param group before each step, by hooks of the optimizer, until its owner changes.

    The group's lr is the center again after the step. If the step raises, it is so from the next ``step()`` or
    ``state_dict()`` of the optimizer, or the next call of the schedule.
    """

    def __init__(self, optimizer: Optimizer, random_rates: RandomRates) -> None:
        self._rates = random_rates
        self._owner = getattr(optimizer, "_lr_owner", None)  # a weak reference to the controller
        self._centers: list[float] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            # A step that raises runs no post-hook, and its random rate must not get into a checkpoint.
            optimizer.register_state_dict_pre_hook(lambda optimizer: self.restore(optimizer.param_groups)),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def restore(self, groups: Iterable[dict[str, Any]]) -> None:
        """Sets the groups' lr to the centers again, if a step that raised has not done so."""
        if self._centers is not None:
            write_lrs(groups, self._centers)
            self._centers = None

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore(optimizer.param_groups)
        if getattr(optimizer, "_lr_owner", None) is not self._owner:  # the controller was freed without remove()
            return
        centers = read_lrs(optimizer.param_groups)
        factors = self._rates.factors(torch.arange(len(centers))).tolist()
        write_lrs(optimizer.param_groups, [c * f for c, f in zip(centers, factors, strict=True)])
        self._centers = centers

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._centers is None:  # step() has called super().step(), whose hooks have drawn and restored already
            return
        self.restore(optimizer.param_groups)
        self._rates.count(getattr(optimizer, "found_inf", None))
