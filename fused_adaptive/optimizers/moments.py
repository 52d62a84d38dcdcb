"""The base class and the bias corrections of the backbones with a mean and a second moment."""

from __future__ import annotations

from torch import Tensor

from ..core.backbone import Backbone, Direction, Group
from ..core.state import State


class MomentBackbone(Backbone):
    """Base class of AdamW, RAdam, NAdam and AdaBelief: a step count, a mean ``exp_avg`` and a second moment."""

    def update(self, grad: Tensor, state: State, group: Group) -> Direction:
        self.update_moments(grad, state, group)
        return self.direction(state, group)

    def update_moments(self, grad: Tensor, state: State, group: Group) -> None:
        beta1, beta2 = map(float, group["betas"])
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        self.update_second_moment(grad, beta2, state, group)

    def has_direction(self, state: State) -> bool | Tensor:
        return state["step"] > 0

    def update_second_moment(self, grad: Tensor, beta2: float, state: State, group: Group) -> None:
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


def bias_corrections(state: State, group: Group) -> tuple[float, float]:
    """Returns ``1 − β1^t`` and ``1 − β2^t``."""
    beta1, beta2 = map(float, group["betas"])
    step = state["step"].item()
    return 1 - beta1**step, 1 - beta2**step


def sma_length(state: State, group: Group) -> float:
    """Returns ``ρ``, the length of the approximated simple moving average [RAdam, Eq. 3]."""
    beta2, step = float(group["betas"][1]), state["step"].item()
    return _rho_inf(beta2) - 2 * step * (beta2**step) / (1 - beta2**step)


def rectification(rho: float, group: Group) -> float:
    """Returns ``r``, the variance rectification [RAdam, Eq. 4]; requires ``ρ > 4``."""
    rho_inf = _rho_inf(float(group["betas"][1]))
    return ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5


def _rho_inf(beta2: float) -> float:
    return 2 / (1 - beta2) - 1
