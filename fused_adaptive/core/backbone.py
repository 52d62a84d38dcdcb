"""What a backbone is: how a gradient becomes a direction ``u``, in torch's single-tensor order of operations.

A backbone is stateless. Its hyperparameters are read from the param group at every step, as in torch, so that
schedulers may change them. ``update`` moves the moments and returns the direction *not multiplied out*: torch lets
the learning rate enter at a different place in each optimizer, and with a fixed rate we equal it bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .state import State, StateSpec

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

    def static_options(self, group: Group) -> tuple[Any, ...]:
        """What decides which state there is and which kernel runs, as against mere numbers such as lr.

        Anyone may change it between two steps; then the tensors are collected anew.
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
