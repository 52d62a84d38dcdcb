"""What lives in ``optimizer.state[p]``: declared once, created and reset from the declaration.

Backbones and policies name their state as ``{name: StateSpec}``; nothing else allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def state_dtype(param: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others, bf16 and fp16 included."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One named tensor of a parameter's state.

    Args:
        scalar: 0-dim if True, else shaped and laid out as the parameter.
        dtype: None is :func:`state_dtype` of the parameter.
        fill: the initial value, or ``"parameter"`` for a copy of the parameter.
        host: stays on the CPU, as torch's ``step`` does, unless the group is capturable or fused.
        optional: created by the update itself, so that a checkpoint may lack it.
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
        """As new."""
        dtype = self.dtype_for(param)
        if self.scalar:
            return torch.full((), float(self.fill), dtype=dtype, device=self.device_for(param, group))
        if self.fill == "parameter":
            return param.detach().to(dtype, copy=True)
        return torch.full_like(param, float(self.fill), dtype=dtype, requires_grad=False)

    def reset_(self, value: Tensor, weight: Tensor) -> None:
        """As new. ``weight``: of the parameter, exact where it has a master."""
        if self.fill == "parameter":
            value.copy_(weight)
        else:
            value.fill_(float(self.fill))


def step_spec() -> StateSpec:
    """torch's ``step``: a float on the host; float64 only where that is the default dtype."""
    is_double = torch.get_default_dtype() == torch.float64
    return StateSpec(scalar=True, dtype=torch.float64 if is_double else torch.float32, host=True)


ELEMENTS = StateSpec()
GAIN = StateSpec(scalar=True, dtype=torch.float64, fill=1.0)
SUM = StateSpec(scalar=True, dtype=torch.float64)
COUNTER = StateSpec(scalar=True, dtype=torch.int64, host=True)
