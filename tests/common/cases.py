"""The test matrix as data: optimizers × policies, and functions that build and train them.

A new case is one line here. All tests that are parametrized over the matrix include it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa

#: name → (class, arguments). Weight decay is never 0, since tests without it do not notice a wrong decay.
OPTIMIZERS: dict[str, tuple[type[fa.AdaptiveOptimizer], dict[str, Any]]] = {
    "SGD": (fa.SGD, {"lr": 0.05, "weight_decay": 0.1}),
    "SGD-momentum": (fa.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "SGD-nesterov": (fa.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": (fa.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW": (fa.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "AdamW-amsgrad": (fa.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "RAdam": (fa.RAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "NAdam": (fa.NAdam, {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.05}),
    "AdaBelief": (fa.AdaBelief, {"lr": 0.01, "weight_decay": 0.1}),
    "AdaBelief-plain": (fa.AdaBelief, {"lr": 0.01, "weight_decay": 0.1, "rectify": False, "amsgrad": True}),
}

POLICIES: dict[str, Any] = {
    "fixed": None,
    "active": fa.ActiveLR(interval=3),
    "active-increment": fa.ActiveLR(interval=2, increment=0.02, low=0.6, gain_bounds=(0.5, 2.2)),
    "active-shrink": fa.ActiveLR(interval=2, high=0.3, low=0.5, on_zero="shrink", gain_bounds=(0.2, 1.5)),
    "tlr-displacement-global": fa.TrainableLR(interval=3, source="displacement"),
    "tlr-displacement-tensor": fa.TrainableLR(interval=2, source="displacement", granularity="tensor", c=2.0),
    "tlr-gradient-global": fa.TrainableLR(interval=2, source="gradient"),
    "tlr-gradient-tensor": fa.TrainableLR(
        interval=3, source="gradient", granularity="tensor", c=0.1, gain_bounds=(0.9, 1.1)
    ),
    "tlr-gradient-eta": fa.TrainableLR(interval=2, source="gradient", eta=1e-3, gain_bounds=(0.5, 1.2)),
    "tlr-preconditioned-global": fa.TrainableLR(interval=2, source="preconditioned"),
    "tlr-preconditioned-tensor": fa.TrainableLR(interval=3, source="preconditioned", granularity="tensor", c=0.05),
    "tlr-times-active": (fa.TrainableLR(interval=2, source="gradient"), fa.ActiveLR(interval=3)),
    "hypergradient-global": fa.Hypergradient(1e-4),
    "hypergradient-tensor": fa.Hypergradient(1e-4, granularity="tensor"),
}


WHY_NOT = fa.backends.available(["cpu"])
#: Backends that can run on the CPU here. All but the reference have kernels.
BACKENDS = [name for name, why_not in WHY_NOT.items() if not why_not]
KERNELS = [name for name in BACKENDS if name != "reference"]
needs_native = pytest.mark.skipif("native" not in BACKENDS, reason=WHY_NOT["native"])


@dataclass(frozen=True)
class Case:
    optimizer: str
    policy: str
    decoupled: bool
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.optimizer}-{self.policy}-{'decoupled' if self.decoupled else 'coupled'}"

    def build(self, params: Any, **overrides: Any) -> fa.AdaptiveOptimizer:
        cls, arguments = OPTIMIZERS[self.optimizer]
        arguments = {"policy": POLICIES[self.policy], "decoupled_weight_decay": self.decoupled, **arguments}
        return cls(params, **{**arguments, **self.extra, **overrides})


def is_allowed(optimizer: str, policy: str) -> bool:
    """Returns whether the algorithms allow the pair: displacements need directions that scale with the gradient."""
    return "displacement" not in policy or optimizer.startswith("SGD")


CASES = [Case(o, p, d) for o in OPTIMIZERS for p in POLICIES if is_allowed(o, p) for d in (False, True)]

every_case = pytest.mark.parametrize("case", CASES, ids=str)

SHAPES = [(7,), (3, 5), (), (2, 3, 4), (0,), (129,)]


def parameters(
    dtype: torch.dtype = torch.float64, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


class Gradients:
    """Random gradients, reproducible by (seed, step, parameter). Some are missing."""

    def __init__(self, seed: int = 1, missing: float = 0.0) -> None:
        self.seed, self.missing = seed, missing

    def set(self, params: Sequence[Tensor], step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.3 * (-1) ** i
            gone = torch.rand((), generator=generator) < self.missing
            p.grad = None if gone else grad.to(p.device, p.dtype)


def train(
    optimizer: torch.optim.Optimizer, steps: int, start: int = 0, gradients: Gradients | None = None
) -> list[Tensor]:
    """Steps on random gradients; returns the parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = gradients or Gradients()
    for step in range(start, start + steps):
        gradients.set(params, step)
        optimizer.step()
    return params


def all_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@contextmanager
def unmoved(params: Sequence[Tensor]) -> Iterator[None]:
    """Returns a context in which no parameter may move, as in a step that is refused."""
    before = [p.detach().clone() for p in params]
    yield
    assert all_equal(params, before), "a parameter has moved"


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns all state tensors under unique names, to compare optimizers."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": value for i, values in state.items() for name, value in values.items()}
