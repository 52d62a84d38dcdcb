"""Hypergradient descent: the rate follows the inner product of gradient and last direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..backbones import Backbone, Direction, Group
from ..distributed import whole_products
from ..slot import Slot, applied, inner_product
from ..state import ELEMENTS, GAIN, StateSpec
from .base import ScalarPolicy, ascend, check_granularity, check_number, set_field


@dataclass(frozen=True)
class Hypergradient(ScalarPolicy):
    """Learning rates by gradient descent on themselves, every step.

    Source: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018. Before each step,
    with ``u_prev`` the direction of the tensor's last one, decoupled decay excluded::

        γ ← max(0, γ + hyper_lr · ⟨ĝ, u_prev⟩ / lr)

    The inner products are complete before any tensor moves. Groups of different lr add ``⟨·,·⟩ / lr`` each.

    Args:
        hyper_lr: step size of the learning rate itself, >= 0. A required keyword or first argument.
        granularity: ``"global"`` (default), one gain for all tensors, or ``"tensor"``, one for each.

    State: no bytes a parameter where the backbone's state gives ``u_prev`` (SGD with momentum, AdamW, RAdam, AdaBelief;
    with the group's present betas and eps), 4 where it does not (SGD without momentum, or with Nesterov's). The gain
    stays where the inner product is not finite or lr is 0, and never goes below 0.

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
        return {"gain": GAIN} if backbone.direction_in_state(group) else {"gain": GAIN, "direction_prev": ELEMENTS}

    def before_update(self, slots: Sequence[Slot], ending: bool) -> None:
        moving = [slot for slot in applied(slots) if slot.lr != 0]
        products = whole_products(moving, [(_product(slot),) for slot in moving])
        slopes = {id(slot): product / slot.lr for slot, (product,) in zip(moving, products, strict=True)}
        for unit in self.units(slots):
            ascend(unit, self.hyper_lr * sum(slopes.get(id(slot), 0.0) for slot in unit))

    def observe(self, slot: Slot, direction: Direction) -> None:
        if "direction_prev" in slot.state:
            slot.state["direction_prev"].copy_(direction.tensor())


def _product(slot: Slot) -> float:
    """``⟨ĝ, u_prev⟩`` of one tensor; 0 at its first step."""
    grad = slot.coupled_grad()
    if slot.backbone.direction_in_state(slot.group):
        direction = slot.backbone.direction(slot.state, slot.group)
        return 0.0 if direction is None else inner_product(grad, direction.tensor())
    # A stored direction is all zeros before the first step: 0 times a gradient that is not finite is nothing.
    u_prev = slot.state["direction_prev"]
    return inner_product(torch.where(u_prev == 0, 0, grad), u_prev)
