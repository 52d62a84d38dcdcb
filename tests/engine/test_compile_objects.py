"""``torch.compile`` and the optimizer object: built in compiled code, known to schedulers, freed with graphs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import fused_adaptive as fa


@pytest.fixture(autouse=True)
def _new_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("cls", [fa.AdamW, fa.ActiveSGD])
def test_an_optimizer_can_be_built_in_compiled_code(cls):
    arguments = {"interval": 2} if cls is fa.ActiveSGD else {}

    def build_and_step(p: Tensor) -> Any:
        optimizer = cls([p], lr=0.1, **arguments)
        optimizer.step()
        return optimizer

    made, expected = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    made.grad, expected.grad = torch.ones(3), torch.ones(3)
    optimizer = torch.compile(build_and_step, backend="eager")(made)
    assert type(optimizer) is cls
    build_and_step(expected)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True}])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_step_leaves_no_reference_cycle(compiler, options):
    gc.collect()
    gc.disable()
    try:
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = fa.ActiveAdamW([p], interval=2, backend="reference", **options)
        p.grad = torch.ones(3)
        optimizer.step()
        step = torch.compile(optimizer.step, backend=compiler)
        step()
        step()
        dead = [weakref.ref(thing) for thing in (p, optimizer, optimizer.state[p]["exp_avg"])]
        del p, optimizer, step
        assert [ref() is None for ref in dead] == [True, True, True]
    finally:
        gc.enable()


def test_schedulers_notice_a_compiled_step():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fa.SGD([p], lr=0.1, backend="reference")
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer._opt_called = False
    torch.compile(optimizer.step, backend="eager")()
    assert optimizer._opt_called


def test_a_tensor_that_groups_shared_when_compiled_and_do_not_any_more_is_refused():
    """torch.compile passes one of the tensors to both groups, in the steps of torch.optim too."""
    p, q = (torch.zeros(4, requires_grad=True) for _ in range(2))
    optimizer = fa.SGD([{"params": [p]}, {"params": [q]}], lr=torch.tensor(0.5))
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    step()
    assert torch.equal(q, torch.full((4,), -1.0))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="shared a tensor as their 'lr'"):
        step()
    assert torch.equal(q, torch.full((4,), -1.0))
