"""Finds parameters that share memory, which kernels would update twice at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import is_freed
from ..core.view import ParamView
from ..core.warning import warn


def share_memory(views: Sequence[ParamView]) -> bool:
    """Checks whether two parameters share memory, as weights tied by ``.data`` do, and warns if so."""
    ranges = sorted((_range_of(view) for view in views), key=lambda r: (r.begin, r.end))
    chain: list[_Range] = []  # ranges of which each begins before an earlier one ends
    for r in ranges:
        chain = [*chain, r] if any(r.begin < other.end for other in chain) else [r]
        for other in chain[:-1]:
            if r.begin < other.end and _have_common_bytes(other, r):
                first, second = sorted((other.view.index, r.view.index))
                warn(
                    f"parameters {first} and {second} share memory (tied through .data?): the step moves one after the "
                    "other on the reference backend, which is slower. Tie the modules' attributes instead, as in "
                    "decoder.weight = encoder.weight, and there is one parameter"
                )
                return True
    return False


class _Range(NamedTuple):
    """The addresses of a parameter's first byte and behind its last."""

    begin: int
    end: int
    view: ParamView

    def is_full(self) -> bool:
        param = self.view.param
        return self.end - self.begin == param.numel() * param.element_size()

    def bytes_in(self, memory: Tensor, begin: int) -> Tensor:
        """Returns the bytes of the parameter in ``memory``, of one element a byte from address ``begin``."""
        param, size = self.view.param, self.view.param.element_size()
        strides = [stride * size for stride in param.stride()]
        return memory.as_strided((*param.shape, size), (*strides, 1), self.begin - begin)


def _range_of(view: ParamView) -> _Range:
    param = view.param
    if param.numel() == 0 or is_freed(param):
        return _Range(0, 0, view)
    last = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
    return _Range(param.data_ptr(), param.data_ptr() + (last + 1) * param.element_size(), view)


def _have_common_bytes(a: _Range, b: _Range) -> bool:
    """Checks two ranges that overlap. The columns of a matrix do, and have no byte in common."""
    if a.is_full() and b.is_full():
        return True
    begin, end = min(a.begin, b.begin), max(a.end, b.end)
    memory = torch.zeros(end - begin, dtype=torch.bool)
    a.bytes_in(memory, begin).fill_(True)
    return bool(b.bytes_in(memory, begin).any())
