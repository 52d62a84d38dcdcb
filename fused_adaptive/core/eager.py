"""Excludes functions from torch.compile that it cannot trace usefully."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

if TYPE_CHECKING:

    def eager(function: _F) -> _F:
        """Excludes a function that runs once, or whose kernels write more than their operator's schema says."""
        ...

else:
    # torch.compiler.disable as a decorator would import all of dynamo here, which takes 2 s.
    eager = torch._disable_dynamo
