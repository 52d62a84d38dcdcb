"""Random rates of ASLR, one per tensor and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .philox import uniform
from .view import ParamView


class RandomRates:
    """Draws ``1 + width·(u − ½)`` for each tensor in a step [ASLR, Eq. 10].

    Args:
        seed: seed of the Philox generator.
        relative_width: ``s/c``, dimensionless; the controller changes it once an epoch.
        step: number of optimizer steps applied so far.

    Attributes:
        table: seed, step and the bits of the width as kernels read them (csrc/rules/random_rates.h), int64. It is on
            the CPU until the first step on a GPU. On the GPU, steps are counted and captured graphs draw new numbers
            without the host.
    """

    def __init__(self, seed: int, relative_width: float, step: int = 0) -> None:
        self.seed, self._relative_width = seed, relative_width
        self.table = _table(seed, step, relative_width, torch.device("cpu"))

    @property
    def step(self) -> Tensor:
        """Number of applied steps so far, 0-dim: a view of the table, so it can be counted on its device."""
        return self.table[1]

    @property
    def relative_width(self) -> float:
        return self._relative_width

    @relative_width.setter
    def relative_width(self, value: float) -> None:
        self._relative_width = value
        self.table.view(torch.float64)[2].fill_(value)

    def __reduce__(self) -> Any:  # copies start on the CPU
        return RandomRates, (self.seed, self._relative_width, int(self.step))

    def over(self, table: Tensor) -> RandomRates:
        """Returns the same draws with another tensor as table."""
        other = RandomRates.__new__(RandomRates)
        other.__dict__ |= self.__dict__
        other.table = table
        return other

    def table_on(self, devices: Sequence[torch.device]) -> Tensor:
        """Returns the table, moved once to the first GPU among ``devices``. The host does not wait for the move.

        Raises:
            RuntimeError: if the table has to move while a CUDA graph is being captured.
        """
        gpu = next((device for device in devices if device.type != "cpu"), None)
        if gpu is not None and self.table.device.type == "cpu":
            if gpu.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("ASLR has drawn for no step yet: take one step before the capture of a CUDA graph")
            self.table = _table(self.seed, int(self.step), self._relative_width, gpu)
        return self.table

    def factors(self, index: Tensor) -> Tensor:
        """Returns the factors of this step on ``γ``, float64, for int64 positions ``index``, on their device."""
        return 1 + self._relative_width * (uniform(self.seed, self.step.to(index.device), index) - 0.5)

    def assign(self, views: Sequence[ParamView]) -> None:
        """Sets the factor of each view, computed in one pass."""
        index = torch.tensor([view.index for view in views], dtype=torch.int64)
        for view, factor in zip(views, self.factors(index).tolist(), strict=True):
            view.rate_factor = factor

    def count(self, found_inf: Tensor | None) -> None:
        """Counts one step, unless AMP skipped it."""
        if found_inf is None:
            self.step.add_(1)
        else:
            self.step.add_((found_inf == 0).to(self.table.device).reshape(()))


def _table(seed: int, step: int, relative_width: float, device: torch.device) -> Tensor:
    """Fills the table number by number: ``fill_`` passes kernel arguments, whereas a copy from the host would wait."""
    table = torch.empty(3, dtype=torch.int64, device=device)
    table[0].fill_((seed + 2**63) % 2**64 - 2**63)  # the low 64 bits, signed
    table[1].fill_(step)
    table.view(torch.float64)[2].fill_(relative_width)
    return table
