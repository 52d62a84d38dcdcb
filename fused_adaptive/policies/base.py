"""The interface of a learning-rate policy, its interval bookkeeping, and its plain form in param groups."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar

from ..backbones import Backbone, Direction, Group
from ..slot import Slot
from ..state import State, StateSpec


class Policy:
    """Owns a dimensionless gain ``γ``, 1 at first: the local learning rate is ``α = lr · γ``.

    Policies are values: immutable, compared by their arguments. Equal policies of several param groups are one policy.
    """

    #: The gain is one an element (else one a tensor, or one for all).
    elementwise: ClassVar[bool] = False
    #: The state entry that counts the calls of ``step()`` in the running interval; None: the policy has no intervals.
    counter: ClassVar[str | None] = None
    #: Whether ``γ`` can differ from 1.
    adapts: ClassVar[bool] = True
    interval: int | None = None
    naive: bool = False

    def resolve(self, backbone: Backbone) -> Policy:
        """The policy with its backbone-dependent defaults filled in."""
        return self

    def check(self, backbone: Backbone, group: Group) -> None:
        """Raises ValueError where the policy cannot drive this backbone with these hyperparameters."""

    def state_spec(self, backbone: Backbone, group: Group) -> dict[str, StateSpec]:
        """The state that a tensor of this policy needs besides its backbone's, by name."""
        return {}

    def shared_names(self) -> tuple[str, ...]:
        """State entries that all tensors of the policy have in common: one that joins late takes the others'."""
        return (self.counter,) if self.counter else ()

    def gain(self, state: State) -> Any:
        """``γ``: a float, or a tensor shaped as the parameter for an elementwise policy."""
        return 1.0

    def ends(self, slots: Sequence[Slot]) -> bool:
        """Whether the step now under way is the last of the interval. ``slots``: all tensors of the policy."""
        if self.counter is None or self.interval is None or not slots:
            return False
        return slots[0].state[self.counter].item() + 1 >= self.interval

    def observe(self, slot: Slot, direction: Direction) -> None:
        """Called for each tensor that is about to move, with its direction."""

    def before_update(self, slots: Sequence[Slot], ending: bool) -> None:
        """Called once a step for all tensors of the policy, before any of them moves."""

    def after_update(self, slots: Sequence[Slot], ending: bool) -> None:
        """Called once a step for all tensors of the policy, after all have moved. Counts the call."""
        if self.counter is not None:
            for slot in slots:
                slot.state[self.counter] += 1

    def end_interval(self, slots: Sequence[Slot]) -> None:
        """Ends the running interval outside of a step: adapts the gains, restarts sums and counts."""

    def restart_interval(self, slots: Sequence[Slot]) -> None:
        """Keeps ``γ``; everything else is as new."""
        for slot in slots:
            for name, spec in self.state_spec(slot.backbone, slot.group).items():
                if name not in ("gain", "element_gain"):
                    spec.reset_(slot.state[name], slot.weight())

    def arguments(self) -> dict[str, Any]:
        """Name and arguments as numbers, strings and None, as they stand in a param group and on disk."""
        names = [f.name for f in fields(self)]  # type: ignore[arg-type]  # every policy is a dataclass
        return {"name": type(self).__name__} | {name: getattr(self, name) for name in names}

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Policy:
        """The policy that :meth:`arguments` describes, without its name."""
        return cls(**arguments)


@dataclass(frozen=True)
class FixedLR(Policy):
    """``γ = 1``: the backbone alone, bit for bit its ``torch.optim`` namesake in float32 and float64 on the CPU."""

    adapts: ClassVar[bool] = False


class ScalarPolicy(Policy):
    """A policy whose gain is one number: for all tensors (``granularity="global"``) or for each (``"tensor"``).

    With ``"global"`` every tensor's state holds the same number.
    """

    granularity: str

    def gain(self, state: State) -> float:
        return state["gain"].item()

    def shared_names(self) -> tuple[str, ...]:
        return super().shared_names() + (("gain",) if self.granularity == "global" else ())

    def units(self, slots: Sequence[Slot]) -> list[list[Slot]]:
        """The tensors, parted by gain."""
        if self.granularity == "global":
            return [list(slots)] if slots else []
        return [[slot] for slot in slots]


def ascend(unit: Sequence[Slot], amount: float) -> None:
    """``γ ← max(0, γ + amount)``; ``γ`` stays where the amount is not finite."""
    if math.isfinite(amount):
        for slot in unit:
            slot.state["gain"].add_(amount).clamp_(min=0)


class _Required:
    def __repr__(self) -> str:
        return "<required>"


#: Stands for an argument that has to be given.
REQUIRED: Any = _Required()


def check_interval(policy: str, interval: Any) -> int | None:
    """A positive int, or None. Raises TypeError or ValueError that says what to pass."""
    remedy = (
        "pass a number of optimizer steps (fused_adaptive.steps_per_epoch(loader) is an epoch), or None to end "
        "intervals by optimizer.end_interval()"
    )
    if interval is REQUIRED:
        raise TypeError(f"{policy} needs interval=: {remedy}")
    if interval is None:
        return None
    try:
        steps = operator.index(interval)
    except TypeError:
        raise TypeError(f"{policy}: interval must be an int or None, got {interval!r}; {remedy}") from None
    if isinstance(interval, bool) or steps < 1:
        raise ValueError(f"{policy}: interval must be at least 1, got {interval!r}; {remedy}")
    return steps


def check_granularity(policy: str, granularity: Any) -> None:
    if granularity not in ("global", "tensor"):
        raise ValueError(f"{policy}: granularity must be 'global' or 'tensor', got {granularity!r}")


def check_number(policy: str, name: str, value: Any, valid: Callable[[float], bool], condition: str) -> float:
    """The value as a plain float, which goes on disk. Raises TypeError or ValueError that says what it must be."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{policy}: {name} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or not valid(number):
        raise ValueError(f"{policy}: {name} must be {condition}, got {value!r}")
    return number


def set_field(policy: Policy, name: str, value: Any) -> None:
    """Normalises a field of a frozen dataclass while it is being made."""
    object.__setattr__(policy, name, value)
