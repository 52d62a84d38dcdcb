"""The backend for tensors of ``FakeTensorMode``, which have no values: a step only creates the state.

Tools that estimate memory see the state of every backbone and policy this way.
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
    """Checks whether ``value`` is a fake tensor. Imports no module: if it is not loaded, no such tensor exists."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and module.is_fake(value)


def why_not(devices: Iterable[torch.device]) -> str:
    """Returns "": the backend runs on all devices."""
    return ""


def step(
    participants: Participants, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: RandomRates | None
) -> None:
    """Creates the state that backends create during a step: SGD's momentum buffers.

    Raises:
        RuntimeError: for a gradient that cannot be used, and for a parameter that is not a fake tensor.
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
    """Does nothing, since fake tensors have no gains to adjust."""
