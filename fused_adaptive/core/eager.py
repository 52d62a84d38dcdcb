"""Keeping torch.compile out of what it could only trace in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

if TYPE_CHECKING:

    def eager(function: _F) -> _F:
        """Decorates what runs once, or what calls kernels that write more than their operator's schema says."""
        ...

else:
    # torch.compiler.disable as a decorator would import all of dynamo here, 2 s.
    eager = torch._disable_dynamo
