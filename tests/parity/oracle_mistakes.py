"""Wrong variants of the oracle, which the random trials must notice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import oracle, oracle_backbones


def count_only_calls_with_gradients(rule: oracle.Rule) -> bool:
    """Calls without any gradient do not count."""
    rule.calls += bool(rule.moving())
    ending = rule.policy.interval is not None and rule.calls >= rule.policy.interval
    rule.calls = 0 if ending else rule.calls
    return ending


def use_square_of_gradient(source: str, mean: Tensor, direction: Tensor, previous: Tensor) -> tuple[float, float]:
    """The preconditioned metric uses ⟨G, G⟩ instead of ⟨G, U⟩."""
    left = direction if source == "displacement" else mean
    return (left * previous).sum().item(), (left * left).sum().item()


def newton_without_ceiling(inner: float, square: float, c: float) -> float:
    """Eq. 9 without c."""
    if not (math.isfinite(inner) and math.isfinite(square)) or square <= inner:
        return 0.75
    return max(0.75, 1 + inner / (4 * (square - inner)))


def newton_deaf_to_nonfinite(inner: float, square: float, c: float, right: Any = oracle.newton_factor) -> float:
    return right(inner, square, c) if math.isfinite(inner) and math.isfinite(square) else 1.0


def newton_of_a_quarter(inner: float, square: float, c: float, right: Any = oracle.newton_factor) -> float:
    """The argument c is ignored."""
    return right(inner, square, 0.25)


def ascend_unclamped(rule: oracle.Rule, unit: Sequence[oracle.Parameter], slope: float) -> None:
    reference = rule.reference_rate(unit)
    if reference > 0 and math.isfinite(slope / reference**2):
        rule.gains[rule.owner(unit[0])] = rule.gain(unit[0]) + slope / reference**2


def zero_times_nan(rule: oracle.HypergradientRule, parameter: oracle.Parameter) -> float:
    """The initial direction is zeros, and 0 times a nonfinite gradient is not 0."""
    previous = torch.zeros_like(parameter.value) if parameter.direction is None else parameter.direction
    return parameter.group.lr * (parameter.coupled_gradient() * previous).sum().item()


def rate_of_the_moment(rule: oracle.Rule, unit: Sequence[oracle.Parameter]) -> float:
    """Increments are divided by the current lr."""
    return max(parameter.group.lr for parameter in unit)


def own_reference_rate(rule: oracle.Rule, unit: Sequence[oracle.Parameter]) -> float:
    """The reference rate is that of the first group, although others share the gain."""
    return unit[0].group.largest_lr


def adjust_without_bounds(rule: oracle.Rule, unit: Sequence[oracle.Parameter], gain: float) -> None:
    rule.gains[rule.owner(unit[0])] = gain


def learn_at_rest(rule: oracle.TrainableRule, parameter: oracle.Parameter) -> bool:
    """Tensors that could not move are measured too."""
    return rule.memory[parameter].applied > 0


def no_coupled_decay(parameter: oracle.Parameter) -> Tensor:
    """Coupled decay is left out."""
    return parameter.gradient


def forget_gains(rule: oracle.Rule) -> None:
    rule.gains.clear()
    rule.memory = {parameter: rule.fresh(parameter) for parameter in rule.memory}


def keep_everything(rule: oracle.Rule) -> None:
    """A restart resets only the counts."""


#: Wrong variants by name: what is replaced, and by what.
WRONG: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "growth is a factor": (oracle.ActiveRule, "grown", lambda rule, gain, parameter: gain * 1.1),
    "increments of the gain": (
        oracle.ActiveRule,
        "grown",
        lambda rule, gain, parameter: gain + (rule.policy.high or rule.increment(parameter)),
    ),
    "increments by the rate of the moment": (
        oracle.ActiveRule,
        "grown",
        lambda rule, gain, parameter: gain + (rule.policy.high or rule.policy.increment / parameter.group.lr),
    ),
    "slopes by the rate of the moment": (oracle.Rule, "reference_rate", rate_of_the_moment),
    "slopes by one group's rate": (oracle.Rule, "reference_rate", own_reference_rate),
    "scalar gains without bounds": (oracle.Rule, "adjust", adjust_without_bounds),
    "what rests is measured": (oracle.TrainableRule, "is_measurable", learn_at_rest),
    "c is a quarter": (oracle, "newton_factor", newton_of_a_quarter),
    "idle calls not counted": (oracle.Rule, "count_call", count_only_calls_with_gradients),
    "decay not clamped": (oracle, "decay_factor", lambda alpha, decay, adapts: 1 - alpha * decay),
    "decay of a fixed rate clamped": (
        oracle,
        "decay_factor",
        lambda alpha, decay, adapts, right=oracle.decay_factor: right(alpha, decay, True),
    ),
    "coupled decay forgotten": (oracle.Parameter, "coupled_gradient", no_coupled_decay),
    "square of the raw gradient": (oracle, "inner_products", use_square_of_gradient),
    "growth without ceiling": (oracle, "newton_factor", newton_without_ceiling),
    "not finite changes nothing": (oracle, "newton_factor", newton_deaf_to_nonfinite),
    "gain after the last move": (oracle.TrainableRule, "adapts_before_the_last_move", lambda rule: False),
    "one gain a tensor": (oracle.Rule, "owner", lambda rule, parameter: parameter),
    "negative gains": (oracle.Rule, "ascend", ascend_unclamped),
    "zero times NaN": (oracle.HypergradientRule, "slope", zero_times_nan),
    "a restart keeps directions": (oracle.HypergradientRule, "restart_interval", lambda rule: None),
    "restart forgets gains": (oracle.Rule, "restart_interval", forget_gains),
    "restart keeps sums": (oracle.Rule, "restart_interval", keep_everything),
    "loading forgets gains": (oracle.Oracle, "reload", lambda player: [forget_gains(r) for r in player.rules.values()]),
    "maximum of nothing": (oracle.Parameter, "maximum", lambda parameter, sample: sample),
    "no rectification": (oracle_backbones, "rectification", lambda beta2, step: (math.inf, 1.0)),
}
