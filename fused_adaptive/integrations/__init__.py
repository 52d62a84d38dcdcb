"""Callbacks for trainers, one module each: ``transformers`` and ``lightning``. The package itself imports neither."""

from __future__ import annotations

from typing import Any

from ..optimizer import AdaptiveOptimizer


def unwrap(optimizer: Any) -> AdaptiveOptimizer:
    """The optimizer inside what a trainer or Accelerate has wrapped around it.

    Raises:
        TypeError: if there is none of this package's inside.
    """
    inner = optimizer
    while not isinstance(inner, AdaptiveOptimizer):
        inner = getattr(inner, "optimizer", None)
        if inner is None:
            raise TypeError(f"{type(optimizer).__name__} is no optimizer of fused_adaptive, and holds none")
    return inner
