"""The first gradient fills SGD's momentum buffer without dampening, whatever comes between this step and the start.

``b₁ = g₁``, and ``b ← μ·b + (1 − dampening)·g`` from then on, as in ``torch.optim.SGD``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.backends import native

from ..common import recording
from ..common.breaking import broken, fails
from ..common.cases import BACKENDS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ARGUMENTS: dict[str, Any] = {"lr": 1.0, "momentum": 0.5, "dampening": 0.75}
#: After gradients of 1: p = −1, b = 1; p = −1.75, b = 0.75.
FIRST, SECOND = -1.0, -1.75


@pytest.fixture(autouse=True)
def _on_the_device(monkeypatch):
    recording.emulate(monkeypatch)


def sgd(backend: str, device: str = "cpu", **arguments: Any) -> Any:
    p = torch.nn.Parameter(torch.zeros(3, device=device))
    return fa.SGD([p], **{**ARGUMENTS, "fused": True, "backend": backend, **arguments})


def step(optimizer: Any, skipped: bool = False, gradient: float = 1.0) -> float:
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.full_like(p, gradient)
    if skipped:
        optimizer.found_inf = torch.ones((), device=p.device)
    elif optimizer.param_groups[0]["fused"]:
        optimizer.found_inf = torch.zeros((), device=p.device)
    optimizer.step()
    optimizer.found_inf = None
    return p.detach().unique().item()


def saved_and_loaded(optimizer: Any) -> Any:
    other = copy.deepcopy(optimizer)
    other.state.clear()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def with_another_group(optimizer: Any) -> Any:
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, device=p.device))]})
    return optimizer


def with_other_data(optimizer: Any) -> Any:
    (p,) = optimizer.param_groups[0]["params"]
    p.data = p.data.clone()
    return optimizer


def after(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def change(optimizer: Any) -> Any:
        call(optimizer)
        return optimizer

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda optimizer: optimizer,
    "end_interval": after(lambda optimizer: optimizer.end_interval()),
    "learning_rates": after(lambda optimizer: optimizer.learning_rates()),
    "state_dict": after(lambda optimizer: optimizer.state_dict()),
    "load_state_dict": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "add_param_group": with_another_group,
    "data": with_other_data,
    "a policy": after(lambda optimizer: optimizer.param_groups[0].update(policy=fa.ActiveLR(interval=5, high=0.1))),
    "another skipped step": after(lambda optimizer: step(optimizer, skipped=True)),
}


@pytest.mark.parametrize("device", DEVICES)
@every_backend
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_skipped_step(change, backend, device):
    optimizer = sgd(backend, device)
    assert step(optimizer, skipped=True, gradient=torch.inf) == 0
    optimizer = CHANGES[change](optimizer)
    assert step(optimizer) == FIRST
    assert step(optimizer, skipped=True) == FIRST
    optimizer = CHANGES[change](optimizer)
    assert step(optimizer) == SECOND


@every_backend
def test_only_the_parameters_without_a_gradient_before(backend):
    optimizer = sgd(backend)
    assert step(optimizer) == FIRST
    with_another_group(optimizer)
    late = optimizer.param_groups[1]["params"][0]
    late.grad = torch.ones_like(late)
    assert step(optimizer, skipped=True) == FIRST
    optimizer.end_interval()
    assert step(optimizer) == SECOND
    assert late.unique().item() == FIRST


@every_backend
@pytest.mark.parametrize("again", [False, True])
def test_momentum_that_was_dropped_or_switched_on(backend, again):
    arguments: dict[str, Any] = {"policy": fa.ActiveLR(interval=None, high=0.1), "fused": False}
    optimizer = sgd(backend, **arguments, momentum=0.5 if again else 0)
    assert step(optimizer) == FIRST
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p].pop("momentum_buffer", None)
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.end_interval()  # with a gradient
    assert step(optimizer) == 2 * FIRST


@every_backend
@pytest.mark.parametrize("wrong", [{"weight_decay": None}, {"dampening": "much"}, {"lr": "fast"}])
def test_after_a_step_that_raised(backend, wrong):
    optimizer = sgd(backend)
    right = {name: optimizer.param_groups[0].get(name) for name in wrong}
    optimizer.param_groups[0].update(wrong)
    with pytest.raises((TypeError, ValueError)):
        step(optimizer)
    optimizer.param_groups[0].update(right)
    (p,) = optimizer.param_groups[0]["params"]
    assert "momentum_buffer" not in optimizer.state_dict()["state"].get(0, {})
    assert not p.any()
    assert step(optimizer) == FIRST
    assert step(optimizer) == SECOND


@every_backend
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
def test_a_compiled_step_does_not_lose_the_buffer(backend, compiler):
    optimizer = sgd(backend, skip_nonfinite=True)
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    torch.compiler.reset()
    compiled = torch.compile(optimizer.step, fullgraph=True, backend=compiler)
    p.grad = torch.ones_like(p)
    with pytest.raises(Exception, match="this step would create state"):
        compiled()
    optimizer.step()
    compiled()
    assert p.unique().item() == SECOND
    assert optimizer.state[p]["momentum_buffer"].unique().item() == 0.75


@pytest.mark.parametrize("device", DEVICES)
@every_backend
def test_a_compiled_step_after_a_skipped_one(backend, device):
    """Also if only the device knows that it was skipped."""
    optimizer = sgd(backend, device)
    step(optimizer, skipped=True)
    torch.compiler.reset()
    with pytest.raises(Exception, match="this step would create state"):
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()


@pytest.mark.skipif("native" not in BACKENDS, reason="the native backend cannot run here")
def test_a_plan_that_forgets_is_noticed():
    with broken(native.NativePlan, "unfilled", lambda plan: []):
        assert fails(lambda: test_after_a_step_that_raised("native", {"weight_decay": None}))
