"""CUDA graphs of a step on a GPU: skipped steps, rates that change, clipping, masters. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa

from .cases import POLICIES, Case, Gradients, all_equal, parameters, state_of, train
from .test_gpu import on_gpu

pytestmark = pytest.mark.gpu

every_policy = pytest.mark.parametrize("policy", [p for p in POLICIES if "displacement" not in p])
STEPS = 12  # at least three intervals of every policy


def run(
    case: Case,
    captured: bool,
    before_step: Callable[[Any, list[Tensor], int], None] = lambda *_: None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> list[Tensor]:
    """Parameters, state and norms of steps, or of replays of the third of them."""
    params = on_gpu(parameters(dtype))
    optimizer: Any = case.build(params, backend="native", **{"capturable": True, **options})
    graph, buffers = torch.cuda.CUDAGraph(), [torch.zeros_like(p, requires_grad=False) for p in params]
    norms = []
    for step in range(STEPS):
        Gradients().set(params, step)
        for p, buffer in zip(params, buffers, strict=True):
            buffer.copy_(p.grad)  # type: ignore[arg-type]
            p.grad = buffer
        before_step(optimizer, buffers, step)
        if captured and step == 2:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                optimizer.step()
        if captured and step >= 2:
            graph.replay()
        else:
            optimizer.step()
        norms += [] if optimizer.grad_norm is None else [optimizer.grad_norm.clone()]
    return [*params, *norms, *state_of(optimizer).values()]


@every_policy
@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW"])
def test_replays_skip_where_amp_found_an_overflow(name, policy):
    case = Case(name, policy, True)
    scale, found_inf = torch.full((), 4.0, device="cuda"), torch.zeros((), device="cuda")

    def overflow(optimizer: Any, buffers: list[Tensor], step: int) -> None:
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        found_inf.fill_(float(step % 5 == 4))
        if step % 5 == 4:
            buffers[0].fill_(torch.inf)

    assert all_equal(*(run(case, captured, overflow, fused=True) for captured in (False, True)))


@every_policy
def test_replays_skip_where_the_norm_is_not_finite(policy):
    def poison(optimizer: Any, buffers: list[Tensor], step: int) -> None:
        if step % 5 == 4:
            buffers[1][0, 0] = torch.nan

    case = Case("AdamW", policy, True)
    results = [run(case, captured, poison, max_grad_norm=1.0, skip_nonfinite=True) for captured in (False, True)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert all(v.isfinite().all() for v in results[1][:6])


@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replays_follow_a_tensor_lr(policy, dtype):
    case = Case("SGD-momentum", policy, True)
    results = []
    for captured in (False, True):
        lr = torch.tensor(0.05, dtype=dtype, device="cuda")
        scheduled = lambda optimizer, buffers, step, lr=lr: lr.mul_(0.75)  # noqa: E731
        results.append(run(case, captured, scheduled, lr=lr))
    assert all_equal(*results)


@pytest.mark.parametrize("master", ["split", "stochastic"])
@pytest.mark.parametrize("policy", ["active", "tlr-preconditioned-tensor"])
def test_replays_keep_masters(policy, master):
    case = Case("SGD-momentum", policy, True)
    assert all_equal(*(run(case, captured, dtype=torch.bfloat16, master=master) for captured in (False, True)))


def test_a_step_with_a_tensor_lr_and_clipping_does_not_wait():
    params = on_gpu(parameters(torch.float32))
    lr = torch.tensor(0.1, device="cuda")
    optimizer = fa.ActiveAdamW(params, lr=lr, interval=2, capturable=True, max_grad_norm=1.0, skip_nonfinite=True)
    train(optimizer, 2)
    Gradients().set(params, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            lr.mul_(0.9)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_counters_on_the_host_cannot_skip():
    params = on_gpu(parameters(torch.float32))
    optimizer = fa.AdamW(params, skip_nonfinite=True, backend="native")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="capturable=True, or fused=True"):
        train(optimizer, 1)
    assert all_equal(before, params)


@pytest.mark.parametrize("master", ["split", "stochastic"])
@pytest.mark.parametrize("policy", ["fixed", "active"])
def test_masters_have_the_bits_of_the_cpu(policy, master):
    case, runs = Case("AdamW", policy, True), []
    for device in ("cpu", "cuda"):
        params = [p.detach().to(device).requires_grad_() for p in parameters(torch.bfloat16, [(20_001,), (3, 5)])]
        optimizer = case.build(params, backend="native", master=master)
        train(optimizer, 7)
        runs.append([p.detach().cpu() for p in params] + [v.cpu() for v in state_of(optimizer).values()])
    assert all_equal(*runs)


@pytest.mark.parametrize("compiler", ["inductor"])
def test_a_compiled_step(compiler):
    runs = []
    for compiled in (False, True):
        params = on_gpu(parameters(torch.float32))
        lr = torch.tensor(0.1, device="cuda")
        optimizer = fa.ActiveAdamW(params, lr=lr, interval=2, capturable=True, max_grad_norm=1.0)
        step = torch.compile(optimizer.step, fullgraph=True, backend=compiler) if compiled else optimizer.step
        for i in range(8):
            Gradients().set(params, i)
            (step if i else optimizer.step)()
            lr.mul_(0.9)
        runs.append(params)
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected)
