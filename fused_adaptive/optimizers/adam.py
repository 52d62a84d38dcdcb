"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.backbone import Direction, Group, Quotient
from ..core.state import ELEMENTS, State, StateSpec, step_spec
from .active import Active
from .base import AdaptiveOptimizer
from .moments import MomentBackbone, bias_corrections
from .options import Betas, Options, Params, shows_options


class AdamWBackbone(MomentBackbone):
    """Adam with coupled or decoupled decay, as in ``torch.optim.Adam`` and ``torch.optim.AdamW``."""

    name = "AdamW"

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        spec = {"step": step_spec(), "exp_avg": ELEMENTS, "exp_avg_sq": ELEMENTS}
        return spec | {"max_exp_avg_sq": ELEMENTS} if group["amsgrad"] else spec

    def structure(self, group: Group) -> tuple[Any, ...]:
        return (group["amsgrad"],)

    def update_second_moment(self, grad: Tensor, beta2: float, state: State, group: Group) -> None:
        super().update_second_moment(grad, beta2, state, group)
        if group["amsgrad"]:
            torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"], out=state["max_exp_avg_sq"])

    def direction(self, state: State, group: Group) -> Direction:
        bias_correction1, bias_correction2 = bias_corrections(state, group)
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        denominator = (second.sqrt() / bias_correction2**0.5).add_(group["eps"])
        return Quotient(state["exp_avg"], bias_correction1, denominator)


class Adam(AdaptiveOptimizer):
    """Adam; replaces ``torch.optim.Adam``. Decay is coupled by default.

    ``m ← β1·m + (1 − β1)·ĝ``, ``v ← β2·v + (1 − β2)·ĝ²``, ``u = (m/bc1) / (√v/√bc2 + ε)``. ``amsgrad=True`` uses the
    running maximum of ``v`` in the denominator. State: ``step``, ``exp_avg``, ``exp_avg_sq`` (and
    ``max_exp_avg_sq``), 8 (12) bytes per parameter in float32.
    """

    backbone = AdamWBackbone()

    @shows_options
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)


class AdamW(Adam):
    """Adam with decoupled decay; replaces ``torch.optim.AdamW``. State and arguments are those of :class:`Adam`."""

    _own_flags = ("decoupled_weight_decay",)

    @shows_options
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=decoupled_weight_decay, **options
        )


class ActiveAdam(Active, Adam):
    """``Adam(…, policy=ActiveLR(interval=…))``, the paper's ActiveAdam."""


class ActiveAdamW(Active, AdamW):
    """``AdamW(…, policy=ActiveLR(interval=…))``, the paper's ActiveAdamW."""
