"""Every backend, optimizer, policy and dtype against the float64 reference, each step from a synchronised state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.state import State

from .cases import CASES, Case, Gradients, every_case, parameters
from .tolerances import EPSILON, step_bound

STEPS = 10  # at least three intervals of every policy
BACKENDS = [name for name, reason in fa.backends.available(["cpu"]).items() if not reason]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def twin(case: Case, optimizer: fa.AdaptiveOptimizer, params: Sequence[Tensor]) -> tuple[fa.AdaptiveOptimizer, list]:
    """The float64 reference in the state of ``optimizer``."""
    doubles = [p.detach().to(torch.float64, copy=True).requires_grad_() for p in params]
    reference = case.build(doubles, backend="reference")
    reference.load_state_dict(deepcopy(optimizer.state_dict()))  # loading shares tensors, as in torch
    return reference, doubles


def worst_excess(case: Case, dtype: torch.dtype, backend: str, wrong: Case | None = None) -> float:
    """How far the largest deviation of a step lies beyond its bound, in units of the bound; up to 1 is within."""
    params, gradients = parameters(dtype), Gradients(missing=0.15)
    optimizer = case.build(params, backend=backend)
    # torch multiplies by the rounded factor 1 − lr·wd, and with a fixed rate the reference does as torch does.
    ulps = 1.5 if case.policy == "fixed" and case.decoupled and backend == "reference" else 1.0
    excesses = [0.0]
    for step in range(STEPS):
        gradients.set(params, step)
        reference, doubles = twin(wrong or case, optimizer, params)
        for p, q in zip(params, doubles, strict=True):
            q.grad = None if p.grad is None else p.grad.double()
        before = [q.detach().clone() for q in doubles]
        optimizer.step()
        reference.step()
        for p, q, q0 in zip(params, doubles, before, strict=True):
            if p.numel():
                bound = step_bound(q0, q.detach(), dtype, ulps)
                excesses.append(excess(p.detach(), q.detach(), bound))
                excesses += state_excesses(optimizer.state.get(p, {}), reference.state.get(q, {}), dtype, bound)
    assert all(map(math.isfinite, excesses))
    return max(excesses)


def excess(ours: Tensor, expected: Tensor, bound: Tensor | float) -> float:
    return ((ours.double() - expected.double()).abs() / bound).max().item()


def state_excesses(state: State, expected: State, dtype: torch.dtype, param_bound: Tensor) -> list[float]:
    """State after one step: counts and signs are equal, sums and moments within rounding of their largest element."""
    found = [] if state.keys() == expected.keys() else [1e9]
    for name, value in state.items():
        other = expected.get(name)
        if other is None or (name == "direction_prev" and "interval_start" in state):
            continue  # a displacement divided by a small rate; what it leads to is checked in the gain
        if not value.is_floating_point():
            found.append(0.0 if torch.equal(value, other) else 1e9)
        elif name == "interval_start":
            found.append(excess(value, other, param_bound))
        elif name == "gain" and "interval_start" in state:
            # A displacement over a rate: the rounding of the parameters comes back divided by the rate.
            found.append(excess(value, other, 8 * EPSILON[dtype] / 0.01))
        else:
            coarse = torch.float32 if name == "gain" else value.dtype
            found.append(excess(value, other, 8 * EPSILON[coarse] * other.abs().max().double().clamp(min=1e-30)))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@every_case
def test_a_step_is_within_rounding_of_the_float64_reference(case, dtype, backend):
    assert worst_excess(case, dtype, backend) <= 1.0


WRONG = {
    "backbone": (Case("Adam", "fixed", True), Case("RAdam", "fixed", True)),
    "decay": (Case("AdamW", "active", True), Case("AdamW", "active", False)),
    "high": (
        Case("AdamW", "active", True),
        Case("AdamW", "active", True, {"policy": fa.ActiveLR(interval=3, high=0.2)}),
    ),
    "interval": (Case("SGD", "active", True), Case("SGD", "active", True, {"policy": fa.ActiveLR(interval=2)})),
    "granularity": (Case("SGD", "tlr-gradient-global", True), Case("SGD", "tlr-gradient-tensor", True)),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wrong_variant_exceeds_the_bound(name, dtype, monkeypatch):
    right, wrong = WRONG[name]
    load = fa.AdaptiveOptimizer.load_state_dict

    def keep_own_hyperparameters(self, state_dict):
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        groups = [{**saved, **mine} for saved, mine in zip(state_dict["param_groups"], own, strict=True)]
        load(self, {**state_dict, "param_groups": groups})

    # The twin loads the optimizer's state, and with it would take over its hyperparameters.
    monkeypatch.setattr(fa.AdaptiveOptimizer, "load_state_dict", keep_own_hyperparameters)
    assert worst_excess(right, dtype, "reference") <= 1.0
    assert worst_excess(right, dtype, "reference", wrong) > 10.0


def test_the_matrix_is_complete():
    assert len(CASES) == 2 * (9 * 11 + 3 * 2)
