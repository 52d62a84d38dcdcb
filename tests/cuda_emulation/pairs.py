"""Pairs of an emulated optimizer and its float64 reference, and what they train on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa

from ..common.tolerances import step_bound
from ..parity.test_parity import excess, state_excesses
from .driver import DTYPES, Emulated, Twin

#: The first element in the far-elements tests.
FAR = 2**31 + 2**20
#: Empty, smaller than a vector, odd, around a power of two, several chunks.
SIZES = [1, 3, 127, 0, 4095, 4097, 20000]
ADAM, SGD = {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.05, "weight_decay": 0.1}
STRUCTURES: dict[str, tuple[type[fa.AdaptiveOptimizer], dict[str, Any]]] = {
    "SgdPlain": (fa.SGD, SGD),
    "SgdMomentum": (fa.SGD, {**SGD, "momentum": 0.9, "dampening": 0.1}),
    "SgdNesterov": (fa.SGD, {**SGD, "momentum": 0.9, "nesterov": True}),
    "AdamWPlain": (fa.AdamW, ADAM),
    "AdamWAmsgrad": (fa.AdamW, {**ADAM, "amsgrad": True}),
    "RAdamPlain": (fa.RAdam, ADAM),
    "NAdamPlain": (fa.NAdam, {**ADAM, "momentum_decay": 0.05}),
    "AdaBeliefPlain": (fa.AdaBelief, {**ADAM, "rectify": False}),
    "AdaBeliefAmsgrad": (fa.AdaBelief, {**ADAM, "rectify": False, "amsgrad": True}),
    "AdaBeliefRectify": (fa.AdaBelief, ADAM),
    "AdaBeliefRectifyAmsgrad": (fa.AdaBelief, {**ADAM, "amsgrad": True}),
}
ACTIVE = fa.ActiveLR(interval=2, gain_bounds=(0.2, 1.5))
MODES: dict[str, Any] = {
    "rate": None,
    "mean": fa.TrainableLR(interval=2, source="gradient"),
    "elements": ACTIVE,
    "elements-mean": (fa.TrainableLR(interval=3, source="gradient"), ACTIVE),
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def parameters(dtype: torch.dtype, sizes: list[int] = SIZES) -> list[Tensor]:
    """Returns parameters; the last one is misaligned."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator).to(dtype) for n in sizes]
    return [v.requires_grad_() for v in [*values, torch.randn(4098, generator=generator).to(dtype)[1:]]]


def set_gradients(params: list[Tensor], step: int, missing: float = 0.0, scale: float = 1.0) -> None:
    """Sets random gradients, some of them missing, one of them misaligned."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        values = torch.randn(p.numel() + 1, generator=generator) + 0.3 * (-1) ** i
        gone = torch.rand((), generator=generator) < missing
        grad = (values * scale).to(p.dtype)
        p.grad = None if gone else grad[1:] if i == 4 else grad[1:].clone()


class Pair:
    """An emulated optimizer, and the reference that takes each of its steps in float64."""

    def __init__(self, structure: str, policy: Any, decoupled: bool, dtype: torch.dtype, **options: Any) -> None:
        cls, arguments = STRUCTURES[structure]
        self.dtype, self.params = dtype, parameters(dtype)
        overrides = {name: options.pop(name) for name in ("lr", "maximize") if name in options}
        arguments = {**arguments, **overrides, "policy": policy, "decoupled_weight_decay": decoupled}

        def make(params: Any) -> fa.AdaptiveOptimizer:
            return cls(params, backend="reference", **arguments)

        self.optimizer = make(self.params)
        self.emulated = Emulated(self.optimizer, **options)
        self.twin = Twin(self.optimizer, make)
        # With a fixed rate the reference multiplies by a rounded 1 - lr·wd, as torch does. In float64 both are rounded.
        self.ulps = 2.0 if dtype == torch.float64 else 1.5 if policy is None and decoupled else 1.0
        self.worst = 0.0

    def step(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None, random_rates: Any = None) -> None:
        self.twin.follow()
        reference, before = self.twin.optimizer, [q.detach().clone() for q in self.twin.params]
        state_before = [{name: v.clone() for name, v in self.optimizer.state.get(p, {}).items()} for p in self.params]
        reference._random_rates = random_rates
        reference.found_inf, reference.grad_scale = found_inf, grad_scale  # as in GradScaler
        skips = found_inf is not None and bool(found_inf)
        self.emulated.step(found_inf, grad_scale, None if random_rates is None else random_rates.table, skips)
        reference.step()
        self.compare(before, state_before)

    def end_interval(self) -> None:
        self.twin.follow()
        before = [q.detach().clone() for q in self.twin.params]
        state_before = [{name: v.clone() for name, v in self.optimizer.state.get(p, {}).items()} for p in self.params]
        self.emulated.end_interval()
        self.twin.optimizer.end_interval()
        self.compare(before, state_before)

    def compare(self, before: list[Tensor], state_before: list[dict[str, Tensor]]) -> None:
        for p, q, q0, s0 in zip(self.params, self.twin.params, before, state_before, strict=True):
            if not p.numel():
                continue
            bound = step_bound(q0, q.detach(), self.dtype, self.ulps)
            state, expected = self.optimizer.state.get(p, {}), self.twin.optimizer.state.get(q, {})
            found = [excess(p.detach(), q.detach(), bound), *state_excesses(state, expected, s0, self.dtype, bound)]
            assert all(map(math.isfinite, found))
            self.worst = max(self.worst, *found)
