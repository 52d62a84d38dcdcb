"""CUDA kernels on a GPU: parity matrix, graphs, skipped steps, determinism. Skipped if there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_adaptive as fa

from ..common.cases import CASES, POLICIES, Case, Gradients, all_equal, every_case, parameters, state_of, train
from ..parity.test_parity import DTYPES, for_large, large_and_odd, many_layouts, worst_excess

pytestmark = pytest.mark.gpu

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_policy = pytest.mark.parametrize("policy", [p for p in POLICIES if "displacement" not in p])


def on_gpu(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().cuda().requires_grad_() for p in params]


@pytest.mark.feature("every optimizer, policy, decay and dtype within rounding of float64", backend="native")
@every_dtype
@every_case
def test_a_step_is_within_rounding_of_the_float64_reference(case, dtype):
    assert worst_excess(case, dtype, "native", make=many_layouts, device="cuda") <= 1.0


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_large_odd_tensors(case, capturable):
    large = for_large(case)
    case = Case(case.optimizer, case.policy, case.decoupled, {**large.extra, "capturable": capturable})
    assert worst_excess(case, torch.float32, "native", make=large_and_odd, device="cuda") <= 1.0


@every_case
def test_counters_on_the_device_change_no_bit(case):
    runs = []
    for capturable in (False, True):
        params = on_gpu(many_layouts(torch.float32))
        optimizer = case.build(params, backend="native", capturable=capturable)
        train(optimizer, 7, gradients=Gradients(missing=0.15))
        runs.append((params, state_of(optimizer)))
    (params, state), (other_params, other_state) = runs
    assert all_equal(params, other_params)
    assert all(torch.equal(state[name].cpu(), other_state[name].cpu()) for name in state)


@pytest.mark.feature("GradScaler, with and without fused=True", backend="native")
@every_policy
@pytest.mark.parametrize("optimizer", ["SGD-momentum", "AdamW"])
def test_a_skipped_step_changes_nothing(optimizer, policy):
    params = on_gpu(parameters(torch.float32))
    built: Any = Case(optimizer, policy, True).build(params, backend="native", fused=True)
    built.grad_scale, built.found_inf = torch.full((), 2.0, device="cuda"), torch.zeros((), device="cuda")
    train(built, 4)
    before = [p.detach().clone() for p in params], {n: v.clone() for n, v in state_of(built).items()}
    built.found_inf.fill_(1.0)
    params[-1].grad.fill_(torch.inf)  # type: ignore[union-attr]
    built.step()
    assert all_equal(before[0], params)
    assert all(torch.equal(before[1][name], value) for name, value in state_of(built).items())


def trained(case):
    """Returns parameters and state after five steps."""
    optimizer = case.build(on_gpu(large_and_odd(torch.float32)), backend="native")
    return train(optimizer, 5), state_of(optimizer)


@pytest.mark.feature("the same bits with any number of threads, any grid", backend="native")
@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_two_runs_have_the_same_bits(case):
    (params, state), (other_params, other_state) = trained(case), trained(case)
    assert all_equal(params, other_params)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


@pytest.mark.feature("no host synchronisation in step()", backend="native")
@every_policy
def test_the_host_does_not_wait_in_a_step(policy):
    params = on_gpu(parameters(torch.float32))
    optimizer = Case("AdamW", policy, True).build(params, backend="native")
    train(optimizer, 2)
    Gradients().set(params, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("synchronised"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_step_with_a_tensor_lr_draws_and_clipping_does_not_wait():
    params = on_gpu(parameters(torch.float32))
    lr = torch.tensor(0.1, device="cuda")
    optimizer = fa.ActiveAdamW(params, lr=lr, interval=2, capturable=True, max_grad_norm=1.0, skip_nonfinite=True)
    search = fa.ASLR(optimizer)
    train(optimizer, 2)
    Gradients().set(params, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            lr.mul_(0.9)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    search.remove()


def test_steps_with_counters_on_the_host_cannot_be_skipped():
    params = on_gpu(parameters(torch.float32))
    optimizer = fa.AdamW(params, skip_nonfinite=True, backend="native")
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="capturable=True, or fused=True"):
        train(optimizer, 1)
    assert all_equal(before, params)


@pytest.mark.parametrize("master", ["split", "stochastic"])
@pytest.mark.parametrize("policy", ["fixed", "active"])
def test_masters_equal_those_of_the_cpu_bit_for_bit(policy, master):
    case, runs = Case("AdamW", policy, True), []
    for device in ("cpu", "cuda"):
        params = [p.detach().to(device).requires_grad_() for p in parameters(torch.bfloat16, [(20_001,), (3, 5)])]
        optimizer = case.build(params, backend="native", master=master)
        train(optimizer, 7)
        runs.append([p.detach().cpu() for p in params] + [v.cpu() for v in state_of(optimizer).values()])
    assert all_equal(*runs)


@pytest.mark.parametrize("compiler", ["inductor"])
def test_a_compiled_step_gives_the_eager_results(compiler):
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


@pytest.mark.feature("10 000 tensors", backend="native")
def test_ten_thousand_tensors():
    """There are more gradient addresses than kernel arguments can hold."""
    params = [torch.randn(64, device="cuda").requires_grad_() for _ in range(10_000)]
    copies = [p.detach().double().requires_grad_() for p in params]
    ours = fa.ActiveAdamW(params, lr=0.01, interval=2, backend="native")
    theirs = fa.ActiveAdamW(copies, lr=0.01, interval=2, backend="reference")
    for _ in range(5):
        for p, q in zip(params, copies, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.double()
        ours.step()
        theirs.step()
    worst = max((p.double() - q).abs().max().item() for p, q in zip(params, copies, strict=True))
    assert worst < 1e-5


@pytest.mark.feature("a tensor of more than 2³¹ elements", backend="native")
def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 14 * numel:
        pytest.skip("needs 30 GB of free GPU memory")
    p = torch.ones(numel, dtype=torch.bfloat16, device="cuda").requires_grad_()
    p.grad = torch.full_like(p, 0.5, requires_grad=False)
    p.grad[-3:] = 2.0
    optimizer = fa.SGD([p], lr=0.25, momentum=0.9, backend="native")
    optimizer.step()
    assert p[:3].tolist() == [0.875] * 3
    assert p[2**31 - 2 : 2**31 + 2].tolist() == [0.875] * 4
    assert p[-5:].tolist() == [0.875] * 2 + [0.5] * 3
