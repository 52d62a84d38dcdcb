"""Versions of tensors: what writes one raises its counter, by which autograd notices that a graph needs old values.

Kernels of our own raise counters by hand. One by one that took a fifth of a step of many small tensors, so state that
is made together shares a counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

#: Counters are told apart by trying. If more than this many are shared, the tensors of the others go up one by one.
MOST_SHARED = 16


class SharedVersion:
    """A version counter for tensors that are made together: that of the first of them on each device."""

    def __init__(self) -> None:
        self._owners: dict[torch.device, Tensor] = {}

    def adopt(self, value: Tensor) -> Tensor:
        """A tensor that is the same, memory included, but for this counter. Tensors of other classes stay themselves.

        Args:
            value: dense and of one's own: who writes to it from now on raises another counter.
        """
        if type(value) is not Tensor or value.requires_grad or value.is_inference():  # these last have no counter
            return value
        owner = self._owners.setdefault(value.device, value)
        if owner is value:
            return value
        adopted = owner.detach()  # has its counter, and keeps it
        adopted.data = value
        return adopted


class Written:
    """What a step writes, as autograd has to know: every tensor but those of one element, which stand for numbers.

    Args:
        params: of the step.
        state: tensors of their state, by position; as many such maps as you like.
    """

    def __init__(self, params: Sequence[Tensor], state: Iterable[Mapping[int, Tensor]]) -> None:
        own = [(params[i], value) for members in state for i, value in members.items()]
        self._params = params
        self._state = one_of_each_counter([value for param, value in own if value.dim() or param.dim() == 0])
        self._all = [*self._state, *params]

    def raise_versions(self, absent: Sequence[int] = ()) -> None:
        """Of all state, for an interval may end for those without a gradient too, and of the parameters that move.

        Args:
            absent: positions of those that do not.
        """
        written = self._all
        if absent:
            left_out = set(absent)
            written = [*self._state, *(p for i, p in enumerate(self._params) if i not in left_out)]
        torch.autograd.graph.increment_version(written)


def one_of_each_counter(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Some of these tensors, such that with their versions all others' go up. Raises the versions of all."""
    tensors = [t for t in tensors if not t.is_inference()]
    before = [t._version for t in tensors]
    torch.autograd.graph.increment_version(tensors)
    found, rest = [], []
    for tensor, version in zip(tensors, before, strict=True):
        (found if tensor._version == version + 1 else rest).append(tensor)  # by more, if others have the same counter
    for _ in range(MOST_SHARED):
        if not rest:
            break
        found.append(rest[0])
        before = [t._version for t in rest]
        torch.autograd.graph.increment_version(rest[0])
        rest = [t for t, version in zip(rest, before, strict=True) if t._version == version]
    # Whoever else has written to one of them meanwhile may have made it seem to share.
    before = [t._version for t in tensors]
    torch.autograd.graph.increment_version(found + rest)
    is_up = all(t._version != version for t, version in zip(tensors, before, strict=True))
    return found + rest if is_up else tensors
