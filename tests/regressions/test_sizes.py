"""Pitfalls of size: very large tensors, very many tensors, many groups, parameters that are added and removed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.backends import native, reference
from fused_adaptive.core import view
from fused_adaptive.engine import participants
from fused_adaptive.engine.fingerprint import Fingerprint

from ..common.breaking import PeakMemory, broken, fails
from ..common.cases import BACKENDS, all_equal, parameters, train

every_backend = pytest.mark.parametrize("backend", BACKENDS)


# ---- 7: more elements than 32 bits can count ----


def available_memory() -> int:
    """Returns bytes; 0 if unknown."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


#: lr 0.25 and decoupled decay 0.5 change 1 to 0.875 − 0.25·g: exact in bfloat16 for these gradients.
GRADS = {0.5: 0.75, 1.0: 0.625, 2.0: 0.375, 3.0: 0.125, 4.0: -0.125}


def special(numel: int, border: int) -> dict[int, float]:
    """Returns gradients of some elements: at both ends, and on both sides of the border. All others have 0.5."""
    return {
        0: 4.0,
        1: 2.0,
        border - 2: 1.0,
        border - 1: 2.0,
        border: 3.0,
        border + 1: 4.0,
        numel - 2: 3.0,
        numel - 1: 1.0,
    }


@torch.no_grad()
def all_elements_moved(p: Tensor, border: int) -> bool:
    expected = special(p.numel(), border)
    if any(p[i].item() != GRADS[grad] for i, grad in expected.items()):
        return False
    for i in expected:
        p[i] = GRADS[0.5]
    lowest, highest = p.view(torch.int16 if p.dtype == torch.bfloat16 else torch.int32).aminmax()  # bits, for speed
    return p[2].item() == GRADS[0.5] and bool(lowest == highest)


def step_over(numel: int, border: int, dtype: torch.dtype, backend: str) -> Tensor:
    p = torch.ones(numel, dtype=dtype).requires_grad_()
    p.grad = torch.full_like(p, 0.5, requires_grad=False)
    for i, grad in special(numel, border).items():
        p.grad[i] = grad
    fa.SGD([p], lr=0.25, weight_decay=0.5, decoupled_weight_decay=True, backend=backend).step()
    p.grad = None
    return p


@pytest.mark.heavy
@pytest.mark.feature("a tensor of more than 2³¹ elements", backend="native")
@pytest.mark.skipif("native" not in BACKENDS, reason="native is not built")
def test_more_than_2_to_the_31_elements():
    numel, border = 2**31 + 4099, 2**31
    if available_memory() < 12e9:
        pytest.skip("needs 12 GB of free memory: a parameter and a gradient of 4.3 GB each")
    torch.set_num_threads(2)
    p = step_over(numel, border, torch.bfloat16, "native")
    assert all_elements_moved(p, border)
    with torch.no_grad():
        p[border:] = 1.0  # the result of a kernel whose offsets have 31 bits
    assert not all_elements_moved(p, border)


@every_backend
def test_elements_that_32_bit_offsets_do_not_reach_are_noticed(backend):
    """The border is small, so that every machine has enough memory."""
    border = 2**15
    assert all_elements_moved(step_over(border + 99, border, torch.float32, backend), border)
    module = {"native": native, "reference": reference}.get(backend)
    if module is None:
        return
    step = module.step

    def with_15_bits(participants: Any, *rest: Any) -> None:
        p = participants.params[0]
        beyond = p.detach()[border:].clone()
        step(participants, *rest)
        p.detach()[border:] = beyond

    with broken(module, "step", with_15_bits):
        assert fails(lambda: all_elements_moved(step_over(border + 99, border, torch.float32, backend), border))


# ---- 14: memory of the first step ----


def extra_bytes_of_the_first_step(backend: str) -> int:
    """Returns the bytes apart from the state that the step creates."""
    params = [torch.randn(1000).requires_grad_() for _ in range(40)]
    optimizer = fa.AdamW(params, policy=fa.ActiveLR(interval=2), backend=backend)
    for p in params:
        p.grad = torch.randn(1000)
    with PeakMemory() as memory:
        optimizer.step()
    created = sum(t.untyped_storage().nbytes() for state in optimizer.state.values() for t in state.values())
    return memory.peak - created


@every_backend
def test_the_first_step_does_not_copy_parameters(backend):
    allowed = 8 * 4 * 1000  # some temporaries of one tensor; the model has 40 tensors
    assert extra_bytes_of_the_first_step(backend) <= allowed
    collect = participants.collect

    def collect_with_copies(*arguments: Any) -> Any:
        result = collect(*arguments)
        vars(result)["copies"] = [torch.empty_like(p) for p in result.params]
        return result

    from fused_adaptive.optimizers import base as optimizer

    with broken(optimizer, "collect", collect_with_copies):
        assert extra_bytes_of_the_first_step(backend) > allowed


# ---- 15: many small tensors ----

SIZES = [1 + i % 13 for i in range(10_000)]


def chunks_move_as_the_whole(backend: str, policy: Any, sizes: list[int], steps: int = 3) -> bool:
    """Compares many tensors with one tensor that they are chunks of, bit for bit, under element policies."""
    values = torch.randn(sum(sizes))
    whole, chunks = values.clone().requires_grad_(), [v.clone().requires_grad_() for v in values.split(sizes)]
    one, many = (fa.AdamW(p, lr=0.01, policy=policy, backend=backend) for p in ([whole], chunks))
    for _ in range(steps):
        whole.grad = torch.randn_like(whole)
        for p, grad in zip(chunks, whole.grad.split(sizes), strict=True):
            p.grad = grad.clone()
        one.step()
        many.step()
    return torch.allclose(whole, torch.cat(chunks), rtol=0, atol=0 if backend == "native" else 1e-6)


