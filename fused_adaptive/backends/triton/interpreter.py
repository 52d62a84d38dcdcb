"""Detection of Triton's interpreter."""

from __future__ import annotations

import os


def is_interpreted() -> bool:
    """Returns whether Triton runs kernels through its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
