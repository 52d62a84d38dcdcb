"""What a native step checks before it changes anything, whichever of several threads looks at the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.backends import native
from fused_adaptive.backends.plans import GRADIENTS, READY, STALE

from .cases import parameters, train
from .test_python_calls import _noise, _strided, by_operator

if reason := native.why_not([torch.device("cpu")]):
    pytest.skip(reason, allow_module_level=True)

MANY = 333
PLACES = [0, 1, 31, 32, 63, 64, 200, MANY - 33, MANY - 32, MANY - 1]


def _moves(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


#: What may be wrong with one parameter of many, and what the checks come to.
WRONG: dict[str, tuple[Callable[[Tensor, dict[str, Any]], Any], int]] = {
    "nothing": (lambda p, state: None, READY),
    "the parameter has moved": (lambda p, state: _moves(p), STALE),
    "its first state has moved": (lambda p, state: _moves(next(iter(state.values()))), STALE),
    "its last state has moved": (lambda p, state: _moves(state["grad_sign_prev"]), STALE),
    "it is laid out anew": (lambda p, state: setattr(p, "data", p.data.t()), STALE),
    "its gradient is strided": (lambda p, state: setattr(p, "grad", _strided(p)), GRADIENTS),
    "its gradient is absent": (lambda p, state: setattr(p, "grad", None), READY),
}


def many(threads: int) -> tuple[list[Tensor], fa.AdamW, Any]:
    torch.set_num_threads(threads)
    params = parameters(torch.float32, [(3, 3)] * MANY)
    optimizer = fa.AdamW(params, backend="native", policy=fa.ActiveLR(interval=3))
    for p in params:
        p.grad = _noise(p)
    optimizer.step()
    assert optimizer._gathered is not None
    return params, optimizer, optimizer._gathered.compiled[0]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("what", WRONG)
def test_one_of_many_is_noticed_wherever_it_is(what, threads):
    change, expected = WRONG[what]
    params, optimizer, plan = many(threads)
    for place in PLACES:
        change(params[place], optimizer.state[params[place]])
        with by_operator():
            assert plan.take_gradients() == expected, place
        assert plan.take_gradients() == expected, place
        assert plan._absent == ([] if params[place].grad is not None else [place])
        for p in params:
            p.grad = torch.empty_like(p).copy_(_noise(p))
        optimizer.step()
        assert optimizer._gathered is not None
        plan = optimizer._gathered.compiled[0]
        assert plan.take_gradients() == READY


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_gradient_that_is_its_parameter_is_named_among_many(threads):
    params, _, plan = many(threads)
    for place in PLACES:
        params[place].grad = params[place].detach()
        with pytest.raises(RuntimeError, match=f"the gradient of parameter {place} is the parameter itself"):
            plan.take_gradients()
        params[place].grad = _noise(params[place])
        assert plan.take_gradients() == READY


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_exception_among_many_is_heard_and_forgotten(threads):
    params, _, plan = many(threads)
    for place in PLACES:
        plan._params = [*params[:place], object(), *params[place + 1 :]]
        with pytest.raises(AttributeError, match="grad"):
            plan.take_gradients()
        with pytest.raises(RuntimeError, match="take the gradients first"):
            plan.step(None, None, None)
        plan._params = params
        assert plan.take_gradients() == READY


def test_operators_refuse_gradients_that_do_not_fit():
    params = parameters(torch.float32)
    optimizer = fa.AdamW(params, backend="native")
    train(optimizer, 1)
    assert optimizer._gathered is not None
    number, grads = optimizer._gathered.compiled[0]._number, [p.grad for p in params]
    check = torch.ops.fused_adaptive.plan_check
    assert check(number, grads, []) == 0
    for absent in ([3, 2], [1, 1], [-1, 0], [2, 99]):
        with pytest.raises(RuntimeError, match="absent must be ascending"):
            check(number, grads[2:], absent)
    with pytest.raises(RuntimeError, match="one gradient a parameter"):
        check(number, grads[1:], [])
    assert check(number, grads[2:], [0, 1]) == 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_buffer_that_is_gone_comes_back_with_the_next_gradient(nesterov):
    runs = []
    for backend in ("native", "reference"):
        params = parameters(torch.float64)
        optimizer = fa.SGD(
            params, lr=0.1, momentum=0.9, nesterov=nesterov, backend=backend, policy=fa.ActiveLR(interval=2)
        )
        train(optimizer, 2)
        del optimizer.state[params[1]]["momentum_buffer"]
        params[1].grad = None
        optimizer.step()
        runs.append([p.detach() for p in train(optimizer, 2, start=3)])
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
