"""float32 masters of bfloat16 parameters, and stochastic rounding: what is between a step's float32 and the parameter.

``master="split"``: the parameter is the upper half of its float32 weight, rounded half away from zero, and a signed
16-bit remainder is state. As integers, ``(parameter << 16) + remainder`` are the bits of the weight. To nearest even
the remainder would need a 17th bit: of the weights halfway between neighbours some are rounded up and some down.

``master="stochastic"``: there is no master; a weight is rounded up with the probability that makes its expectation
right. The random bits are counter-based: a function of seed, steps taken, tensor and element, whatever computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .philox import WORD, philox4x32
from .state import COUNTER, State, StateSpec, state_dtype

CHOICES = ("none", "split", "stochastic")
_NAN = 0x7FC00000
_INFINITY = 0x7F800000
#: Elements that share one call of the generator: four words, two of 16 bits in each.
_PER_BLOCK = 8
#: In the counter's last word, where ASLR's draws have 0: with the same seed they are other numbers.
_ROUNDING = 0x80000000


def check(group: Mapping[str, Any]) -> None:
    """Raises ValueError or TypeError for a ``master`` that does not exist, or that float16 parameters cannot have.

    float32 and float64 parameters are their own masters: whatever is asked for, nothing is added to them.
    """
    master, seed = group.get("master", "none"), group.get("rounding_seed", 0)
    if master not in CHOICES:
        raise ValueError(f"master must be one of {', '.join(map(repr, CHOICES))}, got {master!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"rounding_seed must be an int in [0, 2**63), got {seed!r}")
    for entry in group.get("params", ()) if master != "none" else ():
        param = entry[1] if isinstance(entry, tuple) else entry
        if isinstance(param, Tensor) and param.dtype == torch.float16:
            raise ValueError(
                f"master={master!r} is for bfloat16 parameters, and one of shape {tuple(param.shape)} is float16, "
                "whose bits are not the upper half of a float32: use bfloat16, or master='none'"
            )


def state_spec(group: Mapping[str, Any], param_dtype: torch.dtype) -> dict[str, StateSpec]:
    """The state besides that of backbone and policies: 2 bytes a parameter with ``"split"``, a count otherwise."""
    master = group.get("master", "none") if param_dtype == torch.bfloat16 else "none"
    if master == "split":
        return {"master_low": StateSpec(dtype=torch.int16)}
    return {"rounding_step": COUNTER} if master == "stochastic" else {}


def read(param: Tensor, state: State) -> Tensor:
    """The weight in the state's dtype: the exact master where there is one. The parameter itself where that is it."""
    if param.dtype == torch.bfloat16 and "master_low" in state:
        return join(param, state["master_low"])
    return param.to(state_dtype(param))


def write(weight: Tensor, param: Tensor, state: State, group: Mapping[str, Any], index: int) -> None:
    """Puts a new weight, from :func:`read`, into the parameter and its state.

    Args:
        weight: as the parameter, in the state's dtype; may be the parameter.
        param: any floating-point tensor.
        state: of the parameter.
        group: its param group.
        index: its position over all param groups.
    """
    if weight is param:
        return
    if param.dtype == torch.bfloat16 and "master_low" in state:
        high, low = split(weight)
        param.copy_(high)
        state["master_low"].copy_(low)
    elif param.dtype == torch.bfloat16 and "rounding_step" in state:
        param.copy_(round_stochastically(weight, group.get("rounding_seed", 0), state["rounding_step"], index))
        state["rounding_step"] += 1
    else:
        param.copy_(weight)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 whose halves these are. ``high`` is bfloat16, ``low`` int16."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of a float32: bfloat16, rounded half away from zero, and the int16 that is left. Every NaN is one."""
    bits = torch.where(weight.isnan(), _NAN, weight.view(torch.int32))
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def round_stochastically(weight: Tensor, seed: int, step: Tensor, index: int) -> Tensor:
    """float32 to bfloat16: up with the probability of what would be cut off. What is not finite is kept.

    Args:
        weight: any layout without overlaps.
        seed: of the generator.
        step: int64, 0-dim: steps that this tensor has taken before.
        index: its position over all param groups.
    """
    noise = torch.empty_like(weight, dtype=torch.int32)
    # Elements are numbered as they lie in memory, as kernels see them.
    flat = noise.as_strided((noise.numel(),), (1,))
    flat.copy_(random_bits(noise.numel(), seed, step.to(weight.device), index))
    rounded = ((weight.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    finite = (weight.view(torch.int32) & _INFINITY) != _INFINITY
    return torch.where(finite, rounded, weight.to(torch.bfloat16))


def random_bits(count: int, seed: int, step: Tensor, index: int) -> Tensor:
    """16 random bits for each of a tensor's first ``count`` elements, int64, on the device of ``step``.

    Philox4x32-10 with the halves of ``seed`` as key; element e has the (e mod 8)th 16 bits, from the low ones of the
    first word on, of the counter (e / 8 low, step low, tensor index, 2³¹ + e / 8 high).
    """
    block = torch.arange(-(-count // _PER_BLOCK), device=step.device)
    constant = torch.zeros_like(block)
    counter = (block & WORD, constant + (step & WORD), constant + index, _ROUNDING | (block >> 32))
    words = torch.stack(philox4x32(counter, (seed & WORD, (seed >> 32) & WORD)), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[:count]
