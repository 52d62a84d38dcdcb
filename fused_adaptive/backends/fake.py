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
    from ..core.random_rates import RandomRates
    from ..engine.participants import Participants

name = "shapes"
supports_masters = True


def is_fake(value: Any) -> bool:
    """Whether it is a tensor without numbers. Imports nothing: without the module there are none."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and module.is_fake(value)


def why_not(devices: Iterable[torch.device]) -> str:
    """It runs wherever tensors are fake."""
    return ""


def step(
    participants: Participants, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: RandomRates | None
) -> None:
    """Creates the state that a step creates itself, SGD's buffers.

    Raises:
        RuntimeError: for a gradient that cannot be used, and where parameters have numbers after all.
    """
    participants.check_gradients()
    real = next((view for view in participants.views if not is_fake(view.param)), None)
    if real is not None:
        raise RuntimeError(
            f"parameter {real.index} has numbers, and the optimizer was built for tensors of FakeTensorMode, which "
            "have none: build another for these parameters"
        )
    for view in participants.views:
        for entry, spec in specs(view.backbone, view.group, view.param.dtype).items() if view.applies else ():
            if entry not in view.state:
                view.state[entry] = spec.create(view.param, view.group)


def end_interval(participants: Participants) -> None:
    """Nothing: there are no gains to adjust."""
