"""ASLR's draws: one rate a tensor and step from our own optimizers, one a param group from foreign ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .lr import read_lrs, write_lrs
from .philox import uniform

if TYPE_CHECKING:
    from ..slot import Slot


@dataclass
class RateDraw:
    """What a step needs to draw ``1 + width·(u − ½)`` for each tensor [ASLR, Eq. 10].

    Args:
        seed: of the Philox generator.
        relative_width: ``s/c``, dimensionless; the controller changes it once an epoch.
        step: applied steps of the optimizer so far, int64, 0-dim. A tensor, so that a step can be counted, and the
            count be read, without the host's waiting for the device.
    """

    seed: int
    relative_width: float
    step: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def factors(self, index: Tensor) -> Tensor:
        """The factors of this step on ``γ``, float64, for int64 positions ``index``, on their device."""
        return 1 + self.relative_width * (uniform(self.seed, self.step.to(index.device), index) - 0.5)

    def assign(self, slots: Sequence[Slot]) -> None:
        """Gives each slot its factor, all in one pass."""
        index = torch.tensor([slot.index for slot in slots], dtype=torch.int64)
        for slot, factor in zip(slots, self.factors(index).tolist(), strict=True):
            slot.draw = factor

    def count(self, found_inf: Tensor | None) -> None:
        """One step more, unless AMP skipped it."""
        if found_inf is None:
            self.step += 1
        else:
            self.step = self.step.to(found_inf.device)
            self.step += (found_inf == 0).to(torch.int64).reshape(())


class GroupDraws:
    """Draws one rate a param group, around each step of an optimizer that knows nothing of it.

    The group's lr is the center again as soon as the step is over, also when the step raised.
    """

    def __init__(self, optimizer: Optimizer, draw: RateDraw) -> None:
        self.draw = draw
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
        factors = self.draw.factors(torch.arange(len(centers))).tolist()
        write_lrs(optimizer.param_groups, [c * f for c, f in zip(centers, factors, strict=True)])
        self._centers = centers

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._centers is None:  # torch calls hooks once more where step() has called super().step(), which drew
            return
        self.restore(optimizer.param_groups)
        self.draw.count(getattr(optimizer, "found_inf", None))
