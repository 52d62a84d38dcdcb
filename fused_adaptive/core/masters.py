"""float32 masters of bfloat16 parameters, and stochastic rounding.

``master="split"``: the parameter is the upper half of its float32 weight, rounded half away from zero, and a signed
16-bit remainder is state. As integers, ``(parameter << 16) + remainder`` are the bits of the weight. With rounding half
to even the remainder would need a 17th bit: of the weights halfway between neighbours, some are rounded up and some
down.

``master="stochastic"``: there is no master. A weight is rounded up with the probability that makes its expectation
exact. The random bits are counter-based: a function of seed, steps taken, tensor and element, the same on every
backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .philox import WORD, philox4x32
from .state import COUNTER, State, StateSpec, state_dtype

CHOICES = ("none", "split", "stochastic")
#: State of each choice, of bfloat16 parameters: 2 bytes per element, or a count per tensor.
STATE = {"split": {"master_low": StateSpec(dtype=torch.int16)}, "stochastic": {"rounding_step": COUNTER}}
NAMES = frozenset(name for spec in STATE.values() for name in spec)
_NAN = 0x7FC00000
_INFINITY = 0x7F800000
#: Elements per call of the generator: it returns four words, and each holds 16 bits for two elements.
_PER_BLOCK = 8
#: Set in the counter's last word, where ASLR's draws have 0, so that equal seeds give different numbers.
_ROUNDING = 0x80000000


def check(group: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown ``master``, an invalid ``rounding_seed``, or a master of float16 parameters.

    float32 and float64 parameters are their own masters: every choice is accepted and adds nothing to them.
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
    """Returns the declarations of the state of masters."""
    return STATE.get(group.get("master", "none"), {}) if param_dtype == torch.bfloat16 else {}


def read(param: Tensor, state: State) -> Tensor:
    """Returns the weight in the state's dtype: the exact master if there is one, else the parameter."""
    if param.dtype == torch.bfloat16 and "master_low" in state:
        return join(param, state["master_low"])
    return param.to(state_dtype(param))


def write(weight: Tensor, param: Tensor, state: State, group: Mapping[str, Any], index: int) -> None:
    """Writes a new weight to the parameter and its state.

    Args:
        weight: shaped as the parameter, in the state's dtype; may be the parameter itself.
        param: any floating-point tensor.
        state: state of the parameter.
        group: param group of the parameter.
        index: position of the parameter over all param groups.
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
    """Joins the halves of float32 numbers. ``high`` is bfloat16, ``low`` int16."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 numbers into bfloat16, rounded half away from zero, and the int16 remainder.

    All NaNs become the same NaN.
    """
    bits = torch.where(weight.isnan(), _NAN, weight.view(torch.int32))
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def round_stochastically(weight: Tensor, seed: int, step: Tensor, index: int) -> Tensor:
    """Rounds float32 to bfloat16: up with a probability equal to the fraction that truncation would cut off.

    Infinities and NaNs stay what they are.

    Args:
        weight: any layout without overlaps.
        seed: seed of the generator.
        step: int64, 0-dim: number of steps that this tensor has taken before.
        index: position of the parameter over all param groups.
    """
    noise = torch.empty_like(weight, dtype=torch.int32)
    # Elements are numbered in memory order, as in the kernels.
    flat = noise.as_strided((noise.numel(),), (1,))
    flat.copy_(random_bits(noise.numel(), seed, step.to(weight.device), index))
    rounded = ((weight.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)
    finite = (weight.view(torch.int32) & _INFINITY) != _INFINITY
    return torch.where(finite, rounded, weight.to(torch.bfloat16))


def random_bits(count: int, seed: int, step: Tensor, index: int) -> Tensor:
    """Returns 16 random bits for each of a tensor's first ``count`` elements, int64, on the device of ``step``.

    They come from Philox4x32-10 with the halves of ``seed`` as key. Element e takes the (e mod 8)th 16 bits, counted
    from the low bits of the first word, at the counter (e / 8 low, step low, tensor index, 2³¹ + e / 8 high).
    """
    block = torch.arange(-(-count // _PER_BLOCK), device=step.device)
    constant = torch.zeros_like(block)
    counter = (block & WORD, constant + (step & WORD), constant + index, _ROUNDING | (block >> 32))
    words = torch.stack(philox4x32(counter, (seed & WORD, (seed >> 32) & WORD)), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[:count]
