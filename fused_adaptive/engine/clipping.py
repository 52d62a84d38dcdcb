"""Gradient clipping inside of the step. The norm takes one pass over the gradients, and kernels scale as they read.

The clip coefficient is folded into ``grad_scale``, by which every backend divides anyway, and a norm that is not finite
into ``found_inf``. So kernels need no code for clipping, ``p.grad`` does not change, and the host does not wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.plain import plain

#: As in ``torch.nn.utils.clip_grad_norm_``.
EPSILON = 1e-6


def check_max_grad_norm(value: Any) -> float | None:
    """Returns a positive float or None. With infinity nothing is clipped, but the norm is measured.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if value is None:
        return None
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        remedy = ". YAML reads 1e-3 as a string: write 1.0e-3 there" if isinstance(value, str) else ""
        raise TypeError(f"max_grad_norm must be a number or None, got {value!r}{remedy}")
    if math.isnan(value) or value <= 0:
        raise ValueError(f"max_grad_norm must be > 0, or None for no clipping, got {value!r}")
    return float(value)


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm of all gradients, over devices and, for DTensors, over the ranks that hold them.

    Args:
        grads: dense floating-point tensors or DTensors.

    Returns:
        0-dim, on the first gradient's device; float64 if one of them is, else float32: low precision is summed in
        float32. The order of operations is torch's, so for float32 the norm equals ``clip_grad_norm_``'s bit for bit.
    """
    buckets: dict[Any, list[Tensor]] = {}
    for grad in grads:
        sharding = (getattr(grad, "device_mesh", None), getattr(grad, "placements", None))
        buckets.setdefault((grad.device, grad.dtype, *sharding), []).append(grad)
    norms = []
    for (_, dtype, mesh, _), bucket in buckets.items():
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        partial = torch._foreach_norm(bucket, 2, dtype=None if dtype == precise else precise)  # type: ignore[reportPrivateImportUsage]
        # Norms of DTensors are of this rank's parts: full_tensor() reduces once for all DTensors of equal sharding.
        norms += partial if mesh is None else [_norm_of(partial).full_tensor()]  # type: ignore[attr-defined]
    return _norm_of(norms) if norms else torch.zeros(())


def _norm_of(norms: Sequence[Tensor]) -> Tensor:
    # No generator: Dynamo keeps a traced generator in a reference cycle with the optimizer.
    dtype = torch.float64 if any([n.dtype == torch.float64 for n in norms]) else None  # noqa: C419
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, dtype or n.dtype) for n in norms]), 2)


def clip(
    grads: Sequence[Tensor],
    max_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns the norm of the unscaled gradients, and ``grad_scale`` and ``found_inf`` that include clipping.

    Changes nothing.

    Args:
        grads: all gradients of the step.
        max_norm: gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``; None: no clipping.
        skip_nonfinite: whether a norm that is not finite counts as an overflow.
        grad_scale: divisor of the gradients (AMP), or None.
        found_inf: nonzero if the step is to be skipped (AMP), or None.

    Returns:
        The norm, 0-dim; the scale that includes the coefficient, float64, so that a kernel that rounds its reciprocal
        gets the coefficient bit for bit; found_inf, float32.
    """
    norm = total_norm(grads)
    if grad_scale is not None:
        norm = norm / grad_scale.to(norm.device)
    if max_norm is not None:
        coefficient = (max_norm / (norm + EPSILON)).clamp(max=1.0)
        # MPS has no float64.
        inverse = coefficient.to(torch.float32 if norm.device.type == "mps" else torch.float64).reciprocal()
        grad_scale = inverse if grad_scale is None else inverse * grad_scale.to(norm.device)
    if skip_nonfinite:
        overflow = norm.isfinite().logical_not().to(torch.float32)
        found_inf = overflow if found_inf is None else torch.maximum(overflow, found_inf.to(norm.device).reshape(()))
    return norm, grad_scale, found_inf
