"""Uploads of the inputs of a step. The host does not wait for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import plans
from . import fields


class Uploader:
    """Uploads addresses of gradients and hyperparameters when they have changed.

    Copies are asynchronous and from pinned memory. Each copy has its own buffer, which torch's allocator reuses only
    after the copy, since it records events. A captured CUDA graph repeats its copy in every replay without the host, so
    from the first capture on every step uploads its inputs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: Any = None  # values on the device
        self._sent: Tensor | None = None  # buffer of the last capture
        self._spare: Tensor | None = None  # memory cannot be pinned during a capture
        self.resize(0, 0)

    def resize(self, tensors: int, groups: int) -> None:
        """Allocates memory for the numbers of tensors and param groups."""
        self._size = tensors + groups * fields.HYPER_FIELDS.value
        self._device_memory = torch.zeros(max(self._size, 1), dtype=torch.int64, device=self._device)
        self.grads = self._device_memory[:tensors]
        self.hypers = self._device_memory[tensors:].view(torch.float64)
        self._known, self._sent, self._spare = None, None, None

    def memory(self) -> list[Tensor]:
        """Returns the memory to which a graph that was just captured points."""
        return [self._device_memory, *(() if self._sent is None else (self._sent,))]

    def send(self, pointers: list[int], groups: plans.GroupNumbers, capturing: bool) -> None:
        """Uploads the gradients and hyperparameters of this step.

        Args:
            pointers: address of each tensor's gradient; 0: no gradient.
            groups: the param groups. An lr that is a tensor on the device is copied without the host.
            capturing: whether a CUDA graph is being captured.
        """
        numbers, rates = groups.read(self._device)
        if capturing or self._sent is not None or (pointers, numbers) != self._known:
            host = self._take_spare() if capturing else self._pinned()
            host[: len(pointers)] = torch.tensor(pointers, dtype=torch.int64)
            host[len(pointers) :].view(torch.float64).copy_(torch.tensor(numbers, dtype=torch.float64))
            self._device_memory.copy_(host, non_blocking=True)
            self._known = pointers, numbers
        for i, lr in enumerate(rates):
            if lr is not None:
                self.hypers[i * fields.HYPER_FIELDS.value].copy_(lr.reshape(()), non_blocking=True)
        if not capturing and self._spare is None:
            self._spare = self._pinned()

    def copy(self, values: Tensor, to: Tensor) -> None:
        """Uploads another table."""
        if self._device.type == "cuda":
            values = torch.empty_like(values, pin_memory=True).copy_(values)
        to.copy_(values, non_blocking=True)

    def _pinned(self) -> Tensor:
        return torch.empty(self._size, dtype=torch.int64, pin_memory=self._device.type == "cuda")

    def _take_spare(self) -> Tensor:
        if self._spare is None:
            raise RuntimeError("take one step between two captures of a CUDA graph: each needs memory of its own")
        self._sent, self._spare = self._spare, None
        return self._sent
