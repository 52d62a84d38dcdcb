"""SGD with momentum, dampening and Nesterov."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.backbone import Backbone, Direction, Group, Plain
from ..core.state import State, StateSpec
from .active import Active
from .base import AdaptiveOptimizer
from .options import Options, Params, shows_options


class SGDBackbone(Backbone):
    """Stochastic gradient descent with momentum, dampening and Nesterov, as in ``torch.optim.SGD``."""

    name = "SGD"
    adaptive = False
    increment = 1e-2
    low = 0.5

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        # The buffer starts as a copy of the first ĝ, so the update creates it.
        return {"momentum_buffer": StateSpec(optional=True)} if group["momentum"] != 0 else {}

    def structure(self, group: Group) -> tuple[Any, ...]:
        return bool(group["momentum"] != 0), group["nesterov"]

    def update(self, grad: Tensor, state: State, group: Group) -> Direction:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        if momentum == 0:
            return Plain(grad)
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.clone(grad).detach()
        else:
            buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
        return Plain(grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer)

    def direction(self, state: State, group: Group) -> Direction:
        return Plain(state["momentum_buffer"])

    def has_direction(self, state: State) -> bool | Tensor:
        return state.get("momentum_buffer") is not None

    def direction_in_state(self, group: Group) -> bool:
        return group["momentum"] != 0 and not group["nesterov"]


class SGD(AdaptiveOptimizer):
    """Stochastic gradient descent with momentum; replaces ``torch.optim.SGD``.

    ``b ← μ·b + (1 − dampening)·ĝ`` (``b = ĝ`` in the first step), ``u = b``; with Nesterov ``u = ĝ + μ·b``. State:
    ``momentum_buffer``, 4 bytes per parameter in float32, with momentum; none without. Decay is coupled by default.
    """

    backbone = SGDBackbone()

    @shows_options
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)


class ActiveSGD(Active, SGD):
    """``SGD(…, policy=ActiveLR(interval=…))``, the paper's ActiveSGD."""
