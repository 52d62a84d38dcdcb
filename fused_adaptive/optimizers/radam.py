"""Rectified Adam."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..core.backbone import Direction, Group, Product
from ..core.state import ELEMENTS, State, StateSpec, step_spec
from .active import Active
from .base import AdaptiveOptimizer
from .moments import MomentBackbone, bias_corrections, rectification, sma_length
from .options import Betas, Options, Params, shows_options


class RAdamBackbone(MomentBackbone):
    """Rectified Adam, as in ``torch.optim.RAdam``."""

    name = "RAdam"

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        return {"step": step_spec(), "exp_avg": ELEMENTS, "exp_avg_sq": ELEMENTS}

    def direction(self, state: State, group: Group) -> Direction:
        bias_correction1, bias_correction2 = bias_corrections(state, group)
        corrected = state["exp_avg"] / bias_correction1
        rho = sma_length(state, group)
        if not rho > 5.0:
            return Product(corrected)
        multiplier = bias_correction2**0.5 / state["exp_avg_sq"].sqrt().add_(group["eps"])
        return Product(corrected, multiplier, rectification(rho, group))


class RAdam(AdaptiveOptimizer):
    """Rectified Adam; replaces ``torch.optim.RAdam``. Decay is coupled by default.

    The moments are those of :class:`Adam`; ``u = (m/bc1)·r·√bc2 / (√v + ε)`` if ``ρ > 5``, else ``u = m/bc1``. State:
    ``step``, ``exp_avg``, ``exp_avg_sq``, 8 bytes per parameter in float32.
    """

    backbone = RAdamBackbone()

    @shows_options
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)


class ActiveRAdam(Active, RAdam):
    """``RAdam(…, policy=ActiveLR(interval=…))``, the paper's ActiveRAdam."""
