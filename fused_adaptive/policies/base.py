"""Interface of a learning-rate policy, its count of steps in an interval, and its plain form in param groups."""

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
    """Base class of policies. A policy has a dimensionless gain ``γ``, initially 1: the local rate is ``α = lr · γ``.

    Policies are immutable values and are compared by their arguments. Equal policies of several param groups are one
    policy.
    """

    #: Whether there is one gain per element; else there is one per tensor, or one for all tensors.
    elementwise: ClassVar[bool] = False
    #: State entry that counts the calls of ``step()`` in the current interval; None: the policy has no intervals.
    counter: ClassVar[str | None] = None
    #: Whether ``γ`` can differ from 1.
    adapts: ClassVar[bool] = True
    interval: int | None = None
    naive: bool = False

    def resolve(self, backbone: Backbone, groups: Sequence[Group]) -> Policy:
        """Returns the policy with the defaults filled in that depend on the backbone or on the groups that get it."""
        return self

    def check(self, backbone: Backbone, group: Group) -> None:
        """Raises ValueError if the policy cannot drive this backbone with these hyperparameters."""

    def advice(self, backbone: Backbone, groups: Sequence[Group]) -> str:
        """Returns a warning for a user who sets the policy, not resolved yet, on these groups; "" if there is none."""
        return ""

    def state_spec(self, backbone: Backbone, group: Group) -> dict[str, StateSpec]:
        """Returns the declarations of the state that a tensor of this policy needs besides its backbone's."""
        return {}

    def shared_names(self) -> tuple[str, ...]:
        """Returns the state entries that all tensors of the policy share. A tensor that joins later copies them."""
        return (self.counter,) if self.counter else ()

    @property
    def shares_gain(self) -> bool:
        """Whether all tensors of the policy share one gain."""
        return "gain" in self.shared_names()

    def gain(self, state: State) -> Any:
        """Returns ``γ``: a float, or for an elementwise policy a tensor shaped as the parameter."""
        return 1.0

    def ends(self, views: Sequence[ParamView]) -> bool:
        """Returns whether the current step is the last of the interval. ``views``: all tensors of the policy."""
        if self.counter is None or self.interval is None or not views:
            return False
        return views[0].state[self.counter].item() + 1 >= self.interval

    def join(self, view: ParamView, created: Collection[str]) -> None:
        """Called for a tensor after the entries ``created`` were added to its state, with their initial values."""

    def continues(self, earlier: Policy) -> bool:
        """Returns whether running sums of a tensor's earlier policy have the same meaning under this policy."""
        return type(self) is type(earlier)

    def reset_direction(self, view: ParamView) -> None:
        """Called for a tensor whose backbone's structure has changed, for example by turning on amsgrad."""

    def observe(self, view: ParamView, direction: Direction) -> None:
        """Called for each tensor before it moves, with its direction."""

    def before_update(self, views: Sequence[ParamView], ending: bool) -> None:
        """Called once per step for all tensors of the policy, before any of them moves."""

    def after_update(self, views: Sequence[ParamView], ending: bool) -> None:
        """Called once per step for all tensors of the policy, after all of them have moved. Counts the call."""
        if self.counter is not None:
            for view in views:
                view.state[self.counter] += 1

    def end_interval(self, views: Sequence[ParamView]) -> None:
        """Ends the current interval outside of a step: adapts the gains, and restarts sums and counts."""

    def restart_interval(self, views: Sequence[ParamView]) -> None:
        """Resets all state of the policy except ``γ``."""
        for view in views:
            for name, spec in self.state_spec(view.backbone, view.group).items():
                if name not in ("gain", "element_gain"):
                    spec.reset_(view.state[name], view.weight())

    def arguments(self) -> dict[str, Any]:
        """Returns name and arguments as numbers, strings and None: the plain form in param groups and on disk."""
        arguments = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # a dataclass
        if "gain_bounds" in arguments:
            low, high = arguments.pop("gain_bounds") or (None, None)
            arguments |= {"gain_min": low, "gain_max": high}
        return {"name": type(self).__name__} | arguments

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> Policy:
        """Creates a policy from what :meth:`arguments` returns, without the name."""
        arguments = dict(arguments)
        bounds = (arguments.pop("gain_min", None), arguments.pop("gain_max", None))
        if bounds != (None, None):
            arguments["gain_bounds"] = bounds
        return cls(**arguments)


