"""The package against the float64 oracle in random trials: parameters and gains after every event.

A trial is a script of random events: steps with missing, zero and nonfinite gradients or none at all, changes of lr
(also to 0), ends and restarts of intervals, new groups, saving and loading. The package and the oracle play the same
script. Groups have equal or different policies, tuples with two intervals, coupled or decoupled decay up to the
clamp.

``FUSED_ADAPTIVE_TRIALS`` in the environment sets the number of trials per backbone (default 40), for a longer search.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_adaptive as fa

from ..common.breaking import broken
from ..common.cases import BACKENDS
from . import oracle
from .oracle_mistakes import WRONG

TRIALS = int(os.environ.get("FUSED_ADAPTIVE_TRIALS", "40"))
STEPS = 18
OPTIMIZERS: dict[str, type[fa.AdaptiveOptimizer]] = {
    "SGD": fa.SGD,
    "AdamW": fa.AdamW,
    "RAdam": fa.RAdam,
    "AdaBelief": fa.AdaBelief,
}

#: The name of a method of both players, and its arguments.
Event = tuple[str, tuple[Any, ...]]
#: What is compared: the value of every tensor, and its gains after its first gradient.
Snapshot = list[dict[str, Tensor]]


# ---- scripts ----


class Writer:
    """Generates the events of a trial."""

    def __init__(self, backbone: str, seed: int) -> None:
        self.backbone = backbone
        self.random = random.Random(f"{backbone} {seed}")
        self.generator = torch.Generator().manual_seed(seed)
        self.groups: list[oracle.Group] = []
        self.events: list[Event] = []
        kinds = ["active", "trainable", "active × trainable", "hypergradient", "mixed"]
        self.kind = self.random.choices(kinds, weights=[1, 2, 1, 2, 2])[0]
        self.usual_policies = self.policies()
        self.missing = self.random.choice([0.1, 0.4, 0.8])
        self.idle = self.random.choice([0.1, 0.1, 0.4])
        self.nonfinite = self.random.choice([0.0, 0.0, 0.03])
        self.nonfinite_newcomer = self.random.choice([0.0, 0.5])
        self.zero = self.random.choice([0.0, 0.0, 0.2])
        self.seen: set[int] = set()

    def write(self) -> list[Event]:
        for _ in range(self.random.choice([1, 2, 3])):
            self.add_group()
        for _ in range(STEPS):
            self.between_steps()
            self.events.append(("step", (self.gradients(),)))
        return self.events

    def between_steps(self) -> None:
        """Adds an event other than a step, one time in four."""
        names = ["end_interval", "restart_interval", "reload", "set_rates", "add_group"]
        name = self.random.choices([*names, ""], weights=[7, 5, 4, 5, 6, 75])[0]
        if name == "add_group":
            self.add_group()
        elif name == "set_rates":
            self.events.append((name, ([self.random.choice([0.1, 0.05, 0.0]) for _ in self.groups],)))
        elif name:
            self.events.append((name, ()))

    def add_group(self) -> None:
        choice = self.random.choice
        shapes = [choice([(), (3,), (2, 2)]) for _ in range(choice([1, 2, 3]))]
        decoupled = choice([True, False])
        group = oracle.Group(
            values=[torch.randn(shape, generator=self.generator, dtype=torch.float64) for shape in shapes],
            lr=choice([0.1, 0.03, 0.1, 0.03, 0.0]),
            weight_decay=choice([0.1, 12.0, 25.0] if decoupled else [0, 0.1]),  # up to the clamp
            decoupled=decoupled,
            maximize=choice([True, False, False]),
            policies=self.usual_policies if choice([True, False]) else self.policies(),
            options=self.options(),
        )
        self.groups.append(group)
        self.events.append(("add_group", (group,)))

    def options(self) -> dict[str, Any]:
        choice = self.random.choice
        if self.backbone == "SGD":
            momentum, nesterov = choice([(0, False), (0.5, False), (0.5, True)])
            return {"momentum": momentum, "nesterov": nesterov, "dampening": 0 if nesterov else choice([0, 0.2])}
        options: dict[str, Any] = {"betas": choice([(0.9, 0.99), (0.7, 0.9)]), "eps": choice([1e-8, 1e-2])}
        if self.backbone == "AdaBelief":
            options["rectify"] = choice([True, False])
        return options if self.backbone == "RAdam" else options | {"amsgrad": choice([True, False])}

    def policies(self) -> tuple[fa.Policy, ...]:
        choice, kind = self.random.choice, self.kind
        if kind == "mixed":
            kind = choice(["active", "trainable", "active × trainable", "hypergradient", "fixed", "fixed"])
        if kind == "active":
            return (self.active(),)
        if kind == "trainable":
            return (self.trainable(["gradient", "preconditioned", "displacement"]),)
        if kind == "active × trainable":
            pair = (self.active(), self.trainable(["gradient"]))
            return choice([pair, pair[::-1]])
        if kind == "hypergradient":
            return (fa.Hypergradient(choice([1e-3, 3e-2]), granularity=choice(["global", "tensor"])),)
        return (fa.FixedLR(),)

    def active(self) -> fa.ActiveLR:
        choice = self.random.choice
        growth = choice([{"high": 0.1}, {"high": 0.3}, {"increment": 0.01}, {"increment": 0.04}])
        return fa.ActiveLR(
            interval=choice([1, 2, 3, 5, None]),
            low=choice([0.9, 0.6]),
            on_zero=choice(["hold", "shrink"]),
            gain_bounds=choice([None, (0.5, 1.3)]),
            **growth,
        )

    def trainable(self, sources: Sequence[str]) -> fa.TrainableLR:
        choice = self.random.choice
        source = choice([s for s in sources if s != "displacement" or self.backbone == "SGD"])
        eta = None if source == "preconditioned" else choice([None, None, 1e-3, 3e-2])
        interval, granularity = choice([1, 2, 3, 5, None]), choice(["global", "tensor"])
        return fa.TrainableLR(
            interval=interval,
            granularity=granularity,
            source=source,
            eta=eta,
            c=choice([0.25, 0.25, 0.05, 1.0]),
            gain_bounds=choice([None, None, (0.8, 1.1)]),
        )

    def gradients(self) -> list[Tensor | None]:
        idle = self.random.random() < self.idle
        shapes = [value.shape for group in self.groups for value in group.values]
        return [None if idle else self.gradient(index, shape) for index, shape in enumerate(shapes)]

    def gradient(self, index: int, shape: torch.Size) -> Tensor | None:
        if self.random.random() < self.missing:
            return None
        gradient = torch.randn(shape, generator=self.generator, dtype=torch.float64) + 0.3
        if self.random.random() < self.zero:
            gradient.view(-1)[0] = 0
        is_newcomer = index not in self.seen and len(self.events) > 5  # other tensors have moved before
        if self.random.random() < (self.nonfinite_newcomer if is_newcomer else self.nonfinite):
            gradient.view(-1)[0] = self.random.choice([math.nan, math.inf])
        self.seen.add(index)
        return gradient


# ---- players ----


class OraclePlayer(oracle.Oracle):
    def set_rates(self, rates: Sequence[float]) -> None:
        for group, lr in zip(self.groups, rates, strict=True):
            group.lr = lr

    def snapshot(self) -> Snapshot:
        return [{"value": parameter.value, **self.gains(parameter)} for parameter in self.parameters]

    def gains(self, parameter: oracle.Parameter) -> dict[str, Tensor]:
        rules = [rule for rule in parameter.rules if parameter.steps > 0 and type(rule) is not oracle.Rule]
        return {rule.gain_name: torch.as_tensor(rule.gain(parameter), dtype=torch.float64) for rule in rules}


class PackagePlayer:
    def __init__(self, backbone: str, backend: str) -> None:
        self.make = partial(OPTIMIZERS[backbone], backend=backend)
        self.optimizer: Any = None

    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def add_group(self, group: oracle.Group) -> None:
        arguments: dict[str, Any] = {
            "params": [value.clone().requires_grad_() for value in group.values],
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "decoupled_weight_decay": group.decoupled,
            "maximize": group.maximize,
            "policy": group.policies,
            **group.options,
        }
        if self.optimizer is None:
            self.optimizer = self.make([arguments])
        else:
            self.optimizer.add_param_group(arguments)

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        for p, gradient in zip(self.parameters(), gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        self.optimizer.step()

    def set_rates(self, rates: Sequence[float]) -> None:
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr

    def end_interval(self) -> None:
        self.optimizer.end_interval()

    def restart_interval(self) -> None:
        self.optimizer.restart_interval()

    def reload(self) -> None:
        """Saves to a file and loads into an optimizer with other hyperparameters; the checkpoint has all of them."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        groups = [[p.detach().clone().requires_grad_() for p in g["params"]] for g in self.optimizer.param_groups]
        self.optimizer = self.make([{"params": params} for params in groups], lr=0.7)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))

    def snapshot(self) -> Snapshot:
        names, state = ("gain", "element_gain"), self.optimizer.state
        gains = [{n: state[p][n].clone() for n in names if n in state.get(p, {})} for p in self.parameters()]
        return [{"value": p.detach().clone(), **g} for p, g in zip(self.parameters(), gains, strict=True)]


