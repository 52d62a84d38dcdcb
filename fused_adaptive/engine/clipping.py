"""Gradient clipping inside of the step: the norm is one pass over the gradients, the kernels scale as they read.

The clip coefficient is folded into ``grad_scale``, by which every backend divides anyway, and a norm that is not finite
into ``found_inf``. So no kernel knows of clipping, ``p.grad`` stays as it is, and the host waits for nothing.
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
    """A positive number or None. Infinity clips nothing, and measures.

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
    """The 2-norm of all gradients together, over devices and, for DTensors, over the ranks that share them.

    Args:
        grads: dense floating-point tensors or DTensors.

    Returns:
        0-dim, on the first gradient's device; float64 if one of them is, else float32: low precision is summed in
        float32. In torch's order of operations, so that for float32 it is ``clip_grad_norm_``'s, bit for bit.
    """
    buckets: dict[Any, list[Tensor]] = {}
    for grad in grads:
        shared = (getattr(grad, "device_mesh", None), getattr(grad, "placements", None))
        buckets.setdefault((grad.device, grad.dtype, *shared), []).append(grad)
    norms = []
    for (_, dtype, mesh, _), bucket in buckets.items():
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        own = torch._foreach_norm(bucket, 2, dtype=None if dtype == precise else precise)  # type: ignore[reportPrivateImportUsage]
        # A DTensor's norm is a sum that the ranks still have to complete: once for all that are shared alike.
        norms += own if mesh is None else [_norm_of(own).full_tensor()]  # type: ignore[attr-defined]
    return _norm_of(norms) if norms else torch.zeros(())


def _norm_of(norms: Sequence[Tensor]) -> Tensor:
    # A generator that Dynamo has traced is in a reference cycle with the optimizer.
    dtype = torch.float64 if any([n.dtype == torch.float64 for n in norms]) else None  # noqa: C419
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, dtype or n.dtype) for n in norms]), 2)


def clip(
    grads: Sequence[Tensor],
    max_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The norm of the unscaled gradients, and what it makes of ``grad_scale`` and ``found_inf``. Changes nothing.

    Args:
        grads: all gradients of the step.
        max_norm: gradients are multiplied by ``min(1, max_norm / (norm + 1e-6))``; None: not at all.
        skip_nonfinite: whether a norm that is not finite counts as an overflow.
        grad_scale: what gradients are to be divided by (AMP), or None.
        found_inf: nonzero if the step is to be skipped (AMP), or None.

    Returns:
        The norm, 0-dim; the scale with the coefficient in it, float64 so that a kernel that takes its reciprocal and
        rounds it has the coefficient again, bit for bit; found_inf, float32.
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
