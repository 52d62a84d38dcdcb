"""Declarations of the entries of ``optimizer.state[p]``, from which they are created and reset.

Backbones and policies declare their state as ``{name: StateSpec}``; nothing else allocates state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def state_dtype(param: Tensor) -> torch.dtype:
    """Returns float64 for float64 parameters, float32 for all others, bf16 and fp16 included."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class StateSpec:
    """Declaration of one named tensor of a parameter's state.

    Args:
        scalar: whether it is 0-dim; else it has the shape and layout of the parameter.
        dtype: None means :func:`state_dtype` of the parameter.
        fill: initial value, or ``"parameter"`` for a copy of the parameter.
        host: whether it stays on the CPU, as torch's ``step`` does, unless the group is capturable or fused.
        optional: whether the update creates it, so that a checkpoint may lack it.
    """

    scalar: bool = False
    dtype: torch.dtype | None = None
    fill: float | str = 0
    host: bool = False
    optional: bool = False

    def dtype_for(self, param: Tensor) -> torch.dtype:
        return self.dtype or state_dtype(param)

    def device_for(self, param: Tensor, group: Mapping[str, Any]) -> torch.device:
        on_device = group.get("capturable") or group.get("fused")
        return torch.device("cpu") if self.host and not on_device else param.device

    def create(self, param: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Creates the tensor with its initial value."""
        dtype = self.dtype_for(param)
        if self.scalar:
            return torch.full((), float(self.fill), dtype=dtype, device=self.device_for(param, group))
        if self.fill == "parameter":
            return param.detach().to(dtype, copy=True)
        return torch.full_like(param, float(self.fill), dtype=dtype, requires_grad=False)

    def reset_(self, value: Tensor, weight: Tensor) -> None:
        """Resets ``value`` to the initial value. ``weight``: that of the parameter, exact if it has a master."""
        if self.fill == "parameter":
            value.copy_(weight)
        else:
            value.fill_(float(self.fill))


def step_spec(fill: float = 0.0) -> StateSpec:
    """Returns the declaration of torch's ``step``: a float on the host; float64 only if that is the default dtype."""
    is_double = torch.get_default_dtype() == torch.float64
    return StateSpec(scalar=True, dtype=torch.float64 if is_double else torch.float32, fill=fill, host=True)


ELEMENTS = StateSpec()
GAIN = StateSpec(scalar=True, dtype=torch.float64, fill=1.0)
SUM = StateSpec(scalar=True, dtype=torch.float64)
COUNTER = StateSpec(scalar=True, dtype=torch.int64, host=True)
