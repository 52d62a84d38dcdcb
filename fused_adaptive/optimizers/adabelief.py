"""AdaBelief."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.backbone import Direction, Group, Quotient
from ..core.state import ELEMENTS, State, StateSpec, step_spec
from .active import Active
from .base import AdaptiveOptimizer
from .moments import MomentBackbone, bias_corrections, rectification, sma_length
from .options import Betas, Options, Params, shows_options


class AdaBeliefBackbone(MomentBackbone):
    """AdaBelief [Zhuang et al. 2020], as in the authors' package 0.2.1; uses the variance of ``ĝ`` around its mean."""

    name = "AdaBelief"

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        spec = {"step": step_spec(), "exp_avg": ELEMENTS, "exp_avg_var": ELEMENTS}
        return spec | {"max_exp_avg_var": ELEMENTS} if group["amsgrad"] else spec

    def structure(self, group: Group) -> tuple[Any, ...]:
        return group["amsgrad"], group["rectify"]

    def update_second_moment(self, grad: Tensor, beta2: float, state: State, group: Group) -> None:
        variance, residual = state["exp_avg_var"], grad - state["exp_avg"]
        variance.mul_(beta2).addcmul_(residual, residual, value=1 - beta2).add_(group["eps"])
        if group["amsgrad"]:
            torch.maximum(state["max_exp_avg_var"], variance, out=state["max_exp_avg_var"])

    def direction(self, state: State, group: Group) -> Direction:
        bias_correction1, bias_correction2 = bias_corrections(state, group)
        mean, variance, eps = state["exp_avg"], state["exp_avg_var"], group["eps"]
        if not group["rectify"]:
            variance = state["max_exp_avg_var"] if group["amsgrad"] else variance
            return Quotient(mean, bias_correction1, (variance.sqrt() / bias_correction2**0.5).add_(eps))
        rho = sma_length(state, group)
        if not rho >= 5.0:
            return Quotient(mean, bias_correction1)
        factor = rectification(rho, group) * bias_correction2**0.5
        return Quotient(mean, bias_correction1 / factor, variance.sqrt().add_(eps))


class AdaBelief(AdaptiveOptimizer):
    """AdaBelief, with the defaults of the authors' package 0.2.1: rectified, decoupled decay, ``eps=1e-16``.

    ``s ← β2·s + (1 − β2)·(ĝ − m)² + ε`` with the new ``m``; ``u = (m/bc1) / (√s/√bc2 + ε)``, rectified as in
    :class:`RAdam` if ``ρ >= 5``. ``amsgrad=True`` uses the running maximum of ``s`` when not rectified. State:
    ``step``, ``exp_avg``, ``exp_avg_var`` (and ``max_exp_avg_var``), 8 (12) bytes per parameter in float32.

    Args:
        rectify: whether to rectify the variance as RAdam does. Default True.
    """

    backbone = AdaBeliefBackbone()

    @shows_options
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        rectify: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "rectify": rectify,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)


class ActiveAdaBelief(Active, AdaBelief):
    """``AdaBelief(…, policy=ActiveLR(interval=…))``, the paper's ActiveBelief."""


ActiveBelief = ActiveAdaBelief
