"""An independent float64 oracle of every backbone with every policy, written from the definitions of the algorithms.

It shares no arithmetic with the package, and uses only the policies' arguments. It changes no tensor in place, and
counts one interval per policy, where the package counts per tensor. It does not have ``TrainableLR(naive=True)``,
which needs a loss, and ASLR's draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fused_adaptive as fa

from .oracle_backbones import DIRECTIONS


@dataclass
class Group:
    """A param group: initial values of its tensors, hyperparameters, and the backbone's ``options``."""

    values: Sequence[Tensor]
    lr: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    policies: tuple[fa.Policy, ...]
    options: dict[str, Any]
    largest_lr: float = 0.0


@dataclass(eq=False)
class Parameter:
    """A tensor in training. ``gradient``: of this step (None: missing). ``direction``: the last one."""

    value: Tensor
    group: Group
    rules: list[Rule]
    gradient: Any = None
    direction: Tensor | None = None
    steps: int = 0
    moments: dict[str, Tensor] = field(default_factory=dict)

    def coupled_gradient(self) -> Tensor:
        """Returns ``ĝ = g + wd·p`` with coupled decay, else ``g``."""
        coupled = self.group.weight_decay != 0 and not self.group.decoupled
        return self.gradient + self.group.weight_decay * self.value if coupled else self.gradient

    def average(self, name: str, sample: Tensor, beta: float) -> Tensor:
        """Updates an exponential average that starts at 0."""
        self.moments[name] = beta * self.moments.get(name, torch.zeros_like(sample)) + (1 - beta) * sample
        return self.moments[name]

    def maximum(self, sample: Tensor) -> Tensor:
        """Returns the largest sample so far."""
        self.moments["maximum"] = torch.maximum(self.moments.get("maximum", sample), sample)
        return self.moments["maximum"]


# ---- policies: from gradients, directions and movements to the gain γ ----


class Rule:
    """Gains of a policy, and its memory of tensors that have had a gradient. As FixedLR: ``γ = 1``."""

    #: Name of the gain in ``optimizer.state[p]``.
    gain_name = "gain"

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.groups: list[Group] = []
        self.calls = 0
        self.memory: dict[Parameter, Any] = {}
        self.gains: dict[Parameter | None, Any] = {}

    def fresh(self, parameter: Parameter) -> Any:
        """Returns the memory of a tensor at its first gradient, or at a restart of its interval."""

    def owner(self, parameter: Parameter) -> Parameter | None:
        """Returns the parameter whose gain applies to this one; None if one gain is global."""
        return None if getattr(self.policy, "granularity", "") == "global" else parameter

    def gain(self, parameter: Parameter) -> Any:
        """Returns ``γ``: a number, or one per element for ActiveLR."""
        return self.gains.get(self.owner(parameter), 1.0)

    def units(self) -> list[list[Parameter]]:
        """Returns the tensors, grouped by gain."""
        owners = {self.owner(parameter) for parameter in self.memory}
        return [[parameter for parameter in self.memory if self.owner(parameter) is owner] for owner in owners]

    def reference_rate(self, unit: Sequence[Parameter]) -> float:
        """Returns ``L``: the largest rate that any group with this gain has had."""
        groups = self.groups if self.owner(unit[0]) is None else [unit[0].group]
        return max(group.largest_lr for group in groups)

    def ascend(self, unit: Sequence[Parameter], slope: float) -> None:
        """Sets ``γ ← max(0, γ + slope/L²)``, unless that is not finite."""
        reference = self.reference_rate(unit)
        if reference > 0 and math.isfinite(slope / reference**2):
            self.adjust(unit, max(0.0, self.gain(unit[0]) + slope / reference**2))

    def adjust(self, unit: Sequence[Parameter], gain: float) -> None:
        """Sets a gain, limited by its bounds."""
        low, high = getattr(self.policy, "gain_bounds", None) or (-math.inf, math.inf)
        self.gains[self.owner(unit[0])] = min(max(gain, low), high)

    def moving(self) -> list[tuple[Any, Parameter]]:
        """Returns the tensors with a gradient in this step, with their memory."""
        return [(memory, parameter) for parameter, memory in self.memory.items() if parameter.gradient is not None]

    def count_call(self) -> bool:
        """Counts a call of ``step()``, with or without gradients. Returns whether it ends the interval."""
        self.calls += 1
        ending = self.policy.interval is not None and self.calls >= self.policy.interval
        self.calls = 0 if ending else self.calls
        return ending

    def before_moves(self, ending: bool) -> None:
        """Called when all gradients are set and no tensor has moved."""

    def after_moves(self, ending: bool) -> None:
        """Called when all tensors have moved."""

    def end_interval(self) -> None:
        """Called when the user ends the interval."""

    def restart_interval(self) -> None:
        """Keeps the gains and resets the rest."""
        self.memory = {parameter: self.fresh(parameter) for parameter in self.memory}


