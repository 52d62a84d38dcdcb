"""Checks of a native step before it changes anything, and that it owns nothing between steps."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.backends import native
from fused_adaptive.backends.plans import GRADIENTS, READY, STALE

from ..common.cases import BACKENDS, parameters, train
from ..core.test_python_calls import _noise, _strided, by_operator

if reason := native.why_not([torch.device("cpu")]):
    pytest.skip(reason, allow_module_level=True)

MANY = 333
PLACES = [0, 1, 31, 32, 63, 64, 200, MANY - 33, MANY - 32, MANY - 1]


def _moves(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


#: A change of one parameter out of many, and the result of the checks.
WRONG: dict[str, tuple[Callable[[Tensor, dict[str, Any]], Any], int]] = {
    "nothing": (lambda p, state: None, READY),
    "the parameter has moved": (lambda p, state: _moves(p), STALE),
    "its first state has moved": (lambda p, state: _moves(next(iter(state.values()))), STALE),
    "its last state has moved": (lambda p, state: _moves(state["grad_sign_prev"]), STALE),
    "it is laid out anew": (lambda p, state: setattr(p, "data", p.data.t()), STALE),
    "its gradient is strided": (lambda p, state: setattr(p, "grad", _strided(p)), GRADIENTS),
    "its gradient is absent": (lambda p, state: setattr(p, "grad", None), READY),
}


def many() -> tuple[list[Tensor], fa.AdamW, Any]:
    params = parameters(torch.float32, [(3, 3)] * MANY)
    optimizer = fa.AdamW(params, backend="native", policy=fa.ActiveLR(interval=3))
    for p in params:
        p.grad = _noise(p)
    optimizer.step()
    assert optimizer._participants is not None
    return params, optimizer, optimizer._participants.plans[0]


def test_a_check_prefetches_the_objects_that_it_reads(monkeypatch):
    """It is not told of torch's objects where torch hides their addresses, and works without."""
    told = []
    operator = torch.ops.fused_adaptive.plan_prefetch_from
    monkeypatch.setattr(torch.ops.fused_adaptive, "plan_prefetch_from", lambda *given: told.append(given[1]))
    params, optimizer, plan = many()
    tensors = [t for p in params for t in (p, *optimizer.state[p].values())]
    assert {address for addresses in told for address in addresses} == {
        address for t in tensors for address in (t._cdata, t.untyped_storage()._cdata)
    }
    assert [t._cdata for t in plan._held] == told[0][::2]
    with pytest.raises(RuntimeError, match="two addresses a tensor"):
        operator(plan._number, told[0][2:])
    monkeypatch.delattr(torch._C, "_storage_address")
    assert len(many()[0]) == MANY
    assert len(told) == 1


@pytest.mark.parametrize("what", WRONG)
def test_one_bad_parameter_is_noticed_at_any_position(what):
    change, expected = WRONG[what]
    params, optimizer, plan = many()
    for place in PLACES:
        change(params[place], optimizer.state[params[place]])
        with by_operator():
            assert plan.take_gradients() == expected, place
        assert plan.take_gradients() == expected, place
        assert plan._absent == ([] if params[place].grad is not None else [place])
        for p in params:
            p.grad = torch.empty_like(p).copy_(_noise(p))
        optimizer.step()
        assert optimizer._participants is not None
        plan = optimizer._participants.plans[0]
        assert plan.take_gradients() == READY


def test_a_gradient_that_aliases_its_parameter_is_named():
    params, _, plan = many()
    for place in PLACES:
        params[place].grad = params[place].detach()
        with pytest.raises(RuntimeError, match=f"the gradient of parameter {place} is the parameter itself"):
            plan.take_gradients()
        params[place].grad = _noise(params[place])
        assert plan.take_gradients() == READY


def test_an_exception_while_gradients_are_read_is_raised_and_has_no_later_effect():
    params, _, plan = many()

    class Refusing(torch.nn.Parameter):
        def __getattribute__(self, name: str) -> Any:
            if name == "grad":
                raise ValueError("not today")
            return super().__getattribute__(name)

    held = plan._held
    size = len(held) // len(params)
    for place in PLACES:
        plan._held = list(held)
        plan._held[size * place] = Refusing(held[size * place].detach())
        with pytest.raises(ValueError, match="not today"):
            plan.take_gradients()
        with pytest.raises(RuntimeError, match="take the gradients first"):
            plan.step(None, None, None)
        plan._held = held
        assert plan.take_gradients() == READY


