"""The backbones: how a gradient becomes a direction ``u``, in torch's single-tensor order of operations.

A backbone is stateless. Its hyperparameters are read from the param group at every step, as in torch, so that
schedulers may change them. ``update`` moves the moments and returns the direction *not multiplied out*: torch lets
the learning rate enter at a different place in each optimizer, and with a fixed rate we equal it bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .state import ELEMENTS, State, StateSpec, step_spec

Group = Mapping[str, Any]


class Direction(Protocol):
    """The direction ``u`` of one step."""

    def tensor(self) -> Tensor:
        """``u``, multiplied out; may alias a gradient or a moment, so it is for reading only."""
        ...

    def descend_(self, p: Tensor, alpha: float) -> None:
        """``p ← p − α·u`` for a scalar ``α``."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """``u = value`` (SGD)."""

    value: Tensor

    def tensor(self) -> Tensor:
        return self.value

    def descend_(self, p: Tensor, alpha: float) -> None:
        p.add_(self.value, alpha=-alpha)


@dataclass(frozen=True, slots=True)
class Quotient:
    """``u = numerator / divisor / denominator`` (AdamW, AdaBelief)."""

    numerator: Tensor
    divisor: float
    denominator: Tensor | None = None

    def tensor(self) -> Tensor:
        u = self.numerator / self.divisor
        return u if self.denominator is None else u.div_(self.denominator)

    def descend_(self, p: Tensor, alpha: float) -> None:
        value = -(alpha / self.divisor)
        if self.denominator is None:
            p.add_(self.numerator, alpha=value)
        else:
            p.addcdiv_(self.numerator, self.denominator, value=value)


@dataclass(frozen=True, slots=True)
class Product:
    """``u = value · multiplier · factor`` (RAdam)."""

    value: Tensor
    multiplier: Tensor | None = None
    factor: float = 1.0

    def _times(self, value: Tensor) -> Tensor:
        return value if self.multiplier is None else value * self.multiplier * self.factor

    def tensor(self) -> Tensor:
        return self._times(self.value)

    def descend_(self, p: Tensor, alpha: float) -> None:
        p.add_(self._times(self.value * alpha), alpha=-1.0)


class Backbone:
    """Interface of a backbone.

    ``adaptive``: its direction is scaled by a second moment. ``increment``, ``low``: ActiveLR's defaults.
    """

    name: str
    adaptive = True
    increment = 1e-4
    low = 0.9

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        """The state that the update needs, by torch's names."""
        raise NotImplementedError

    def structure(self, group: Group) -> tuple[Any, ...]:
        """What decides which state there is and which kernel runs, as against mere numbers such as lr.

        Anyone may change it between two steps; then the tensors are gathered anew.
        """
        names = ("maximize", "decoupled_weight_decay", "capturable", "fused", "master", "rounding_seed")
        return *(group.get(name) for name in names), *self.variant(group)

    def variant(self, group: Group) -> tuple[Any, ...]:
        """Of that, what changes the meaning of the state: the last step's direction does not follow from it then."""
        return ()

    def update(self, grad: Tensor, state: State, group: Group) -> Direction:
        """Moves the moments by ``ĝ = grad`` (float32 or float64) and returns the direction, in place."""
        raise NotImplementedError

    def direction(self, state: State, group: Group) -> Direction:
        """The direction that the present state stands for, which has seen a step: that of the last applied one.

        Bias corrections use the group's present betas.
        """
        raise NotImplementedError

    def has_direction(self, state: State) -> bool | Tensor:
        """Whether the state has seen a step; a 0-dim tensor where only the state's device knows."""
        raise NotImplementedError

    def direction_in_state(self, group: Group) -> bool:
        """Whether :meth:`direction` can be told from the state alone."""
        return True


