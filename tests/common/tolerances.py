"""Bounds, by dtype, on the difference of a step from a float64 step taken from the same state."""

import torch
from torch import Tensor

#: Spacing of a dtype's numbers around 1.
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

#: Number of roundings in ``α·u``, in units of half the spacing of float32 (of float64 for float64).
STEP_ROUNDINGS = 8


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the spacing of ``dtype``'s numbers at ``value`` (float64), elementwise."""
    tiny = torch.finfo(dtype).smallest_normal
    exponent = torch.frexp(value.abs().clamp(min=tiny))[1].double() - 1
    return EPSILON[dtype] * torch.exp2(exponent)


def step_bound(p_before: Tensor, p_after: Tensor, dtype: torch.dtype, ulps: float = 1.0) -> Tensor:
    """Returns 1 ulp(p) + 8 · 2⁻²⁴ · max|α·u|, from a float64 step ``p_before → p_after``.

    The maximum is over the tensor: if ĝ and the momentum cancel, ``u`` is small, but its roundings are not.
    """
    largest = torch.maximum(p_before.abs(), p_after.abs())
    return ulps * ulp(largest, dtype) + step_roundings(dtype) / 2 * (p_after - p_before).abs().max()


def step_roundings(dtype: torch.dtype) -> float:
    """Returns the relative rounding of a step's arithmetic. For float64, the float64 twin rounds as coarsely."""
    return 2 * STEP_ROUNDINGS * EPSILON[dtype] if dtype == torch.float64 else STEP_ROUNDINGS * EPSILON[torch.float32]