class ActiveRule(Rule):
    """ActiveLR: gains grow where the sum of the raw gradients keeps its sign from one interval to the next."""

    gain_name = "element_gain"

    def fresh(self, parameter: Parameter) -> Any:
        self.gains.setdefault(parameter, torch.ones_like(parameter.value))
        zeros = torch.zeros_like(parameter.value)
        return SimpleNamespace(total=zeros, sign_prev=zeros, applied=0, could_move=False)

    def after_moves(self, ending: bool) -> None:
        for memory, parameter in self.moving():
            memory.total = memory.total + parameter.gradient
            memory.applied += 1
            memory.could_move = parameter.group.lr != 0
        if ending:
            self.end_interval()

    def end_interval(self) -> None:
        for parameter, memory in self.memory.items():
            if memory.applied > 0 and memory.could_move:
                self.gains[parameter] = self.adjusted(memory, parameter)
            memory.total, memory.applied = torch.zeros_like(memory.total), 0

    def adjusted(self, memory: Any, parameter: Parameter) -> Tensor:
        """Returns a tensor's gains at the end of an interval. Nonfinite sums shrink them and count as sign 0."""
        gain, finite, before = self.gains[parameter], memory.total.isfinite(), memory.sign_prev
        sign = torch.where(finite, memory.total.sign(), 0.0)
        new = torch.where(sign * before > 0, self.grown(gain, parameter), gain * self.policy.low)
        if self.policy.gain_bounds is not None:
            new = new.clamp(*self.policy.gain_bounds)
        tells_nothing = finite & (sign * before == 0)
        if self.policy.on_zero == "hold":
            new, sign = torch.where(tells_nothing, gain, new), torch.where(finite & (sign == 0), before, sign)
        memory.sign_prev = sign
        return new

    def grown(self, gain: Tensor, parameter: Parameter) -> Tensor:
        """Returns the gains of elements that kept their signs. An increment is added to the rate."""
        if self.policy.high is not None:
            return gain + self.policy.high
        return gain + self.increment(parameter) / parameter.group.largest_lr

    def increment(self, parameter: Parameter) -> float:
        """Returns the increment, by default the backbone's."""
        if self.policy.increment is not None:
            return self.policy.increment
        return 0.1 if "momentum" in parameter.group.options else 1e-4


class TrainableRule(Rule):
    """TrainableLR: a Newton step on the gain, or with ``eta`` a gradient step, from the gradients of two intervals."""

    def fresh(self, parameter: Parameter) -> Any:
        zeros, interval = torch.zeros_like(parameter.value), {"applied": 0, "lr_sum": 0.0, "last_lr": 0.0}
        return SimpleNamespace(previous=zeros, applied_prev=0, start=parameter.value, gradient_sum=zeros, **interval)

    def adapts_before_the_last_move(self) -> bool:
        """With gradients, the last update uses the new gain. Displacements need the last update first."""
        return self.policy.source == "gradient"

    def before_moves(self, ending: bool) -> None:
        for parameter, memory in self.memory.items():
            memory.last_lr = parameter.group.lr
        for memory, parameter in self.moving():
            memory.gradient_sum = memory.gradient_sum + parameter.gradient
            memory.lr_sum += parameter.group.lr
            memory.applied += 1
        if ending and self.adapts_before_the_last_move():
            self.adapt()

    def after_moves(self, ending: bool) -> None:
        if ending:
            self.end_interval(adapted=self.adapts_before_the_last_move())

    def end_interval(self, adapted: bool = False) -> None:
        if not adapted:
            self.adapt()
        for parameter, ended in self.memory.items():
            self.memory[parameter] = self.fresh(parameter)
            self.memory[parameter].previous, self.memory[parameter].applied_prev = ended.previous, ended.applied_prev

    def adapt(self) -> None:
        for unit in self.units():
            measured = [parameter for parameter in unit if self.is_measurable(parameter)]
            products = [self.measure(parameter) for parameter in measured]
            if measured and self.policy.eta is not None:
                slopes = [self.slope(p, *product) for p, product in zip(measured, products, strict=True)]
                self.ascend(unit, self.policy.eta * sum(slopes))
            elif measured:
                inner, square = sum(p[0] for p in products), sum(p[1] for p in products)
                self.adjust(unit, self.gain(unit[0]) * newton_factor(inner, square, self.policy.c))
                self.forget_nonfinite(measured, inner, square)

    def is_measurable(self, parameter: Parameter) -> bool:
        """Returns whether the parameter could move in the interval."""
        return self.memory[parameter].lr_sum != 0 and (self.gain(parameter) != 0 or self.policy.source == "gradient")

    def measure(self, parameter: Parameter) -> tuple[float, float]:
        """Returns ``num`` and ``sq`` of one tensor, and stores what the next interval is compared with."""
        memory = self.memory[parameter]
        mean = direction = memory.gradient_sum / memory.applied
        if self.policy.source != "gradient":
            direction = (memory.start - parameter.value) / (self.gain(parameter) * memory.lr_sum)
        products = inner_products(self.policy.source, mean, direction, memory.previous)
        memory.previous = direction
        return products

    def forget_nonfinite(self, measured: Sequence[Parameter], inner: float, square: float) -> None:
        """Sets ``G_prev ← 0`` if an inner product is not finite."""
        if not (math.isfinite(inner) and math.isfinite(square)):
            for parameter in measured:
                self.memory[parameter].previous = torch.zeros_like(parameter.value)

    def slope(self, parameter: Parameter, inner: float, square: float) -> float:
        """Returns ``lr·⟨ΣG, ΣG_prev⟩``."""
        memory = self.memory[parameter]
        self.forget_nonfinite([parameter], inner, square)
        steps, memory.applied_prev = memory.applied * memory.applied_prev, memory.applied
        return memory.last_lr * inner * steps