@pytest.mark.feature("10 000 tensors")
@pytest.mark.parametrize(
    "backend", [pytest.param(b, marks=pytest.mark.heavy) if b == "reference" else b for b in BACKENDS]
)
@pytest.mark.parametrize("policy", [None, fa.ActiveLR(interval=2)], ids=["fixed", "active"])
def test_ten_thousand_tensors_equal_one_tensor(policy, backend):
    assert chunks_move_as_the_whole(backend, policy, SIZES)


def calls(function: Callable[[], Any]) -> int:
    """Counts calls of Python and C functions: a measure of time that other programs do not affect."""
    number = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal number
        number += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return number


def growth(backend: str, policy: Any) -> float:
    """Returns the ratio of calls with ten times as many tensors: in the first step, later, and with a new tensor."""
    numbers = []
    for n in (50, 500):
        params = [torch.randn(3).requires_grad_() for _ in range(n)]
        optimizer = fa.AdamW(params, lr=0.01, policy=policy, backend=backend)
        for p in params[:-2]:
            p.grad = torch.randn(3)
        first, second = calls(optimizer.step), calls(optimizer.step)
        params[-1].grad = torch.randn(3)
        numbers.append((first, second, calls(optimizer.step)))
    return max(large / small for small, large in zip(*numbers, strict=True))


@every_backend
@pytest.mark.parametrize("policy", [None, fa.ActiveLR(interval=2), fa.TrainableLR(interval=2)], ids=str)
def test_calls_grow_at_most_linearly_with_the_number_of_tensors(policy, backend):
    assert growth(backend, policy) < 10.5
    if policy is not None:
        return

    def looks_at_the_others(self: view.ParamView) -> bool:
        return sum(abs(1) for _ in self.group["params"]) > 0 and self.param.grad is not None

    with broken(view.ParamView, "applies", property(looks_at_the_others)):
        assert growth(backend, policy) > 20


# ---- many groups; parameters that are added and removed ----


def one_optimizer_is_as_many(backend: str) -> bool:
    """Compares a hundred param groups with different hyperparameters and a hundred optimizers of one group."""
    policies = [
        None,
        fa.ActiveLR(interval=2),
        fa.TrainableLR(interval=3, granularity="tensor"),
        fa.ActiveLR(interval=3),
    ]
    runs = []
    for together in (True, False):
        params = parameters(torch.float32, [(1 + i % 7, 3) for i in range(200)])
        groups = [
            {
                "params": params[2 * i : 2 * i + 2],
                "lr": 0.001 * (i + 1),
                "weight_decay": 0.01 * (i % 5),
                "betas": (0.9 - 0.001 * i, 0.99),
                "policy": policies[i % 4],
                "maximize": i % 3 == 0,
            }
            for i in range(100)
        ]
        optimizers = [fa.AdamW(g, backend=backend) for g in ([groups] if together else [[group] for group in groups])]
        generator = torch.Generator().manual_seed(5)
        for _ in range(7):
            for p in params:
                grad = torch.randn(p.shape, generator=generator)
                p.grad = None if torch.rand((), generator=generator) < 0.2 else grad
            for optimizer in optimizers:
                optimizer.step()
        runs.append(params)
    return all_equal(*runs)


@pytest.mark.feature("100 param groups")
@every_backend
def test_a_hundred_groups_equal_a_hundred_optimizers(backend):
    assert one_optimizer_is_as_many(backend)
    if backend == "native":
        build = native.NativePlan._build

        def with_the_first_groups_numbers(self: Any, *arguments: Any) -> None:
            build(self, *arguments)
            self._numbers.groups = self._groups[:1] * len(self._groups)

        with broken(native.NativePlan, "_build", with_the_first_groups_numbers):
            assert fails(lambda: one_optimizer_is_as_many(backend))


def come_and_go(backend: str) -> list[Tensor]:
    """Adds a tensor in each step, to a new group or to the first, and removes one in every third step."""
    params = parameters(torch.float64, [(3, 2)] * 40)
    alive = params[:5]
    optimizer = fa.AdamW(alive, lr=0.01, policy=(fa.TrainableLR(interval=2), fa.ActiveLR(interval=3)), backend=backend)
    for step, new in enumerate(params[5:]):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        if step % 2:
            optimizer.add_param_group({"params": [new], "lr": 0.02})
        else:
            optimizer.param_groups[0]["params"].append(new)
        if step % 3 == 0:
            gone = optimizer.param_groups[0]["params"].pop(1)
            optimizer.state.pop(gone)
        if step == 20:
            optimizer.param_groups[0]["params"].insert(0, gone)
    return params


@pytest.mark.feature("parameters that come and go")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_parameters_can_be_added_and_removed(backend):
    expected = come_and_go("reference")

    def as_expected() -> bool:
        pairs = zip(come_and_go(backend), expected, strict=True)
        return all(torch.allclose(p, q, rtol=1e-10, atol=1e-12) for p, q in pairs)

    assert as_expected()
    with broken(Fingerprint, "matches", lambda self, groups, states: True):
        assert fails(as_expected, RuntimeError)


@every_backend
def test_removed_parameters_are_not_kept_alive(backend):
    params = parameters(torch.float32, [(5,), (7,), (9,)])
    optimizer = fa.ActiveAdamW(params, interval=2, backend=backend)
    train(optimizer, 3)
    gone = optimizer.param_groups[0]["params"].pop(1)
    optimizer.state.pop(gone)
    weak = weakref.ref(gone)
    del gone, params
    train(optimizer, 1)
    assert weak() is None
