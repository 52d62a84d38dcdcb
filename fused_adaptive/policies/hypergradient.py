"""Hypergradient descent: the rate follows the inner product of the gradient and the last direction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from ..core.backbone import Backbone, Direction, Group
from ..core.shards import whole_products
from ..core.state import COUNTER, ELEMENTS, GAIN, StateSpec
from ..core.view import ParamView, applied, inner_product
from .base import ScalarPolicy, check_granularity, check_number, set_field


@dataclass(frozen=True)
class Hypergradient(ScalarPolicy):
    """Learning rates that are adapted by gradient descent on themselves, at every step.

    Source: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018. Before each step,
    with ``u_prev`` the direction of the tensor's last step, decoupled weight decay excluded, and ``L`` the largest
    reference rate (``group["lr_ref"]``) of the groups that share the gain::

        γ ← max(0, γ + hyper_lr · Σ lr·⟨ĝ, u_prev⟩ / L²)

    If lr is constant, this is the source's ``α ← α + hyper_lr·⟨ĝ, u_prev⟩``. All inner products are computed before any
    tensor moves.

    Args:
        hyper_lr: step size of the learning rate, >= 0. Required, as keyword or first argument.
        granularity: ``"global"`` (default): one gain for all tensors; ``"tensor"``: one for each.

    State: no bytes per element if ``u_prev`` follows from the backbone's state (SGD with momentum, AdamW, RAdam,
    AdaBelief; with the group's present betas and eps), else 4 (SGD without momentum, or with Nesterov momentum).
    ``direction_valid`` is 1 if there is a ``u_prev``. After ``restart_interval()``, and after a change of the
    backbone's structure, there is none until the next step. The gain does not change if the sum is not finite, and
    never falls below 0. Code that edits moments must call ``optimizer.restart_interval()``.

    Raises:
        TypeError, ValueError: for any argument outside of the above.
    """

    hyper_lr: float
    granularity: str = "global"

    def __post_init__(self) -> None:
        hyper_lr = check_number("Hypergradient", "hyper_lr", self.hyper_lr, lambda x: x >= 0, "finite and >= 0")
        set_field(self, "hyper_lr", hyper_lr)
        check_granularity("Hypergradient", self.granularity)

    def state_spec(self, backbone: Backbone, group: Group) -> dict[str, StateSpec]:
        spec = {"gain": GAIN, "direction_valid": COUNTER}
        return spec if backbone.direction_in_state(group) else spec | {"direction_prev": ELEMENTS}

    def join(self, view: ParamView, created: Collection[str]) -> None:
        # Moments from before the policy, such as those of a checkpoint of torch.optim, contain the last direction.
        if "direction_valid" in created and view.backbone.direction_in_state(view.group):
            known = torch.as_tensor(view.backbone.has_direction(view.state))
            view.state["direction_valid"].copy_(known)

    def reset_direction(self, view: ParamView) -> None:
        view.state["direction_valid"].zero_()

    def before_update(self, views: Sequence[ParamView], ending: bool) -> None:
        moving = [view for view in applied(views) if view.has_rate and view.state["direction_valid"]]
        products = whole_products(moving, [(_product(view),) for view in moving])
        slopes = {id(view): view.lr * product for view, (product,) in zip(moving, products, strict=True)}
        for unit in self.units(views):
            self.ascend(unit, self.hyper_lr, sum(slopes.get(id(view), 0.0) for view in unit))

    def observe(self, view: ParamView, direction: Direction) -> None:
        if "direction_prev" in view.state:
            view.state["direction_prev"].copy_(direction.tensor())
        view.state["direction_valid"].fill_(1)


def _product(view: ParamView) -> float:
    """Returns ``⟨ĝ, u_prev⟩`` of one tensor."""
    grad = view.coupled_grad()
    if not view.backbone.direction_in_state(view.group):
        return inner_product(grad, view.state["direction_prev"])
    return inner_product(grad, view.backbone.direction(view.state, view.group).tensor())