def inner_products(source: str, mean: Tensor, direction: Tensor, previous: Tensor) -> tuple[float, float]:
    """Returns ``⟨G, previous⟩`` and ``⟨G, direction⟩``. ``G`` is the mean gradient, for displacements the direction."""
    left = direction if source == "displacement" else mean
    return (left * previous).sum().item(), (left * direction).sum().item()


def newton_factor(inner: float, square: float, c: float) -> float:
    """Returns eq. 9. Only a preconditioned metric can exceed the bounds or have no positive curvature."""
    if not (math.isfinite(inner) and math.isfinite(square)):
        return 3 / 4
    if inner == 0:
        return 1.0
    curvature = max(4 * (square - inner), inner / c)
    return 3 / 4 if curvature <= 0 else min(1 + c, max(3 / 4, 1 + inner / curvature))


class HypergradientRule(Rule):
    """Hypergradient: the gain follows ``⟨ĝ, u_prev⟩``, summed over all tensors before any of them moves."""

    def before_moves(self, ending: bool) -> None:
        for unit in self.units():
            slopes = [self.slope(p) for p in unit if p.gradient is not None and p.group.lr != 0]
            self.ascend(unit, self.policy.hyper_lr * sum(slopes))

    def slope(self, parameter: Parameter) -> float:
        """Returns ``lr·⟨ĝ, u_prev⟩``; 0 if there is no earlier direction, for any gradient."""
        if parameter.direction is None:
            return 0.0
        return parameter.group.lr * (parameter.coupled_gradient() * parameter.direction).sum().item()

    def restart_interval(self) -> None:
        """Removes the last direction, which is not valid after a restart."""
        for parameter in self.memory:
            parameter.direction = None


RULES = {fa.ActiveLR: ActiveRule, fa.TrainableLR: TrainableRule, fa.Hypergradient: HypergradientRule, fa.FixedLR: Rule}


def decay_factor(alpha: Any, weight_decay: float, adapts: bool) -> Tensor:
    """Returns the factor of decoupled decay. With an adapting policy it is never negative."""
    factor = torch.as_tensor(1 - alpha * weight_decay, dtype=torch.float64)
    return factor.clamp(min=0) if adapts else factor


class Oracle:
    """An optimizer of one backbone over param groups with policies of their own; equal policies are shared."""

    def __init__(self, backbone: str) -> None:
        self.backbone = backbone
        self.groups: list[Group] = []
        self.parameters: list[Parameter] = []
        self.rules: dict[fa.Policy, Rule] = {}

    def add_group(self, group: Group) -> None:
        self.groups.append(group)
        group.largest_lr = group.lr
        rules = [self.rules.setdefault(policy, RULES[type(policy)](policy)) for policy in group.policies]
        for rule in rules:
            rule.groups.append(group)
        self.parameters += [Parameter(value, group, rules) for value in group.values]

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for group in self.groups:
            group.largest_lr = max(group.largest_lr, group.lr)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.gradient = -gradient if gradient is not None and parameter.group.maximize else gradient
            if gradient is not None and parameter.steps == 0:
                for rule in parameter.rules:
                    rule.memory[parameter] = rule.fresh(parameter)
        endings = [(rule, rule.count_call()) for rule in self.rules.values()]
        for rule, ending in endings:
            rule.before_moves(ending)
        for parameter in self.parameters:
            if parameter.gradient is not None:
                self.move(parameter)
        for rule, ending in endings:
            rule.after_moves(ending)

    def move(self, parameter: Parameter) -> None:
        """Sets ``p ← p·max(0, 1 − α·wd) − α·u`` with ``α = lr·γ``."""
        group = parameter.group
        alpha: Any = group.lr
        for rule in parameter.rules:
            alpha = alpha * rule.gain(parameter)
        parameter.steps += 1
        parameter.direction = DIRECTIONS[self.backbone](parameter, parameter.coupled_gradient())
        weight_decay = group.weight_decay if group.decoupled else 0.0
        decay = decay_factor(alpha, weight_decay, group.policies != (fa.FixedLR(),))
        parameter.value = parameter.value * decay - alpha * parameter.direction

    def reload(self) -> None:
        """Saving and loading has no effect."""

    def end_interval(self) -> None:
        for rule in self.rules.values():
            rule.calls = 0
            rule.end_interval()

    def restart_interval(self) -> None:
        for rule in self.rules.values():
            rule.calls = 0
            rule.restart_interval()
