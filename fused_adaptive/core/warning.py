"""Warnings that show the line of the user's that they are about."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """Warns at the line that called this package, or torch, which called it."""
    depth, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fused_adaptive", "torch"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, stacklevel=depth)
