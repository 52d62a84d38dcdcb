"""The Triton backend on Triton's interpreter; tests/triton_backend/test_triton.py runs this in a separate process.

Kernels, tables and launches are those of a GPU, and Triton's language is emulated. Each test says whether its results
equal those of the native backend bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.backends import plans
from fused_adaptive.backends.triton import math as kernel_math

from ..common.breaking import broken, fails
from ..common.cases import (
    BACKENDS,
    OPTIMIZERS,
    POLICIES,
    Case,
    Gradients,
    all_equal,
    is_allowed,
    needs_native,
    parameters,
    state_of,
    train,
)
from ..common.tolerances import step_bound
from ..parity.test_parity import DTYPES, excess, for_large, state_excesses
from ..regressions import test_runtime as runtime
from ..regressions import test_steps as pitfalls
from .mistakes import stale_phase, truncated, wrong_backbone, wrong_bias, wrong_sum, wrong_tail

#: One block and a tail with the interpreter's sizes, and a tensor of another size; tables have every dtype.
SHAPES = [(4099,), (3, 5)]
STEPS = 6  # three intervals of two
#: Each has a group with decoupled decay and one with coupled decay.
PAIRS = [Case(o, p, True) for o in OPTIMIZERS for p in POLICIES if is_allowed(o, p)]
NATIVE = "native" in BACKENDS


def in_twos(policy: Any) -> Any:
    if isinstance(policy, tuple):
        return tuple(map(in_twos, policy))
    return replace(policy, interval=2) if getattr(policy, "interval", None) is not None else policy


def groups_of(dtypes: list[torch.dtype]) -> list[dict[str, Any]]:
    """Returns a group with coupled decay and one with decoupled decay."""
    return [
        {"params": [p for t in dtypes for p in parameters(t, SHAPES[: 2 if t == torch.float32 else 1], seed=seed)]}
        | {"decoupled_weight_decay": seed == 1}
        for seed in (0, 1)
    ]


def build(case: Case, groups: Any, backend: str) -> fa.AdaptiveOptimizer:
    own = for_large(case)
    policy = in_twos(own.extra.get("policy", POLICIES[case.policy]))
    return case.build(groups, backend=backend, policy=policy)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def differing(a: fa.AdaptiveOptimizer, b: fa.AdaptiveOptimizer) -> list[str]:
    """Returns the names of values with different bits in the two optimizers."""
    found = [
        f"parameter {i}" for i, (p, q) in enumerate(zip(params_of(a), params_of(b), strict=True)) if not same(p, q)
    ]
    state, other = state_of(a), state_of(b)
    assert state.keys() == other.keys()
    return found + [name for name in state if not same(state[name], other[name])]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def shares_a_gain(case: Case) -> bool:
    policies = POLICIES[case.policy] if isinstance(POLICIES[case.policy], tuple) else (POLICIES[case.policy],)
    return any(p is not None and "gain" in p.shared_names() for p in policies)


def roundings_of(case: Case, param: Tensor) -> torch.dtype:
    return torch.bfloat16 if shares_a_gain(case) else param.dtype


def worst(case: Case, dtypes: list[torch.dtype] = DTYPES) -> float:
    """Returns the largest deviation from the float64 reference, in units of its bound; asserts equality with native."""
    ours, theirs = (build(case, groups_of(dtypes), b) for b in ("triton", "native" if NATIVE else "reference"))
    params, gradients, found = params_of(ours), Gradients(missing=0.15), [0.0]
    # A gain that float64 tensors share with others has roundings of float32. A gain from displacements has those of all
    # dtypes. These are only compared with native.
    compared = [p.dtype != torch.float64 or not shares_a_gain(case) for p in params]
    for step in range(STEPS):
        doubles = [
            {**group, "params": [p.detach().to(torch.float64, copy=True).requires_grad_() for p in group["params"]]}
            for group in ours.param_groups
        ]
        reference = build(case, doubles, "reference")
        reference.load_state_dict(deepcopy(ours.state_dict()))
        gradients.set(params, step)
        twins = params_of(reference)
        before = [q.detach().clone() for q in twins]
        states = [{name: value.clone() for name, value in ours.state.get(p, {}).items()} for p in params]
        for p, q, r in zip(params, params_of(theirs), twins, strict=True):
            q.grad, r.grad = p.grad, None if p.grad is None else p.grad.double()
        for optimizer in (ours, theirs, reference):
            optimizer.step()
        if NATIVE:
            assert differing(ours, theirs) == [], step
        for p, q, q0, s0, is_compared in zip(params, twins, before, states, compared, strict=True):
            if is_compared:
                bound = step_bound(q0, q.detach(), p.dtype, 3.0 if p.dtype == torch.float64 else 1.0)
                found.append(excess(p.detach(), q.detach(), bound))
                found += state_excesses(
                    ours.state.get(p, {}), reference.state.get(q, {}), s0, roundings_of(case, p), bound
                )
    assert all(map(math.isfinite, found))
    return max(found)


@pytest.mark.parametrize(
    "case",
    [c if i % 13 == 0 else pytest.param(c, marks=pytest.mark.heavy) for i, c in enumerate(PAIRS)],
    ids=lambda case: f"{case.optimizer}-{case.policy}",
)
def test_matrix(case):
    """Bit-equal to native, in every dtype, parameters and state: IEEE arithmetic in the same order, no contraction.

    Powers in bias corrections are rounded to the nearest float64 here, and to within an ulp of it by the C library.
    float32 does not show the difference, and in these steps there is none.
    """
    assert worst(case) <= 1.0


# ---- mistakes that must be noticed ----


MISTAKES: dict[str, tuple[Callable[[Any], None], Case]] = {
    "tail": (wrong_tail, Case("AdamW", "active", True)),
    "backbone": (wrong_backbone, Case("AdamW", "active", True)),
    "bias": (wrong_bias, Case("AdamW", "fixed", True)),
    "sum": (wrong_sum, Case("AdamW", "tlr-gradient-tensor", True)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_variant_exceeds_the_bound(mistake, monkeypatch):
    monkeypatch.setattr(f"{__name__}.NATIVE", False)  # without the comparison with native, which would fail first
    breaks, case = MISTAKES[mistake]
    assert worst(case, [torch.float32]) <= 1.0
    breaks(monkeypatch)
    assert worst(case, [torch.float32]) > 3.0


@needs_native
def test_truncation_to_bfloat16_is_noticed_by_comparing_bits(monkeypatch):
    """The bound is an ulp, and the error is too."""
    truncated(monkeypatch)
    assert fails(lambda: worst(Case("AdamW", "fixed", True), [torch.bfloat16]) <= 1.0)


def test_a_stale_phase_is_noticed(monkeypatch):
    stale_phase(monkeypatch)
    assert not goes_on_from_counts_of_a_checkpoint()


# ---- counts ----


def goes_on_from_counts_of_a_checkpoint() -> bool:
    """Loaded counts, and counts set by hand, are uploaded to the device."""
    runs = []
    for backend in ("triton", "reference"):
        params = parameters(torch.float32, [(9,), (5,)])
        optimizer = fa.AdamW(params, lr=0.01, policy=fa.ActiveLR(interval=3, high=0.5), backend=backend)
        train(optimizer, 4)
        optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
        train(optimizer, 1, start=4)
        for p in params:
            optimizer.state[p]["active_step"].fill_(2)
            optimizer.state[p]["step"].fill_(30)
        train(optimizer, 2, start=5)
        runs.append((params, [optimizer.state[p]["element_gain"] for p in params]))
    (params, gains), (others, other_gains) = runs
    close = all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(params, others, strict=True))
    return close and all_equal(gains, other_gains)


def test_counts_that_are_set_from_outside_are_uploaded():
    assert goes_on_from_counts_of_a_checkpoint()


@pytest.mark.parametrize("policy", ["active", "tlr-gradient-eta", "tlr-preconditioned-global", "hypergradient-tensor"])
def test_counters_on_the_device_change_no_bit(policy):
    runs = []
    for capturable in (False, True):
        params = parameters(torch.float32, [(4099,), (5,), (0,), ()])
        optimizer = Case("AdamW", policy, True).build(params, backend="triton", capturable=capturable)
        train(optimizer, 5, gradients=Gradients(missing=0.2))
        optimizer.end_interval()
        train(optimizer, 3, start=5, gradients=Gradients(missing=0.2))
        runs.append(optimizer)
    assert differing(*runs) == []


@pytest.mark.parametrize(
    ("policy", "fused"),
    [("active", True), ("active", False), ("tlr-times-active", True), ("hypergradient-global", True)],
)
def test_an_amp_overflow_changes_nothing_and_ends_no_interval(policy, fused, by_default):
    assert runtime.overflow_changes_nothing(Case("AdamW", policy, True), fused)


@needs_native
def test_end_interval_and_restart_interval():
    for policy in ("active", "tlr-times-active", "tlr-displacement-global", "tlr-gradient-eta"):
        runs = []
        for backend in ("triton", "native"):
            optimizer = Case("SGD-momentum", policy, True).build(parameters(torch.float32), backend=backend)
            for start in (0, 2, 3):
                train(optimizer, 2, start=start, gradients=Gradients(missing=0.2))
                optimizer.restart_interval() if start == 2 else optimizer.end_interval()
            runs.append(optimizer)
        assert differing(*runs) == [], policy


@needs_native
def test_rate_draws():
    runs = []
    for backend in ("triton", "native"):
        optimizer = fa.AdamW(parameters(torch.float32), lr=0.1, backend=backend)
        fa.ASLR(optimizer, seed=3)
        train(optimizer, 3)
        runs.append(optimizer)
    assert differing(*runs) == []


# ---- plans ----


@pytest.fixture
def by_default(monkeypatch):
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", "triton")


NAMES = list(pitfalls.LAYOUTS)


@pytest.mark.parametrize(("of_param", "of_grad"), list(zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)))
def test_strides_of_parameters_and_gradients_may_differ(of_param, of_grad, by_default):
    assert pitfalls.strides_do_not_matter(Case("SGD-momentum", "active", True), of_param, of_grad)


@pytest.mark.parametrize("of", ["param", "grad"])
def test_a_negative_view_of_one_element_is_not_read_as_plain_memory(of):
    """The tensor is a part of a complex number: its strides do not show that it is negated."""

    def negative(t: torch.Tensor) -> torch.Tensor:
        return torch.complex(t, -t).conj().imag

    def is_read_right() -> bool:
        runs = []
        for made in (torch.clone, negative):
            params = [
                (made if of == "param" else torch.clone)(torch.full(s, 0.5)).requires_grad_() for s in [(), (1, 1)]
            ]
            optimizer = fa.SGD(params, lr=0.1, backend="triton")
            for _ in range(2):
                for p in params:
                    p.grad = (made if of == "grad" else torch.clone)(torch.full(p.shape, 2.0))
                optimizer.step()
            runs.append(params)
        return all_equal(*runs)

    assert is_read_right()
    with broken(plans, "is_lazy", lambda tensor: False):
        assert not is_read_right()


def test_freed_memory_is_refused():
    params = parameters(torch.float32)
    optimizer = fa.AdamW(params, backend="triton")
    train(optimizer, 2)
    optimizer.state[params[1]]["exp_avg"].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="'exp_avg' of parameter 1 has been freed"):
        optimizer.step()


@needs_native
def test_a_moved_parameter_is_found_and_a_new_one_gets_its_buffer():
    runs = []
    for backend in ("triton", "native"):
        params = parameters(torch.float32)
        optimizer = Case("SGD-momentum", "active", True).build(params, backend=backend)
        params[1].grad = torch.ones_like(params[1])
        optimizer.step()
        train(optimizer, 2)
        for p in params:
            p.data = p.data.clone()
        optimizer.add_param_group({"params": parameters(torch.bfloat16, [(7,)])})
        train(optimizer, 3)
        runs.append(optimizer)
    assert differing(*runs) == []


def test_bad_input_is_refused_before_anything_changes():
    p = torch.ones(3).requires_grad_()
    p.grad = p.detach()
    with pytest.raises(RuntimeError, match="gradient of parameter 0 is the parameter itself"):
        fa.SGD([p], lr=0.1, backend="triton").step()
    optimizer = fa.AdamW([p], lr=0.1, backend="triton")
    train(optimizer, 1)
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg_sq"].detach()
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="share memory"):
        train(optimizer, 1)
    assert torch.equal(before, p.detach())
    optimizer = fa.AdamW([p], lr=0.1, backend="triton")
    p.grad = torch.ones(3)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    optimizer.step()
    assert not torch.equal(before, p.detach())


def test_nothing_is_launched_except_one_update_per_bucket(monkeypatch):
    """And the prologue, with 40 tensors as with one."""
    from triton.runtime.interpreter import InterpretedFunction

    launched, launch_one = [], InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *a, **k: (launched.append(self.__name__), launch_one(self, *a, **k))[1]
    )
    policy = fa.TrainableLR(interval=2)
    for count in (1, 40):
        params = parameters(torch.float32, [(5,)] * count)
        optimizer = fa.AdamW(params, lr=0.1, backend="triton", policy=policy)
        launched.clear()
        train(optimizer, 2)
        assert launched == ["prepare", "update", "prepare", "measure", "finish", "update"]


@pytest.mark.heavy
@needs_native
def test_a_large_odd_tensor_and_the_order_of_sums():
    """There are several groups of chunks, so that every level of the sums is used."""
    policy = fa.TrainableLR(interval=1, source="gradient", granularity="tensor")
    before = fa.SGD(parameters(torch.float32, [(258 * 16384 + 5,)]), lr=1e-3, backend="native", policy=policy)
    train(before, 1)
    runs = []
    for backend in ("triton", "native"):
        params = [p.detach().clone().requires_grad_() for p in params_of(before)]
        optimizer = fa.SGD(params, lr=1e-3, backend=backend, policy=policy)
        optimizer.load_state_dict(deepcopy(before.state_dict()))
        train(optimizer, 1, start=1)
        assert optimizer.state[params[0]]["gain"] != before.state[params_of(before)[0]]["gain"]
        runs.append(optimizer)
    assert differing(*runs) == []


def test_powers_are_rounded_to_the_nearest():
    getcontext().prec = 60
    exponents = [*range(1, 60), 255, 999, 1000, 4097, 65_535, 1_000_003]
    for beta in (0.0, 0.5, 0.9, 0.98, 0.999, 0.9999, 1 - 2**-40):
        out = torch.zeros(128, dtype=torch.float64)
        powers[(1,)](out, torch.tensor([*exponents, *[1] * (128 - len(exponents))]), beta=beta)
        exact = [float(Decimal(beta) ** e) for e in exponents]
        assert out[: len(exponents)].tolist() == exact


power = kernel_math.power  # kernels use global names without a module


@triton.jit
def powers(out, exponents, beta: tl.constexpr):
    lane = tl.arange(0, 128)
    n = tl.load(exponents + lane)
    tl.store(out + lane, power(tl.full([128], beta, tl.float64), n))
