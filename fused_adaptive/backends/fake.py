"""What a step does with the tensors of ``FakeTensorMode``, which have no numbers: it creates the state, and no more.

So tools that estimate memory see the state of every backbone and policy. It has the interface of a backend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.checkpoint import specs

if TYPE_CHECKING:
    from ..core.rate_noise import RateDraw
    from ..engine.views import Gathered

name = "shapes"
supports_masters = True


def is_fake(value: Any) -> bool:
    """Whether it is a tensor without numbers. Imports nothing: without the module there are none."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and module.is_fake(value)


def why_not(devices: Iterable[torch.device]) -> str:
    """It runs wherever tensors are fake."""
    return ""


def step(gathered: Gathered, found_inf: Tensor | None, grad_scale: Tensor | None, draw: RateDraw | None) -> None:
    """Creates the state that a step creates itself, SGD's buffers.

    Raises:
        RuntimeError: for a gradient that cannot be used, and where parameters have numbers after all.
    """
    gathered.check_gradients()
    real = next((slot for slot in gathered.slots if not is_fake(slot.param)), None)
    if real is not None:
        raise RuntimeError(
            f"parameter {real.index} has numbers, and the optimizer was built for tensors of FakeTensorMode, which "
            "have none: build another for these parameters"
        )
    for slot in gathered.slots:
        for entry, spec in specs(slot.backbone, slot.group, slot.param.dtype).items() if slot.applies else ():
            if entry not in slot.state:
                slot.state[entry] = spec.create(slot.param, slot.group)


def end_interval(gathered: Gathered) -> None:
    """Nothing: there are no gains to adjust."""
