"""The CUDA executor and all of its kernels, run on the CPU, against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.core.random_rates import RandomRates

from . import build
from .driver import BACKBONES, DTYPES, Emulated, Twin
from .pairs import ACTIVE, ADAM, FAR, MODES, STRUCTURES, Pair, every_dtype, parameters, set_gradients

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.mark.thinned
@pytest.mark.parametrize(
    "dtype",
    [d if d in (torch.float32, torch.bfloat16) else pytest.param(d, marks=pytest.mark.heavy) for d in DTYPES],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("structure", BACKBONES)
def test_every_kernel_is_within_rounding_of_the_float64_reference(structure, mode, dtype):
    for decoupled in (False, True):
        # Both ways of counting and all orders of blocks alternate.
        variant = BACKBONES.index(structure) + list(MODES).index(mode) + DTYPES.index(dtype) + decoupled
        pair = Pair(structure, MODES[mode], decoupled, dtype, on_device=variant % 2 == 1, order=variant % 3)
        for step in range(7):
            set_gradients(pair.params, step, missing=0.15)
            pair.step()
        assert pair.worst <= 1.0


POLICIES = {
    "displacement-global": fa.TrainableLR(interval=3, source="displacement"),
    "displacement-tensor": fa.TrainableLR(interval=2, source="displacement", granularity="tensor"),
    "displacement-eta": fa.TrainableLR(interval=2, source="displacement", eta=1e-5),
    "gradient-every-step": fa.TrainableLR(interval=1, source="gradient"),
    "gradient-tensor": fa.TrainableLR(interval=3, source="gradient", granularity="tensor"),
    "gradient-eta": fa.TrainableLR(interval=2, source="gradient", eta=1e-5),
    "gradient-eta-tensor": fa.TrainableLR(interval=2, source="gradient", eta=1e-5, granularity="tensor"),
    "preconditioned-global": fa.TrainableLR(interval=2, source="preconditioned"),
    "preconditioned-tensor": fa.TrainableLR(interval=3, source="preconditioned", granularity="tensor"),
    "hypergradient-global": fa.Hypergradient(1e-6),
    "hypergradient-tensor": fa.Hypergradient(1e-6, granularity="tensor"),
    "active-shrink": fa.ActiveLR(interval=1, high=0.3, low=0.5, on_zero="shrink"),
}
SCALAR_CASES = [
    (structure, policy)
    for structure in BACKBONES
    for policy in POLICIES
    if ("displacement" not in policy or structure.startswith("Sgd"))
    and (structure in ("SgdMomentum", "AdamWPlain") or "hyper" in policy)
]


@pytest.mark.thinned
@every_dtype
@pytest.mark.parametrize(("structure", "policy"), SCALAR_CASES)
def test_every_inner_product_and_gain(structure, policy, dtype):
    variant = SCALAR_CASES.index((structure, policy)) + DTYPES.index(dtype)
    for decoupled in (False, True):
        pair = Pair(structure, POLICIES[policy], decoupled, dtype, on_device=variant % 2 == 1, order=variant % 3)
        for step in range(7):
            set_gradients(pair.params, step, missing=0.15)
            pair.step()
        pair.end_interval()
        gains = {state["gain"].item() for state in pair.optimizer.state.values() if "gain" in state}
        assert pair.worst <= 1.0
        assert policy == "active-shrink" or gains != {1.0}


@pytest.mark.parametrize("mode", MODES)
def test_amp_maximize_and_draws(mode):
    pair = Pair("AdamWPlain", MODES[mode], True, torch.float32, on_device=True, maximize=True)
    random_rates = RandomRates(seed=3, relative_width=0.5)
    for step in range(9):
        set_gradients(pair.params, step, missing=0.15, scale=1024.0)
        found_inf = torch.tensor(float(step % 3 == 1))
        if found_inf and pair.params[0].grad is not None:
            pair.params[0].grad.fill_(math.inf)
        pair.step(found_inf, torch.tensor(1024.0), random_rates)
    assert pair.worst <= 1.0


def test_a_skipped_first_step_leaves_no_buffer():
    pair = Pair("SgdMomentum", None, False, torch.float32, on_device=True)
    for step in range(4):
        set_gradients(pair.params, step)
        pair.step(torch.tensor(float(step == 0)), torch.tensor(1.0))
    assert pair.worst <= 1.0


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("mode", [m for m in MODES if m != "rate"])
def test_intervals_ended_by_hand_and_restarted(mode, on_device):
    pair = Pair("AdaBeliefAmsgrad", MODES[mode], True, torch.float32, on_device=on_device)
    for step in range(8):
        set_gradients(pair.params, step, missing=0.3)
        pair.step()
        if step in (0, 3, 4):
            pair.end_interval()
        if step == 5:
            pair.optimizer.restart_interval()  # changes the host's counts, which the device has to follow
    assert pair.worst <= 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "policy", ["gradient-every-step", "gradient-eta", "preconditioned-tensor", "hypergradient-global"]
)
def test_gradients_that_are_not_finite(policy, bad):
    pair = Pair("AdamWPlain", POLICIES[policy], False, torch.float32)
    free = Twin(
        pair.optimizer,
        lambda params: fa.AdamW(
            params, backend="reference", **{**ADAM, "policy": POLICIES[policy], "decoupled_weight_decay": False}
        ),
    )
    free.follow()
    for step in range(6):
        set_gradients(pair.params, step)
        if step == 2:
            pair.params[4].grad[-1] = bad
        for p, q in zip(pair.params, free.params, strict=True):
            q.grad = p.grad.double()
        pair.emulated.step()
        free.optimizer.step()
    for p, q in zip(pair.params, free.params, strict=True):
        state, expected = pair.optimizer.state[p], free.optimizer.state[q]
        torch.testing.assert_close(p.double(), q, equal_nan=True, rtol=1e-4, atol=1e-5)
        for name in {"gain", "grad_mean_prev", "direction_prev"} & state.keys():
            torch.testing.assert_close(
                state[name].double(), expected[name].double(), equal_nan=True, rtol=1e-3, atol=1e-3
            )


def test_without_decay_the_gradient_does_not_depend_on_the_parameter():
    """Also if decay is set to 0 between two steps."""
    pair = Pair("SgdMomentum", POLICIES["hypergradient-global"], False, torch.float32)
    for step in range(6):
        for optimizer in (pair.optimizer, pair.twin.optimizer):
            optimizer.param_groups[0]["weight_decay"] = 0.1 * (step % 4 == 0)
        set_gradients(pair.params, step)
        pair.step()
    assert pair.worst <= 1.0
    pair.optimizer.param_groups[0]["weight_decay"] = 0.0
    with torch.no_grad():
        pair.params[4][-1] = math.inf
    set_gradients(pair.params, 6)
    pair.emulated.step()
    assert all(state["momentum_buffer"].isfinite().all() for state in pair.optimizer.state.values())
    assert all(state["gain"].isfinite() for state in pair.optimizer.state.values())


def run(policy: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    pair = Pair("AdamWPlain", policy, True, dtype, **options)
    for step in range(5):
        set_gradients(pair.params, step, missing=0.15)
        pair.emulated.step()
    return [v for p in pair.params for v in (p.detach(), *pair.optimizer.state[p].values())]


@pytest.mark.parametrize(
    "policy", [MODES["elements-mean"], POLICIES["preconditioned-global"], POLICIES["hypergradient-global"]]
)
def test_the_same_bits_with_any_grid_and_order(policy):
    expected = run(policy)
    grids = ({"order": 1}, {"order": 4}, {"order": 2, "processors": 7}, {"processors": 1}, {"on_device": True})
    for options in grids:
        assert all(map(torch.equal, run(policy, **options), expected)), options


def test_powers_of_tensors_with_different_counts():
    """The host passes the powers of a group's first tensor; kernels compute the others, in any order of tensors."""
    results = []
    for on_device in (False, True):  # kernels compute all powers if the counts are on the device
        pair = Pair("RAdamPlain", None, True, torch.float64, on_device=on_device)
        for step in range(9):
            set_gradients(pair.params, step, missing=0.5)
            pair.step()
        assert pair.worst <= 1.0
        results.append([v for p in pair.params for v in (p.detach(), *pair.optimizer.state[p].values())])
    assert len({state["step"].item() for state in pair.optimizer.state.values()}) > 2
    assert all(map(torch.equal, *results))


