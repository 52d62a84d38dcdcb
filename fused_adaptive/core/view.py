"""View of one parameter in a step: the unit of work that the base class passes to policies and backends."""

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
    """A parameter that has state, with its param group and its gradient, if any. Views are kept between steps.

    Args:
        param: any dense floating-point tensor; of a DTensor, this rank's part.
        state: ``optimizer.state[param]``, complete; of a DTensor, this rank's parts.
        group: param group, from which hyperparameters are read.
        backbone: backbone of the optimizer, stateless.
        policies: policies of the group.
        index: position of the parameter over all param groups.
        grad_scale: 0-dim tensor by which gradients are divided (AMP), or None. Code that reads it sets it in each step.
        rate_factor: ASLR's factor on ``γ``, 1 without ASLR. Code that reads it sets it in each step.
        ranks: ranks that hold parts of the parameter; None if this rank holds all of it.
        scale_groups: param groups that share the tensor's global gain; empty if its gain is not global.
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
        """Reference rate of the param group."""
        return reference_rate(self.group)

    @property
    def lr_scale(self) -> float:
        """Largest reference rate of the param groups that share the scalar gain."""
        return max(map(reference_rate, self.scale_groups or (self.group,)))

    @property
    def has_rate(self) -> bool:
        """Whether the parameter can move. If lr is 0 now or always was, a step gives no information on the rate."""
        return has_rate(self.group)

    def weight(self) -> Tensor:
        """Returns the parameter in the state's dtype: exact if it has a master, itself if it has that dtype."""
        return masters.read(self.param, self.state)

    def grad(self) -> Tensor:
        """Returns ``g``: unscaled, negated when maximizing, in the state's dtype.

        It may alias ``p.grad``: do not write to it.
        """
        grad = self.param.grad
        assert grad is not None
        grad = grad.to(state_dtype(self.param))
        if self.grad_scale is not None:
            # As in GradScaler.unscale_ and clip_grad_norm_, the rounded reciprocal multiplies.
            grad = grad * _precise(self.grad_scale).reciprocal().to(grad.device, grad.dtype)
        return -grad if self.group["maximize"] else grad

    def coupled_grad(self, param: Tensor | None = None) -> Tensor:
        """Returns ``ĝ``: ``g`` plus weight decay, if that is coupled.

        Args:
            param: the parameter in the state's dtype; None: it is read.
        """
        grad, weight_decay = self.grad(), float(self.group["weight_decay"])
        if weight_decay == 0 or self.group["decoupled_weight_decay"]:
            return grad
        param = self.weight() if param is None else param
        return grad.add(param.to(grad.dtype), alpha=weight_decay)


def reference_rate(group: dict[str, Any]) -> float:
    """Returns ``lr_ref`` of a param group; 0 if no policy adapts."""
    return group.get("lr_ref", 0.0)


def numbers_of(group: dict[str, Any], lr_scale: float = 0.0, lr_on_device: bool = False) -> Hyper:
    """Returns the numbers of a param group for the kernels.

    Args:
        group: param group of any optimizer of this package.
        lr_scale: largest reference rate of the groups that share its scalar gain.
        lr_on_device: whether lr is on a device. It is not read then, since the host would wait; ``lr`` is NaN.

    Raises:
        TypeError, ValueError: for a value that is not a number; for betas and decays out of their ranges.
    """
    try:
        beta1, beta2 = map(float, group.get("betas", (0.0, 0.0)))
        weight_decay, momentum_decay = float(group["weight_decay"]), float(group.get("momentum_decay", 0.0))
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 <= weight_decay < math.inf and momentum_decay >= 0):
            raise ValueError
        return Hyper(
            lr=math.nan if lr_on_device else float(group["lr"]),
            weight_decay=weight_decay,
            beta1=beta1,
            beta2=beta2,
            eps=float(group.get("eps", 0.0)),
            momentum=float(group.get("momentum", 0.0)),
            dampening=float(group.get("dampening", 0.0)),
            mu_decay=0.96**momentum_decay,
            lr_ref=reference_rate(group),
            lr_scale=lr_scale,
        )
    except (TypeError, ValueError, RuntimeError):
        check_hyperparameters(group)  # raises an error that names the culprit
        raise


def has_rate(group: dict[str, Any]) -> bool:
    """Returns whether a param group can move its parameters. Waits for the device if lr is a tensor there."""
    return float(group["lr"]) != 0 and reference_rate(group) != 0


def _precise(scale: Tensor) -> Tensor:
    return scale if scale.device.type == "mps" else scale.double()  # MPS has no float64


def inner_product(a: Tensor, b: Tensor) -> float:
    """Returns ``⟨a, b⟩`` in float64, in an order that does not depend on the number of threads."""
    sums = a.to(torch.float64).mul(b).flatten()
    while sums.numel() > 1:
        padding = -sums.numel() % CHUNK if sums.numel() > CHUNK else 0
        sums = torch.nn.functional.pad(sums, (0, padding)).view(-1, min(CHUNK, sums.numel() + padding)).sum(dim=1)
    return sums.item() if sums.numel() else 0.0


def applied(views: Iterable[ParamView]) -> list[ParamView]:
    """Returns the views with a gradient in this step."""
    return [view for view in views if view.applies]
