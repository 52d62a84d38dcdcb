"""Raises the autograd versions of the tensors that kernels write, which only torch's own operators do by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class Written:
    """The tensors that a step writes, without state tensors that are scalars.

    Args:
        params: the parameters of the step.
        state: dicts from the position of a parameter to a tensor of its state.
    """

    def __init__(self, params: Sequence[Tensor], state: Iterable[Mapping[int, Tensor]]) -> None:
        pairs = [(params[i], value) for members in state for i, value in members.items()]
        shaped = [value for param, value in pairs if value.dim() or param.dim() == 0]
        self._params = params
        self._state = [value for value in shaped if not value.is_inference()]  # inference tensors have no versions
        self._all = [*self._state, *params]

    def raise_versions(self, absent: Sequence[int] = ()) -> None:
        """Raises the versions of all state, which may also change without a gradient, and of updated parameters.

        Args:
            absent: the positions of the parameters that are not updated.
        """
        written = self._all
        if absent:
            left_out = set(absent)
            written = [*self._state, *(p for i, p in enumerate(self._params) if i not in left_out)]
        torch.autograd.graph.increment_version(written)
