"""Triton kernels on a GPU: parity with reference and native, graphs, skipped steps. Skipped if there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fused_adaptive.backends import native, triton

from ..common.cases import CASES, POLICIES, Case, Gradients, all_equal, every_case, parameters, state_of, train
from ..parity.test_parity import DTYPES, for_large, large_and_odd, many_layouts, worst_excess

CUDA = [torch.device("cuda", 0)]
pytestmark = pytest.mark.gpu
every_policy = pytest.mark.parametrize("policy", [p for p in POLICIES if "displacement" not in p])


@pytest.fixture(autouse=True)
def _can_run():
    if reason := triton.why_not(CUDA):
        pytest.skip(reason)


def on_gpu(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().cuda().requires_grad_() for p in params]


def run(case: Case, dtype: torch.dtype, backend: str = "triton", **overrides: Any) -> dict[str, torch.Tensor]:
    params = on_gpu(many_layouts(dtype))
    optimizer = case.build(params, backend=backend, **overrides)
    train(optimizer, 7, gradients=Gradients(missing=0.15))
    optimizer.end_interval()
    return {f"parameter {i}": p.detach() for i, p in enumerate(params)} | state_of(optimizer)


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name].cpu(), b[name].cpu())]


@pytest.mark.feature("every optimizer, policy, decay and dtype within rounding of float64", backend="triton")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@every_case
def test_a_step_is_within_rounding_of_the_float64_reference(case, dtype):
    assert worst_excess(case, dtype, "triton", make=many_layouts, device="cuda") <= 1.0


@pytest.mark.parametrize("case", CASES[::7], ids=str)
def test_large_odd_tensors(case):
    assert worst_excess(for_large(case), torch.float32, "triton", make=large_and_odd, device="cuda") <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_results_equal_those_of_the_native_kernels_bit_for_bit(case, dtype):
    if reason := native.why_not(CUDA):
        pytest.skip(reason)
    assert differing(run(case, dtype), run(case, dtype, "native")) == []


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_counters_on_the_device_change_no_bit(case):
    assert differing(run(case, torch.float32), run(case, torch.float32, capturable=True)) == []


@every_policy
def test_a_skipped_step_changes_nothing(policy):
    params = on_gpu(parameters(torch.float32))
    built: Any = Case("AdamW", policy, True).build(params, backend="triton", fused=True)
    built.grad_scale, built.found_inf = torch.full((), 2.0, device="cuda"), torch.zeros((), device="cuda")
    train(built, 4)
    before = [p.detach().clone() for p in params], {n: v.clone() for n, v in state_of(built).items()}
    built.found_inf.fill_(1.0)
    params[-1].grad.fill_(torch.inf)  # type: ignore[union-attr]
    built.step()
    assert all_equal(before[0], params)
    assert differing(before[1], state_of(built)) == []


@pytest.mark.feature("no host synchronisation in step()", backend="triton")
@every_policy
@pytest.mark.parametrize("capturable", [False, True])
def test_the_host_does_not_wait_in_a_step(policy, capturable):
    """It does not wait either if addresses of gradients change."""
    params = on_gpu(parameters(torch.float32))
    optimizer = Case("AdamW", policy, True).build(params, backend="triton", capturable=capturable)
    train(optimizer, 2)
    kept = []
    for step in range(6):
        Gradients().set(params, step)
        kept += [p.grad for p in params]  # keeps them alive, so that the next ones have other addresses
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.feature("a tensor of more than 2³¹ elements", backend="triton")
def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 14 * numel:
        pytest.skip("needs 30 GB of free GPU memory")
    p = torch.ones(numel, dtype=torch.bfloat16, device="cuda").requires_grad_()
    p.grad = torch.full_like(p, 0.5, requires_grad=False)
    p.grad[-3:] = 2.0
    Case("SGD-momentum", "fixed", True).build([p], backend="triton", lr=0.25, weight_decay=0.0).step()
    assert p[2**31 - 2 : 2**31 + 2].tolist() == [0.875] * 4
    assert p[-5:].tolist() == [0.875] * 2 + [0.5] * 3
