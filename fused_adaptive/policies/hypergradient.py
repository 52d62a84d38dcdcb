"""Hypergradient descent: the rate follows the inner product of gradient and last direction."""

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
    """Learning rates by gradient descent on themselves, every step.

    Source: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018. Before each step,
    with ``u_prev`` the direction of the tensor's last one, decoupled decay excluded, and ``L`` the largest reference
    rate (``group["lr_ref"]``) of the groups under the gain::

        γ ← max(0, γ + hyper_lr · Σ lr·⟨ĝ, u_prev⟩ / L²)

    which is the source's ``α ← α + hyper_lr·⟨ĝ, u_prev⟩`` where lr is constant. The inner products are complete before
    any tensor moves.

    Args:
        hyper_lr: step size of the learning rate itself, >= 0. A required keyword or first argument.
        granularity: ``"global"`` (default), one gain for all tensors, or ``"tensor"``, one for each.

    State: no bytes a parameter where the backbone's state gives ``u_prev`` (SGD with momentum, AdamW, RAdam, AdaBelief;
    with the group's present betas and eps), 4 where it does not (SGD without momentum, or with Nesterov's).
    ``direction_valid`` is 1 where there is such a direction: after ``restart_interval()``, and after the backbone's
    structure has changed, there is none until the next step. The gain stays where the sum is not finite, and never
    goes below 0. Code that edits moments calls ``optimizer.restart_interval()``.

    Raises:
        ValueError: on any argument outside of the above.
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
        # Moments that were there before the policy, those of a checkpoint of torch.optim, tell the last direction.
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
    """``⟨ĝ, u_prev⟩`` of one tensor."""
    grad = view.coupled_grad()
    if not view.backbone.direction_in_state(view.group):
        return inner_product(grad, view.state["direction_prev"])
    return inner_product(grad, view.backbone.direction(view.state, view.group).tensor())
