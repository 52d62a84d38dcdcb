"""The interface of a learning-rate policy, its interval bookkeeping, and its plain form in param groups."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..core.backbone import Backbone, Direction, Group
from ..core.plain import plain, plain_number
from ..core.state import State, StateSpec
from ..core.view import ParamView


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

    def resolve(self, backbone: Backbone, groups: Sequence[Group]) -> Policy:
        """The policy with the defaults filled in that depend on the backbone or on the groups that it is given to."""
        return self

    def check(self, backbone: Backbone, group: Group) -> None:
        """Raises ValueError where the policy cannot drive this backbone with these hyperparameters."""

    def advice(self, backbone: Backbone, groups: Sequence[Group]) -> str:
        """What a user who gives these groups the policy, not resolved yet, should be warned of; "" if nothing."""
        return ""

    def state_spec(self, backbone: Backbone, group: Group) -> dict[str, StateSpec]:
        """The state that a tensor of this policy needs besides its backbone's, by name."""
        return {}

    def shared_names(self) -> tuple[str, ...]:
        """State entries that all tensors of the policy have in common: one that joins late takes the others'."""
        return (self.counter,) if self.counter else ()

    def gain(self, state: State) -> Any:
        """``γ``: a float, or a tensor shaped as the parameter for an elementwise policy."""
        return 1.0

    def ends(self, views: Sequence[ParamView]) -> bool:
        """Whether the step now under way is the last of the interval. ``views``: all tensors of the policy."""
        if self.counter is None or self.interval is None or not views:
            return False
        return views[0].state[self.counter].item() + 1 >= self.interval

    def join(self, view: ParamView, created: Collection[str]) -> None:
        """Called for a tensor that has just got these entries of its state, with their initial values."""

    def continues(self, earlier: Policy) -> bool:
        """Whether the running sums of a tensor's earlier policy mean what this policy's do."""
        return type(self) is type(earlier)

    def reset_direction(self, view: ParamView) -> None:
        """Called for a tensor whose backbone has another variant than before (amsgrad switched on, say)."""

    def observe(self, view: ParamView, direction: Direction) -> None:
        """Called for each tensor that is about to move, with its direction."""

    def before_update(self, views: Sequence[ParamView], ending: bool) -> None:
        """Called once a step for all tensors of the policy, before any of them moves."""

    def after_update(self, views: Sequence[ParamView], ending: bool) -> None:
        """Called once a step for all tensors of the policy, after all have moved. Counts the call."""
        if self.counter is not None:
            for view in views:
                view.state[self.counter] += 1

    def end_interval(self, views: Sequence[ParamView]) -> None:
        """Ends the running interval outside of a step: adapts the gains, restarts sums and counts."""

    def restart_interval(self, views: Sequence[ParamView]) -> None:
        """Keeps ``γ``; everything else is as new."""
        for view in views:
            for name, spec in self.state_spec(view.backbone, view.group).items():
                if name not in ("gain", "element_gain"):
                    spec.reset_(view.state[name], view.weight())

    def arguments(self) -> dict[str, Any]:
        """Name and arguments as numbers, strings and None, as they stand in a param group and on disk."""
        arguments = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # a dataclass
        if "gain_bounds" in arguments:
            low, high = arguments.pop("gain_bounds") or (None, None)
            arguments |= {"gain_min": low, "gain_max": high}
        return {"name": type(self).__name__} | arguments

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Policy:
        """The policy that :meth:`arguments` describes, without its name."""
        arguments = dict(arguments)
        bounds = (arguments.pop("gain_min", None), arguments.pop("gain_max", None))
        if bounds != (None, None):
            arguments["gain_bounds"] = bounds
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
    #: ``(lo, hi)``: what the gain is clamped to whenever it is adjusted.
    gain_bounds: tuple[float, float] | None = None

    def gain(self, state: State) -> float:
        return state["gain"].item()

    def shared_names(self) -> tuple[str, ...]:
        return super().shared_names() + (("gain",) if self.granularity == "global" else ())

    def units(self, views: Sequence[ParamView]) -> list[list[ParamView]]:
        """The tensors, parted by gain."""
        if self.granularity == "global":
            return [list(views)] if views else []
        return [[view] for view in views]

    def ascend(self, unit: Sequence[ParamView], step_size: float, slope: float) -> None:
        """``γ ← max(0, γ + step_size·slope/L²)``, with ``L`` the largest reference rate of the groups under the gain.

        Args:
            unit: the tensors of one gain.
            step_size: of the gain's ascent, ``hyper_lr`` or ``eta``.
            slope: the sum of ``lr·⟨·,·⟩`` over the unit. Where it is not finite, or ``L`` is 0, ``γ`` stays.
        """
        scale = unit[0].lr_scale
        amount = step_size * slope / (scale * scale) if scale > 0 else math.nan
        if math.isfinite(amount):
            for view in unit:
                view.state["gain"].add_(amount).clamp_(min=0)
            self.clamp(unit)

    def clamp(self, unit: Sequence[ParamView]) -> None:
        """Puts gains that have been adjusted within ``gain_bounds``."""
        if self.gain_bounds is not None:
            for view in unit:
                view.state["gain"].clamp_(*self.gain_bounds)


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
    interval = plain(interval)
    try:
        steps = operator.index(interval)
    except TypeError:
        raise TypeError(f"{policy}: interval must be an int or None, got {interval!r}; {remedy}") from None
    if isinstance(interval, bool) or steps < 1:
        raise ValueError(f"{policy}: interval must be at least 1, got {interval!r}; {remedy}")
    return steps


def check_bounds(policy: str, bounds: Any) -> tuple[float, float] | None:
    """``gain_bounds`` as plain floats. Raises TypeError or ValueError that says what they must be."""
    if bounds is None:
        return None
    try:
        lo, hi = (float(plain_number("gain_bounds", bound)) for bound in bounds)
    except (TypeError, ValueError):
        raise TypeError(f"{policy}: gain_bounds must be a pair of numbers (lo, hi) or None, got {bounds!r}") from None
    if not 0 <= lo <= 1 <= hi:
        raise ValueError(f"{policy}: gain_bounds must be (lo, hi) with 0 <= lo <= 1 <= hi, got {(lo, hi)}")
    return lo, hi


def check_granularity(policy: str, granularity: Any) -> None:
    if granularity not in ("global", "tensor"):
        raise ValueError(f"{policy}: granularity must be 'global' or 'tensor', got {granularity!r}")


def check_number(policy: str, name: str, value: Any, valid: Callable[[float], bool], condition: str) -> float:
    """The value as a plain float, which goes on disk. Raises TypeError or ValueError that says what it must be."""
    if isinstance(plain(value), (bool, Tensor)):
        raise TypeError(f"{policy}: {name} must be a number, got {value!r}")
    number = float(plain_number(f"{policy}: {name}", value))
    if not math.isfinite(number) or not valid(number):
        raise ValueError(f"{policy}: {name} must be {condition}, got {value!r}")
    return number


def set_field(policy: Policy, name: str, value: Any) -> None:
    """Normalises a field of a frozen dataclass while it is being made."""
    object.__setattr__(policy, name, value)
