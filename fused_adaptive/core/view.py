"""What one step sees of one parameter: the unit of work that the base class hands to policies and backends."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import masters
from .backbone import Backbone
from .checks import check_hyperparameters
from .declarations import Hyper
from .ranks import Ranks
from .state import State, state_dtype

#: Inner products are summed in float64 over chunks of this many elements, then over the chunks, in index order.
CHUNK = 16384


@dataclass(slots=True)
class ParamView:
    """A parameter that has state, with its group and, where it has one, its gradient. Kept between steps.

    Args:
        param: any dense floating-point tensor; of a DTensor, this rank's part.
        state: ``optimizer.state[param]``, complete; of a DTensor, this rank's parts.
        group: the param group; hyperparameters are read from it.
        backbone: stateless.
        policies: of the group.
        index: the parameter's position over all param groups.
        grad_scale: 0-dim tensor that gradients are divided by (AMP), or None; set anew for each step by who reads it.
        rate_factor: ASLR's factor on ``γ``, 1 without ASLR; likewise.
        ranks: those that hold parts of the parameter; None if this one holds all of it.
        scale_groups: the param groups under the tensor's scalar gain; none but its own if it shares it with no other.
    """

    param: Tensor
    state: State
    group: dict[str, Any]
    backbone: Backbone
    policies: tuple[Any, ...] = ()
    index: int = 0
    grad_scale: Tensor | None = None
    rate_factor: float = 1.0
    ranks: Ranks | None = None
    scale_groups: tuple[dict[str, Any], ...] = ()

    @property
    def applies(self) -> bool:
        """Whether the parameter has a gradient in this step."""
        return self.param.grad is not None

    @property
    def lr(self) -> float:
        return float(self.group["lr"])

    @property
    def lr_ref(self) -> float:
        """The reference rate of its group."""
        return reference_rate(self.group)

    @property
    def lr_scale(self) -> float:
        """The largest reference rate of the groups under its scalar gain."""
        return max(map(reference_rate, self.scale_groups or (self.group,)))

    @property
    def has_rate(self) -> bool:
        """False while it cannot move and so teaches nothing: lr is 0 now, or always was."""
        return has_rate(self.group)

    def weight(self) -> Tensor:
        """The parameter in the state's dtype: exact where it has a float32 master, itself where that is its dtype."""
        return masters.read(self.param, self.state)

    def grad(self) -> Tensor:
        """``g``: unscaled, negated when maximizing, in the state's dtype. May alias ``p.grad``: for reading only."""
        grad = self.param.grad
        assert grad is not None
        grad = grad.to(state_dtype(self.param))
        if self.grad_scale is not None:
            # As GradScaler.unscale_ does, and clip_grad_norm_: the rounded factor multiplies.
            grad = grad * _precise(self.grad_scale).reciprocal().to(grad.device, grad.dtype)
        return -grad if self.group["maximize"] else grad

    def coupled_grad(self, param: Tensor | None = None) -> Tensor:
        """``ĝ``: with weight decay added where it is coupled. ``param``: the parameter in the state's dtype."""
        grad, weight_decay = self.grad(), float(self.group["weight_decay"])
        if weight_decay == 0 or self.group["decoupled_weight_decay"]:
            return grad
        param = self.weight() if param is None else param
        return grad.add(param.to(grad.dtype), alpha=weight_decay)


def reference_rate(group: dict[str, Any]) -> float:
    """``lr_ref`` of a param group, 0 where no policy adapts."""
    return group.get("lr_ref", 0.0)


def numbers_of(group: dict[str, Any], lr_scale: float = 0.0, lr_on_device: bool = False) -> Hyper:
    """The numbers of a param group as the kernels take them.

    Args:
        group: any of which the optimizer has.
        lr_scale: the largest reference rate of the groups under its scalar gain.
        lr_on_device: the lr is not to be read, since the host would wait for it; it is NaN here.

    Raises:
        TypeError, ValueError: for what is no number.
    """
    try:
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        return Hyper(
            lr=math.nan if lr_on_device else float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group.get("eps", 0.0)),
            momentum=float(group.get("momentum", 0.0)),
            dampening=float(group.get("dampening", 0.0)),
            lr_ref=reference_rate(group),
            lr_scale=lr_scale,
        )
    except (TypeError, ValueError, RuntimeError):
        check_hyperparameters(group)  # which names the culprit
        raise


def has_rate(group: dict[str, Any]) -> bool:
    """Whether a param group can move what it holds. Waits for the device where lr is a tensor there."""
    return float(group["lr"]) != 0 and reference_rate(group) != 0


def _precise(scale: Tensor) -> Tensor:
    return scale if scale.device.type == "mps" else scale.double()  # MPS has no float64


def inner_product(a: Tensor, b: Tensor) -> float:
    """``⟨a, b⟩`` in float64, in an order that does not depend on the number of threads."""
    sums = a.to(torch.float64).mul(b).flatten()
    while sums.numel() > 1:
        padding = -sums.numel() % CHUNK if sums.numel() > CHUNK else 0
        sums = torch.nn.functional.pad(sums, (0, padding)).view(-1, min(CHUNK, sums.numel() + padding)).sum(dim=1)
    return sums.item() if sums.numel() else 0.0


def applied(views: Iterable[ParamView]) -> list[ParamView]:
    """Those with a gradient in this step."""
    return [view for view in views if view.applies]