@cache
def package_trial(backbone: str, seed: int, backend: str) -> tuple[list[Event], list[Snapshot]]:
    """Returns the script, and the package's results."""
    events = Writer(backbone, seed).write()
    return events, play(PackagePlayer(backbone, backend), events)


def play(player: Any, events: Sequence[Event]) -> list[Snapshot]:
    snapshots = []
    for name, arguments in events:
        # Groups are copied, since the oracle changes their lr.
        getattr(player, name)(*(replace(a) if isinstance(a, oracle.Group) else a for a in arguments))
        snapshots.append(player.snapshot())
    return snapshots


def first_difference(backbone: str, seed: int, backend: str = "reference") -> str:
    """Returns where the package first differs from the oracle in a trial; empty if it does not."""
    events, ours = package_trial(backbone, seed, backend)
    theirs = play(OraclePlayer(backbone), events)
    for i, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        for j, (a, b) in enumerate(zip(mine, yours, strict=True)):
            if a.keys() != b.keys() or not all(is_close(a[name], b[name]) for name in a):
                played = [name for name, _ in events[: i + 1]]
                groups = [arguments[0] for name, arguments in events[: i + 1] if name == "add_group"]
                return f"{backbone}, seed {seed}, event {i}, parameter {j}: {a} != {b}\n{played}\n{groups}"
    return ""


def is_close(a: Tensor, b: Tensor) -> bool:
    """Float64 values may differ by roundings, which gains amplify. Nonfinite values must be in the same places."""
    a, b = (torch.where(x.isfinite(), x, math.nan) for x in (a, b))
    return torch.allclose(a, b.expand_as(a), rtol=1e-8, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("backbone", OPTIMIZERS)
@settings(max_examples=TRIALS, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(seed=st.integers(0, 10**9))
def test_the_package_agrees_with_the_oracle(backbone, backend, seed):
    assert first_difference(backbone, seed, backend) == ""


@pytest.mark.parametrize("variant", WRONG)
def test_a_wrong_variant_is_noticed(variant):
    """It must be noticed within the number of trials that the right oracle passes."""
    with broken(*WRONG[variant]):
        seeds = range(max(TRIALS, 40))
        noticed = next(((b, seed) for seed in seeds for b in OPTIMIZERS if first_difference(b, seed)), None)
    assert noticed is not None
    assert first_difference(*noticed) == ""
