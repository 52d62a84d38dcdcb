"""What a step may differ by, per dtype, from a float64 step taken from the same state."""

import torch
from torch import Tensor

#: Spacing of a dtype's numbers around 1.
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

#: Roundings on the way to ``α·u``, in units of float32's (float64's) half spacing.
STEP_ROUNDINGS = 8


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype``'s numbers at ``value`` (float64), elementwise."""
    tiny = torch.finfo(dtype).smallest_normal
    exponent = torch.frexp(value.abs().clamp(min=tiny))[1].double() - 1
    return EPSILON[dtype] * torch.exp2(exponent)


def step_bound(p_before: Tensor, p_after: Tensor, dtype: torch.dtype, ulps: float = 1.0) -> Tensor:
    """1 ulp(p) + 8 · 2⁻²⁴ · max|α·u|, from a float64 step ``p_before → p_after``.

    The maximum is over the tensor: where ĝ and the momentum cancel, ``u`` is small but its roundings are not.
    """
    largest = torch.maximum(p_before.abs(), p_after.abs())
    return ulps * ulp(largest, dtype) + step_roundings(dtype) / 2 * (p_after - p_before).abs().max()


def step_roundings(dtype: torch.dtype) -> float:
    """Of the arithmetic of one step, relative. A float64 step is compared with one that rounds as coarsely itself."""
    return 2 * STEP_ROUNDINGS * EPSILON[dtype] if dtype == torch.float64 else STEP_ROUNDINGS * EPSILON[torch.float32]