class SGD(Backbone):
    """Stochastic gradient descent with momentum, dampening and Nesterov, as ``torch.optim.SGD``."""

    name = "SGD"
    adaptive = False
    increment = 1e-2
    low = 0.5

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        # The first ĝ itself becomes the buffer, so the update creates it.
        return {"momentum_buffer": StateSpec(optional=True)} if group["momentum"] != 0 else {}

    def variant(self, group: Group) -> tuple[Any, ...]:
        return bool(group["momentum"] != 0), group["nesterov"]

    def update(self, grad: Tensor, state: State, group: Group) -> Direction:
        momentum = group["momentum"]
        if momentum == 0:
            return Plain(grad)
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.clone(grad).detach()
        else:
            buffer.mul_(momentum).add_(grad, alpha=1 - group["dampening"])
        return Plain(grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer)

    def direction(self, state: State, group: Group) -> Direction:
        return Plain(state["momentum_buffer"])

    def has_direction(self, state: State) -> bool | Tensor:
        return state.get("momentum_buffer") is not None

    def direction_in_state(self, group: Group) -> bool:
        return group["momentum"] != 0 and not group["nesterov"]


class _MomentBackbone(Backbone):
    """What AdamW, RAdam and AdaBelief share: a step count, a mean ``exp_avg`` and some second moment."""

    def update(self, grad: Tensor, state: State, group: Group) -> Direction:
        beta1, beta2 = map(float, group["betas"])
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        self._update_second_moment(grad, beta2, state, group)
        return self.direction(state, group)

    def has_direction(self, state: State) -> bool | Tensor:
        return state["step"] > 0

    def _update_second_moment(self, grad: Tensor, beta2: float, state: State, group: Group) -> None:
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)


class AdamW(_MomentBackbone):
    """Adam, with coupled or decoupled decay, as ``torch.optim.Adam`` and ``AdamW``."""

    name = "AdamW"

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        spec = {"step": step_spec(), "exp_avg": ELEMENTS, "exp_avg_sq": ELEMENTS}
        return spec | {"max_exp_avg_sq": ELEMENTS} if group["amsgrad"] else spec

    def variant(self, group: Group) -> tuple[Any, ...]:
        return (group["amsgrad"],)

    def _update_second_moment(self, grad: Tensor, beta2: float, state: State, group: Group) -> None:
        super()._update_second_moment(grad, beta2, state, group)
        if group["amsgrad"]:
            torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"], out=state["max_exp_avg_sq"])

    def direction(self, state: State, group: Group) -> Direction:
        bias_correction1, bias_correction2 = bias_corrections(state, group)
        second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        denominator = (second.sqrt() / bias_correction2**0.5).add_(group["eps"])
        return Quotient(state["exp_avg"], bias_correction1, denominator)


class RAdam(_MomentBackbone):
    """Rectified Adam, as ``torch.optim.RAdam``."""

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


class AdaBelief(_MomentBackbone):
    """AdaBelief [Zhuang et al. 2020], as the authors' package 0.2.1: the variance of ``ĝ`` around its own mean."""

    name = "AdaBelief"

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        spec = {"step": step_spec(), "exp_avg": ELEMENTS, "exp_avg_var": ELEMENTS}
        return spec | {"max_exp_avg_var": ELEMENTS} if group["amsgrad"] else spec

    def variant(self, group: Group) -> tuple[Any, ...]:
        return group["amsgrad"], group["rectify"]

    def _update_second_moment(self, grad: Tensor, beta2: float, state: State, group: Group) -> None:
        variance, surprise = state["exp_avg_var"], grad - state["exp_avg"]
        variance.mul_(beta2).addcmul_(surprise, surprise, value=1 - beta2).add_(group["eps"])
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


def bias_corrections(state: State, group: Group) -> tuple[float, float]:
    """``1 − β1^t`` and ``1 − β2^t``."""
    beta1, beta2 = map(float, group["betas"])
    step = state["step"].item()
    return 1 - beta1**step, 1 - beta2**step


def sma_length(state: State, group: Group) -> float:
    """``ρ``, the length of the approximated simple moving average [RAdam, Eq. 3]."""
    beta2, step = float(group["betas"][1]), state["step"].item()
    return _rho_inf(beta2) - 2 * step * (beta2**step) / (1 - beta2**step)


def rectification(rho: float, group: Group) -> float:
    """``r``, the variance rectification [RAdam, Eq. 4]; needs ``ρ > 4``."""
    rho_inf = _rho_inf(float(group["betas"][1]))
    return ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5


def _rho_inf(beta2: float) -> float:
    return 2 / (1 - beta2) - 1
