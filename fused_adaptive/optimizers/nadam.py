"""Adam with Nesterov momentum."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..core.backbone import Direction, Group, Quotient, Sum
from ..core.state import ELEMENTS, State, StateSpec, step_spec
from .active import Active
from .base import AdaptiveOptimizer
from .moments import MomentBackbone, bias_corrections
from .options import Betas, Options, Params, shows_options


class NAdamBackbone(MomentBackbone):
    """Adam with Nesterov momentum, as in ``torch.optim.NAdam``. Its direction does not follow from the state alone."""

    name = "NAdam"

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        return {
            "step": step_spec(),
            "mu_product": step_spec(fill=1.0),
            "exp_avg": ELEMENTS,
            "exp_avg_sq": ELEMENTS,
        }

    def momentum(self, step: float, group: Group) -> float:
        beta1, momentum_decay = float(group["betas"][0]), float(group["momentum_decay"])
        return beta1 * (1.0 - 0.5 * (0.96 ** (step * momentum_decay)))

    def update(self, grad: Tensor, state: State, group: Group) -> Direction:
        self.update_moments(grad, state, group)
        step = state["step"].item()
        mu, mu_next = self.momentum(step, group), self.momentum(step + 1, group)
        state["mu_product"] *= mu
        product = state["mu_product"].item()
        _, bias_correction2 = bias_corrections(state, group)
        denominator = state["exp_avg_sq"].div(bias_correction2).sqrt().add_(group["eps"])
        return Sum(
            Quotient(grad, 1 - product, denominator, factor=1 - mu),
            Quotient(state["exp_avg"], 1 - product * mu_next, denominator, factor=mu_next),
        )

    def direction_in_state(self, group: Group) -> bool:
        return False


class NAdam(AdaptiveOptimizer):
    """Adam with Nesterov momentum [Dozat 2016]; replaces ``torch.optim.NAdam``. Decay is coupled by default.

    The moments are those of :class:`Adam`; ``μ_t = β1·(1 − 0.96^(t·momentum_decay) / 2)`` and
    ``u = ((1 − μ_t)/(1 − Π_t)·ĝ + μ_{t+1}/(1 − Π_t·μ_{t+1})·m) / (√(v/bc2) + ε)``, where ``Π_t`` is the product of
    ``μ_1 … μ_t``. State: ``step``, ``mu_product``, ``exp_avg``, ``exp_avg_sq``, 8 bytes per parameter in float32.

    Args:
        momentum_decay: how fast the momentum grows from ``β1/2`` to ``β1``. Default 4e-3.
    """

    backbone = NAdamBackbone()

    @shows_options
    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, **options)


class ActiveNAdam(Active, NAdam):
    """``NAdam(…, policy=ActiveLR(interval=…))``."""
