"""Interface of a backbone: how a gradient becomes a direction ``u``.

A backbone is stateless. It reads its hyperparameters from the param group at every step, as torch does, so schedulers
may change them. ``update`` updates the moments and returns the direction in factored form, in the order of operations
of torch's single-tensor optimizers: each of them multiplies by the learning rate at a different place, and with a fixed
rate the results equal torch's bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .state import State, StateSpec

Group = Mapping[str, Any]


class Direction(Protocol):
    """Direction ``u`` of one step."""

    def tensor(self) -> Tensor:
        """Returns ``u`` as one tensor. It may alias a gradient or a moment: do not write to it."""
        ...

    def descend_(self, p: Tensor, alpha: float) -> None:
        """Computes ``p ← p − α·u`` in place for a scalar ``α``."""
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
    """``u = factor · numerator / divisor / denominator`` (AdamW, AdaBelief)."""

    numerator: Tensor
    divisor: float
    denominator: Tensor | None = None
    factor: float = 1.0

    def tensor(self) -> Tensor:
        u = self.numerator / self.divisor if self.factor == 1 else self.numerator * (self.factor / self.divisor)
        return u if self.denominator is None else u.div_(self.denominator)

    def descend_(self, p: Tensor, alpha: float) -> None:
        value = -(alpha * self.factor / self.divisor)
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


@dataclass(frozen=True, slots=True)
class Sum:
    """``u = first + second`` (NAdam)."""

    first: Direction
    second: Direction

    def tensor(self) -> Tensor:
        return self.first.tensor() + self.second.tensor()

    def descend_(self, p: Tensor, alpha: float) -> None:
        self.first.descend_(p, alpha)
        self.second.descend_(p, alpha)


class Backbone:
    """Base class of backbones.

    Attributes:
        adaptive: whether a second moment scales the direction.
        increment, low: defaults of ActiveLR's arguments.
    """

    name: str
    adaptive = True
    increment = 1e-4
    low = 0.9

    def state_spec(self, group: Group) -> dict[str, StateSpec]:
        """Returns the declarations of the state that the update needs, by torch's names."""
        raise NotImplementedError

    def static_options(self, group: Group) -> tuple[Any, ...]:
        """Returns the options that decide which state exists and which kernel runs; numbers such as lr do not.

        Any code may change them between two steps. The participants are then collected again.
        """
        names = ("maximize", "decoupled_weight_decay", "capturable", "fused", "master", "rounding_seed")
        return *map(group.get, names), *self.structure(group)

    def structure(self, group: Group) -> tuple[Any, ...]:
        """Returns the backbone's structure in this group: the static options that change the meaning of the state.

        After a change of these, the direction of the last step does not follow from the state.
        """
        return ()

    def update(self, grad: Tensor, state: State, group: Group) -> Direction:
        """Updates the moments in place with ``ĝ = grad`` (float32 or float64) and returns the direction."""
        raise NotImplementedError

    def direction(self, state: State, group: Group) -> Direction:
        """Returns the direction of the last applied step, computed from the present state, which must have seen a step.

        Bias corrections use the group's present betas.
        """
        raise NotImplementedError

    def has_direction(self, state: State) -> bool | Tensor:
        """Returns whether the state has seen a step; a 0-dim tensor if that is known on the state's device only."""
        raise NotImplementedError

    def direction_in_state(self, group: Group) -> bool:
        """Returns whether :meth:`direction` can be computed from the state alone."""
        return True

    def momentum(self, step: float, group: Group) -> float:
        """Returns the factor by which a step changes ``mu_product``, if the backbone has that (NAdam)."""
        raise NotImplementedError
