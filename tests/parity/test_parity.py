"""Every backend, optimizer, policy and dtype against the float64 reference, each step from the same state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.backends import native
from fused_adaptive.core import declarations
from fused_adaptive.core.state import State

from ..common.cases import CASES, KERNELS, OPTIMIZERS, POLICIES, Case, Gradients, every_case, parameters
from ..common.tolerances import EPSILON, step_bound, step_roundings

STEPS = 10  # at least three intervals of every policy
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def twin(case: Case, optimizer: fa.AdaptiveOptimizer, params: Sequence[Tensor]) -> tuple[fa.AdaptiveOptimizer, list]:
    """Returns the float64 reference in the state of ``optimizer``."""
    doubles = [p.detach().to(torch.float64, copy=True).requires_grad_() for p in params]
    reference = case.build(doubles, backend="reference")
    reference.load_state_dict(deepcopy(optimizer.state_dict()))  # loading shares tensors, as in torch
    return reference, doubles


def many_layouts(dtype: torch.dtype) -> list[Tensor]:
    """Returns layouts for mistakes of loops over flat memory: tails, chunk borders, strides, gaps."""
    flat = parameters(dtype, [(1,), (3,), (127,), (4095,), (4096,), (4097,), (0, 3)])
    a, b, c = (p.detach() for p in parameters(dtype, [(2, 5, 3, 7), (13, 11), (6, 10)]))
    laid_out = [a.to(memory_format=torch.channels_last), b.t(), c[:, ::2]]
    return flat + [p.requires_grad_() for p in laid_out]


#: Inner products grow with the number of elements, and rates that follow them would exceed float16's range.
SLOWER = {
    "tlr-gradient-eta": fa.TrainableLR(interval=2, source="gradient", eta=1e-8),
    "hypergradient-global": fa.Hypergradient(1e-9),
    "hypergradient-tensor": fa.Hypergradient(1e-9, granularity="tensor"),
}


def for_large(case: Case) -> Case:
    extra = {"policy": SLOWER[case.policy]} if case.policy in SLOWER else {}
    return Case(case.optimizer, case.policy, case.decoupled, extra)


def large_and_odd(dtype: torch.dtype) -> list[Tensor]:
    return parameters(dtype, [(1_000_003,), (5,)])


class OtherStrides(Gradients):
    """Gradients with their parameters' layout in every second step, and contiguous in the others."""

    def set(self, params: Sequence[Tensor], step: int) -> None:
        super().set(params, step)
        for p in params:
            if p.grad is not None and step % 2:
                p.grad = torch.empty_like(p, requires_grad=False).copy_(p.grad)


def worst_excess(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    wrong: Case | None = None,
    make: Callable[[torch.dtype], list[Tensor]] = parameters,
    device: str = "cpu",
) -> float:
    """Returns the largest deviation of a step in units of its bound; up to 1 is within the bound."""
    params, gradients = make(dtype), OtherStrides(missing=0.15)
    if device != "cpu":
        params = [p.detach().to(device).requires_grad_() for p in params]
    optimizer = case.build(params, backend=backend)
    ulps = 1.0
    if backend == "reference":  # as torch, it multiplies by the rounded factor 1 − lr·wd, and NAdam moves twice
        ulps += 0.5 * (case.policy == "fixed" and case.decoupled) + 0.5 * (case.optimizer == "NAdam")
    if dtype == torch.float64:
        ulps = 3.0  # decay, factor and difference of the twin are rounded as coarsely
    excesses = [0.0]
    for step in range(STEPS):
        gradients.set(params, step)
        reference, doubles = twin(wrong or case, optimizer, params)
        for p, q in zip(params, doubles, strict=True):
            q.grad = None if p.grad is None else p.grad.double()
        before = [q.detach().clone() for q in doubles]
        state_before = [{name: value.clone() for name, value in optimizer.state.get(p, {}).items()} for p in params]
        optimizer.step()
        reference.step()
        for p, q, q0, s0 in zip(params, doubles, before, state_before, strict=True):
            if p.numel():
                bound = step_bound(q0, q.detach(), dtype, ulps)
                excesses.append(excess(p.detach(), q.detach(), bound))
                excesses += state_excesses(optimizer.state.get(p, {}), reference.state.get(q, {}), s0, dtype, bound)
    assert all(map(math.isfinite, excesses))
    return max(excesses)


def excess(ours: Tensor, expected: Tensor, bound: Tensor | float) -> float:
    return ((ours.double() - expected.double()).abs() / bound).max().item()


