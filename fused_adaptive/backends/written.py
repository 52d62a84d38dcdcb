"""What kernels write, as autograd has to know: torch raises a tensor's version itself, our kernels do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


class Written:
    """What a step writes: every tensor but those of one element, which stand for numbers.

    Args:
        params: of the step.
        state: tensors of their state, by position; as many such maps as you like.
    """

    def __init__(self, params: Sequence[Tensor], state: Iterable[Mapping[int, Tensor]]) -> None:
        own = [(params[i], value) for members in state for i, value in members.items()]
        shaped = [value for param, value in own if value.dim() or param.dim() == 0]
        self._params = params
        self._state = [value for value in shaped if not value.is_inference()]  # whose tensors have no versions
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