@dataclass(frozen=True)
class FixedLR(Policy):
    """``γ = 1``: equals the backbone's ``torch.optim`` namesake bit for bit in float32 and float64 on the CPU."""

    adapts: ClassVar[bool] = False


class ScalarPolicy(Policy):
    """Base class of policies with one gain for all tensors (``granularity="global"``) or one for each (``"tensor"``).

    With ``"global"`` the state of every tensor holds the same number.
    """

    granularity: str
    #: ``(lo, hi)``: limits of the gain, applied when it is adjusted.
    gain_bounds: tuple[float, float] | None = None

    def gain(self, state: State) -> float:
        return state["gain"].item()

    def shared_names(self) -> tuple[str, ...]:
        return super().shared_names() + (("gain",) if self.granularity == "global" else ())

    def units(self, views: Sequence[ParamView]) -> list[list[ParamView]]:
        """Returns lists of tensors, one list for each gain."""
        if self.granularity == "global":
            return [list(views)] if views else []
        return [[view] for view in views]

    def ascend(self, unit: Sequence[ParamView], step_size: float, slope: float) -> None:
        """Computes ``γ ← max(0, γ + step_size·slope/L²)`` in place.

        ``L`` is the largest reference rate of the groups that share the gain.

        Args:
            unit: tensors that share one gain.
            step_size: step size of the gain's ascent, ``hyper_lr`` or ``eta``.
            slope: sum of ``lr·⟨·,·⟩`` over the unit. If it is not finite, or ``L`` is 0, ``γ`` does not change.
        """
        scale = unit[0].lr_scale
        amount = step_size * slope / (scale * scale) if scale > 0 else math.nan
        if math.isfinite(amount):
            for view in unit:
                view.state["gain"].add_(amount).clamp_(min=0)
            self.clamp(unit)

    def clamp(self, unit: Sequence[ParamView]) -> None:
        """Clamps adjusted gains to ``gain_bounds``."""
        if self.gain_bounds is not None:
            for view in unit:
                view.state["gain"].clamp_(*self.gain_bounds)


class _Required:
    def __repr__(self) -> str:
        return "<required>"


#: Default of an argument that must be given.
REQUIRED: Any = _Required()
#: The longest interval: its steps are counted in int64.
_LONGEST = 2**63 - 1


def check_interval(policy: str, interval: Any) -> int | None:
    """Returns a positive int, or None. Raises TypeError or ValueError that says what to pass."""
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
    if steps > _LONGEST:
        raise ValueError(f"{policy}: interval must be below 2**63, got {interval!r}; None never ends by itself")
    return steps


def check_bounds(policy: str, bounds: Any) -> tuple[float, float] | None:
    """Returns ``gain_bounds`` as plain floats. Raises TypeError or ValueError that says what they must be."""
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
    """Returns the value as a plain float for checkpoints. Raises TypeError or ValueError that says what it must be."""
    if isinstance(plain(value), (bool, Tensor)):
        raise TypeError(f"{policy}: {name} must be a number, got {value!r}")
    number = float(plain_number(f"{policy}: {name}", value))
    if not math.isfinite(number) or not valid(number):
        raise ValueError(f"{policy}: {name} must be {condition}, got {value!r}")
    return number


def set_field(policy: Policy, name: str, value: Any) -> None:
    """Sets a field of a frozen dataclass during its construction."""
    object.__setattr__(policy, name, value)