def test_float64_trajectories_equal_those_of_the_reference():
    for structure, policy in [("AdamWPlain", MODES["elements-mean"]), ("SgdNesterov", POLICIES["displacement-global"])]:
        pair = Pair(structure, policy, True, torch.float64)
        pair.twin.follow()
        for step in range(9):
            set_gradients(pair.params, step)
            for p, q in zip(pair.params, pair.twin.params, strict=True):
                q.grad = p.grad
            pair.emulated.step()
            pair.twin.optimizer.step()
        for p, q in zip(pair.params, pair.twin.params, strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


def make_many(groups: int, tensors: int) -> Emulated:
    params = [[torch.randn(3).requires_grad_() for _ in range(tensors)] for _ in range(groups)]
    return Emulated(fa.AdamW([{"params": p, "lr": 0.01 * (i + 1)} for i, p in enumerate(params)], backend="reference"))


@pytest.mark.parametrize(("groups", "tensors"), [(1, 10_000), (40, 3)])
def test_many_tensors_and_many_groups(groups, tensors):
    emulated = make_many(groups, tensors)
    torch_params = [[p.detach().clone().requires_grad_() for p in g["params"]] for g in emulated.groups]
    expected = torch.optim.AdamW(
        [{"params": p, "lr": g["lr"]} for p, g in zip(torch_params, emulated.groups, strict=True)], foreach=True
    )
    for step in range(2):
        for g, own in zip(emulated.groups, torch_params, strict=True):
            g["lr"] *= 1 + step
            for p, q in zip(g["params"], own, strict=True):
                p.grad = q.grad = torch.randn(3)
        for g, e in zip(emulated.groups, expected.param_groups, strict=True):
            e["lr"] = g["lr"]
        emulated.step()
        expected.step()
    ours = torch.stack([p.detach() for p in emulated.params])
    torch.testing.assert_close(ours, torch.stack([q.detach() for own in torch_params for q in own]))


def test_launches_of_a_step():
    def launches(pair: Pair, step: int) -> int:
        pair.emulated.lib.emulation_launches()
        pair.emulated.step()
        return pair.emulated.lib.emulation_launches()

    pair = Pair("AdamWPlain", MODES["mean"], True, torch.float32)
    set_gradients(pair.params, 0)
    first, *others = [launches(pair, step) for step in range(5)]
    assert others == [2, 1, 2, 1]  # one launch, and one more at an interval's end
    assert first == 3  # counts and addresses of gradients are uploaded


def test_a_step_that_cannot_be_captured_raises_an_error():
    for on_device, expected in ((False, "capturable=True"), (True, "take one step before the capture")):
        pair = Pair("AdamWPlain", None, True, torch.float32, on_device=on_device)
        set_gradients(pair.params, 0)
        pair.emulated.lib.emulation_capture(1)
        try:
            with pytest.raises(RuntimeError, match=expected):
                pair.emulated.step()
        finally:
            pair.emulated.lib.emulation_capture(0)


def test_elements_beyond_2_to_the_31():
    """All addresses are FAR elements below the memory, and the chunks begin at FAR."""
    library = build.library(
        [
            ("cuda/layout.cpp", "for (int64_t base = 0; base < numel", f"for (int64_t base = {FAR}; base < numel"),
            (
                "cuda/layout.cpp",
                "chunks = chunks_of(plan.members[member].numel)",
                f"chunks = chunks_of(plan.members[member].numel - {FAR})",
            ),
        ]
    )
    policy = (fa.TrainableLR(interval=2, source="gradient"), ACTIVE)
    results = []
    for options in ({}, {"library": library, "shift": FAR}):
        params = parameters(torch.float32, [127, 20000])
        optimizer = fa.AdamW(params, policy=policy, backend="reference", **ADAM)
        emulated = Emulated(optimizer, **options)
        for step in range(5):
            set_gradients(params, step)
            emulated.step()
        results.append([v for p in params for v in (p.detach(), *optimizer.state[p].values())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("structure", "policy"),
    [("AdamWPlain", MODES["elements-mean"]), ("AdaBeliefRectify", MODES["mean"]), ("RAdamPlain", MODES["elements"])]
    + [("SgdMomentum", policy) for policy in POLICIES.values()],
    ids=str,
)
@every_dtype
def test_the_same_bits_as_the_cpu_kernels(structure, policy, dtype):
    if reason := fa.backends.available(["cpu"])["native"]:
        pytest.skip(reason)
    pair, (cls, arguments) = Pair(structure, policy, False, dtype), STRUCTURES[structure]
    params = [p.detach().clone().requires_grad_() for p in pair.params]
    native = cls(params, policy=policy, decoupled_weight_decay=False, backend="native", **arguments)
    for step in range(5):
        set_gradients(pair.params, step, missing=0.15 * (step > 0))
        for p, q in zip(pair.params, params, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        pair.emulated.step()
        native.step()
    for p, q in zip(pair.params, params, strict=True):
        state, expected = pair.optimizer.state[p], native.state[q]
        assert torch.equal(p, q)
        assert state.keys() == expected.keys()
        assert [name for name in state if not torch.equal(state[name], expected[name])] == []