def state_excesses(
    state: State, expected: State, before: State, dtype: torch.dtype, param_bound: Tensor
) -> list[float]:
    """Returns deviations of the state after one step: counts and signs are equal, sums and moments within rounding.

    Rounding is relative to the largest element before or after the step, since a mean and a gradient may cancel.
    """
    found = [] if state.keys() == expected.keys() else [1e9]
    for name, value in state.items():
        other = expected.get(name)
        if other is None or (name == "direction_prev" and "interval_start" in state):
            continue  # a displacement divided by a small rate; the gain is checked instead
        if not value.is_floating_point():
            found.append(0.0 if torch.equal(value, other) else 1e9)
        elif name == "interval_start":
            found.append(excess(value, other, param_bound))
        elif name == "direction_prev" and "exp_avg" in state:
            # A quotient, whose denominator is as small as the gradient, and that may have cancelled with the decay.
            found.append(excess(value, other, param_bound / 0.01))
        elif name == "gain" and "interval_start" in state:
            # A displacement divided by a rate has the rounding of the parameters divided by the rate.
            found.append(excess(value, other, 8 * EPSILON[dtype] / 0.01))
        else:
            coarse = torch.float32 if name == "gain" else value.dtype
            largest = max(v.abs().max().item() for v in (other, before.get(name, other)))
            found.append(excess(value, other, step_roundings(coarse) * max(largest, 1e-30)))
    return found


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.mark.thinned
@pytest.mark.feature("every optimizer, policy, decay and dtype within rounding of float64", backend="reference")
@every_dtype
@every_case
def test_a_reference_step_is_within_rounding_of_the_float64_reference(case, dtype):
    assert worst_excess(case, dtype, "reference") <= 1.0


@pytest.mark.thinned
@pytest.mark.feature("every optimizer, policy, decay and dtype within rounding of float64")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "dtype",
    [d if d in (torch.float32, torch.bfloat16) else pytest.param(d, marks=pytest.mark.heavy) for d in DTYPES],
    ids=lambda d: str(d).removeprefix("torch."),
)
@every_case
def test_a_step_is_within_rounding_of_the_float64_reference(case, dtype, backend):
    assert worst_excess(case, dtype, backend, make=many_layouts) <= 1.0


@pytest.mark.heavy
@pytest.mark.parametrize("backend", KERNELS)
@every_dtype
@pytest.mark.parametrize("case", [c for i, c in enumerate(CASES) if (i // 2 + i) % 2], ids=str)  # decay alternates
def test_a_large_odd_tensor(case, dtype, backend):
    # In float64 the bound is about 1e-13 and 1e-12 is allowed: some of a million elements cancel.
    limit = 100.0 if dtype == torch.float64 else 1.0
    assert worst_excess(for_large(case), dtype, backend, make=large_and_odd) <= limit


SOME = CASES[::13]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("case", "dtype"), [(c, (torch.float32, torch.bfloat16)[i % 2]) for i, c in enumerate(SOME)], ids=str
)
def test_some_large_odd_tensors(case, dtype, backend):
    assert worst_excess(for_large(case), dtype, backend, make=large_and_odd) <= 1.0


@pytest.mark.skipif("native" not in KERNELS, reason=fa.backends.available(["cpu"]).get("native", ""))
@pytest.mark.parametrize("structure", ["RAdamPlain", "AdaBeliefPlain", "AdaBeliefRectify"])
def test_a_wrong_kernel_exceeds_the_bound(structure, monkeypatch):
    monkeypatch.setitem(declarations.STATE_NAMES, "AdamW", ("exp_avg", "exp_avg_sq"))
    monkeypatch.setattr(native, "_structure", lambda *_: structure)
    assert worst_excess(Case("AdamW", "active", True), torch.float32, "native") > 10


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

    # The twin loads the optimizer's state, and would also load its hyperparameters.
    monkeypatch.setattr(fa.AdaptiveOptimizer, "load_state_dict", keep_own_hyperparameters)
    assert worst_excess(right, dtype, "reference") <= 1.0
    assert worst_excess(right, dtype, "reference", wrong) > 10.0


def test_the_matrix_is_complete():
    assert len(CASES) == 2 * (len(OPTIMIZERS) * 12 + 3 * 2)
    assert {c.optimizer for c in SOME} == set(OPTIMIZERS)
    assert {c.policy for c in SOME} == set(POLICIES)