def test_operators_refuse_gradients_that_do_not_fit():
    params = parameters(torch.float32)
    optimizer = fa.AdamW(params, backend="native")
    train(optimizer, 1)
    assert optimizer._participants is not None
    plan: Any = optimizer._participants.plans[0]
    grads = [p.grad for p in params]

    def check(number: int, *gradients: Any) -> int:
        return torch.ops.fused_adaptive.plan_check(number, plan._held, *gradients)

    number = plan._number
    assert check(number, grads, []) == 0
    for absent in ([3, 2], [1, 1], [-1, 0], [2, 99]):
        with pytest.raises(RuntimeError, match="absent must be ascending"):
            check(number, grads[2:], absent)
    with pytest.raises(RuntimeError, match="one gradient a parameter"):
        check(number, grads[1:], [])
    assert check(number, grads[2:], [0, 1]) == 0


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_buffer_that_was_removed_is_created_with_the_next_gradient(nesterov):
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


# ---- ownership of parameters and state ----

every_policy = pytest.mark.parametrize("policy", [None, fa.ActiveLR(interval=2, high=0.1), fa.TrainableLR(interval=2)])


@every_policy
def test_parameters_and_state_can_be_swapped_between_steps(policy):
    """``swap_tensors`` refuses tensors with other references; ``module.to()`` and ``load_state_dict`` may use it."""
    params = parameters(torch.float32)
    optimizer = fa.AdamW(params, lr=0.1, policy=policy, backend="native")
    expected = fa.AdamW(parameters(torch.float32), lr=0.1, policy=policy, backend="native")
    for step in range(6):
        train(optimizer, 1, start=step)
        train(expected, 1, start=step)
        for p in params:
            p.grad = None
            torch.utils.swap_tensors(p, p.detach().clone().requires_grad_())
            moment = optimizer.state[p]["exp_avg"]
            torch.utils.swap_tensors(moment, moment.clone())
    assert all(map(torch.equal, params, expected.param_groups[0]["params"]))


def test_a_parameter_that_is_removed_is_freed():
    params = parameters(torch.float32)
    optimizer = fa.AdamW(params, backend="native")
    train(optimizer, 2)
    gone = weakref.ref(params.pop(0))
    optimizer.state.pop(optimizer.param_groups[0]["params"].pop(0))
    train(optimizer, 1)
    assert gone() is None


def offload(p: Tensor, how: str) -> None:
    if how == "resize":
        p.untyped_storage().resize_(0)
    else:
        p.data = torch.empty(0)


def bring_back(p: Tensor, how: str, value: Tensor) -> None:
    if how == "resize":
        p.untyped_storage().resize_(value.numel() * value.element_size())
        p.data.copy_(value)
    else:
        p.data = value.clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["resize", "empty"])
@pytest.mark.parametrize(
    "policy", [None, fa.ActiveLR(interval=2, high=0.1), fa.TrainableLR(interval=2), fa.Hypergradient(1e-3)]
)
def test_idle_parameters_need_no_memory(policy, how, backend):
    """Groups of parameters take turns. Counts, gains and interval ends of idle ones continue without their memory."""
    runs = []
    for offloads in (True, False):
        blocks = parameters(torch.float32, [(10,), (10,)])
        optimizer = fa.AdamW(blocks, lr=0.1, policy=policy, backend=backend)
        order, kept = torch.Generator().manual_seed(0), {}
        for step in range(12):
            active, idle = blocks[step // 3 % 2], blocks[1 - step // 3 % 2]
            if step % 3 == 0:
                if active in kept and offloads:
                    bring_back(active, how, kept[active])
                kept[idle], idle.grad = idle.detach().clone(), None
                if offloads:
                    offload(idle, how)
            active.grad = torch.randn(10, generator=order)
            optimizer.step()
        optimizer.end_interval()
        runs.append(
            [active.detach().clone(), *optimizer.state[blocks[0]].values(), *optimizer.state[blocks[1]].values()]
        )
    assert all(map(torch.equal, *runs))


def test_displacements_at_an_intervals_end_need_the_parameters_memory():
    (p,) = parameters(torch.float32, [(10,)])
    optimizer = fa.SGD([p], lr=0.1, policy=fa.TrainableLR(interval=3), backend="native")
    train(optimizer, 1)
    p.grad = None
    offload(p, "resize")
    with pytest.raises(
        RuntimeError, match=r"memory of parameter 0 has been freed.* bring it back .* source='gradient'"
    ):
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_share_memory_are_updated_one_after_the_other(backend):
    """As in torch's loop over tensors. Kernels would update both at once."""

    def run(make: Callable[[list[Tensor]], Any]) -> Tensor:
        first, second = torch.nn.Parameter(torch.ones(1000)), torch.nn.Parameter(torch.empty(0))
        second.data = first.data
        optimizer, order = make([first, second]), torch.Generator().manual_seed(0)
        for _ in range(4):
            first.grad, second.grad = torch.randn(1000, generator=order), torch.randn(1000, generator=order)
            optimizer.step()
        return first.detach()

    expected = run(lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = run(lambda params: fa.AdamW(params, lr=0.01, backend=backend))
    torch.testing.assert_close(ours, expected)
    assert ["parameters 0 and 1 share memory" in str(w.message) for w in caught] == [True] * (backend != "reference")
