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
    """A version counter for tensors that are made together."""

    def __init__(self) -> None:
        self._owners: dict[torch.device, Tensor] = {}

    def adopt(self, value: Tensor) -> Tensor:
        """The same tensor with this counter instead of its own. What has none, or holds other tensors, stays as it is.

        Args:
            value: dense, in memory. Others who have it share its memory, but not the version of what is returned.
        """
        if type(value) is not Tensor or value.requires_grad or value.is_inference():
            return value
        owner = self._owners.get(value.device)
        if owner is None:
            owner = self._owners[value.device] = torch.empty(0, device=value.device)
        adopted = owner.detach()  # has its counter, which it keeps
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
    before = [t._version for t in tensors if not t.is_inference()]
    tensors = [t for t in tensors if not t.is_inference()]
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
    return found + rest
