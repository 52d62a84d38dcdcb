"""Versions: autograd notices whatever a step writes, although state that is made together shares a counter."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.versions import MOST_SHARED, SharedVersion, Written

from .cases import BACKENDS, CASES, Gradients, all_equal, parameters, train

SHAPES = [(7,), (3, 5), (), (2, 3), (0,), (129,)]


def adamw(params, backend: str = "reference", **arguments) -> fa.AdamW:
    return fa.AdamW(params, lr=0.01, weight_decay=0.1, backend=backend, **arguments)


def copied(optimizer):
    return copy.deepcopy(optimizer)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def loaded(optimizer):
    """From a dict in which everything is float64, and has to be converted."""
    given = copy.deepcopy(optimizer.state_dict())
    for state in given["state"].values():
        state.update({name: value.double() for name, value in state.items()})
    optimizer.load_state_dict(given)
    return optimizer


def loaded_as_it_is(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def as_it_is(optimizer):
    return optimizer


def grown(optimizer):
    """More counters than are told apart, one for each parameter that joins."""
    for i in range(MOST_SHARED + 4):
        p = torch.full((3,), 1.0 + i).requires_grad_()
        optimizer.add_param_group({"params": [p]})
        train(optimizer, 1, start=10 + i)
    return optimizer


def silent(optimizer, steps: range) -> list[list[str]]:
    """What each of these steps, and an end of the interval after them, changes although its version stays."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = []
    for step in steps:
        Gradients(missing=0.3).set(params, step)
        found.append(_silent(optimizer, optimizer.step))
    return [*found, _silent(optimizer, optimizer.end_interval)]


def _silent(optimizer, call: Callable[[], object]) -> list[str]:
    written = {f"{i} itself": p for i, p in enumerate(optimizer.state)}
    written |= {f"{i}, {k}": t for i, s in enumerate(optimizer.state.values()) for k, t in s.items() if t.dim()}
    before = {name: (t._version, t.detach().clone()) for name, t in written.items()}
    call()
    return [n for n, (v, old) in before.items() if written[n]._version == v and not torch.equal(written[n], old)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_that_a_step_writes_is_silent(case, backend):
    optimizer = case.build(parameters(torch.float32, SHAPES), backend=backend)
    train(optimizer, 3)
    assert not any(silent(optimizer, range(3, 7)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [copied, pickled, loaded, loaded_as_it_is, grown])
def test_nothing_is_silent_wherever_state_comes_from(change: Callable, backend):
    optimizer = adamw(parameters(torch.float32, SHAPES), backend, policy=fa.ActiveLR(interval=3))
    train(optimizer, 3)
    optimizer = change(optimizer)
    assert not any(silent(optimizer, range(40, 44)))


def test_forgotten_versions_are_found(monkeypatch):
    monkeypatch.setattr(Written, "raise_versions", lambda self, absent: None)
    for backend in BACKENDS:
        optimizer = adamw(parameters(torch.float32, SHAPES), backend)
        train(optimizer, 3)
        assert any(silent(optimizer, range(3, 4))) == (backend != "reference"), backend


@pytest.mark.parametrize("change", [as_it_is, loaded])
def test_state_made_together_goes_up_together(change):
    params = parameters(torch.float32, [(3,), (4, 2)])
    optimizer = adamw(params)
    train(optimizer, 1)
    change(optimizer)
    tensors = [t for p in params for t in optimizer.state[p].values() if t.dim()]
    scalars = [optimizer.state[p]["step"] for p in params]
    before = [t._version for t in tensors + scalars + params]
    tensors[0].zero_()
    assert [t._version for t in tensors + scalars + params] == [v + 1 for v in before[:4]] + before[4:]


def test_a_step_raises_a_shared_version_once(monkeypatch):
    raised = []
    original = torch.autograd.graph.increment_version
    for backend in BACKENDS:
        params = parameters(torch.float32, [(3,)] * 20)
        optimizer = adamw(params, backend, policy=fa.ActiveLR(interval=3))
        train(optimizer, 2)
        with monkeypatch.context() as m:
            m.setattr(torch.autograd.graph, "increment_version", lambda t: (raised.append(len(t)), original(t)))
            train(optimizer, 1)
    assert raised == [20 + 1] * (len(BACKENDS) - 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_with_old_state_is_refused(backend):
    params = parameters(torch.float32, [(3,), (4, 2)])
    optimizer = adamw(params, backend)
    train(optimizer, 1)
    penalty = (optimizer.state[params[1]]["exp_avg_sq"] * params[1]).sum()
    train(optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_a_step_does_not_touch_goes_on(backend):
    """Neither parameters nor the state of another optimizer go up with this one's state."""
    mine, others = parameters(torch.float32, [(3,)]), parameters(torch.float32, [(4,)])
    a, b = (adamw(p, backend, policy=fa.ActiveLR(interval=3)) for p in (mine, others))
    train(a, 1)
    train(b, 1)
    loss = (mine[0] ** 2).sum() + (b.state[others[0]]["exp_avg"] * others[0]).sum()
    a.restart_interval()
    loss.backward()
    penalty = (b.state[others[0]]["exp_avg"] * others[0]).sum()
    train(a, 1)
    penalty.backward()


def test_loading_keeps_the_tensors_of_the_dict():
    """As in torch: who holds them goes on holding the state, and autograd knows."""
    params = parameters(torch.float32, [(3,), (4, 2)])
    optimizer = adamw(params)
    train(optimizer, 1)
    moment = optimizer.state[params[1]]["exp_avg"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[params[1]]["exp_avg"] is moment
    penalty = (moment * params[1]).sum()
    train(optimizer, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_loaded_under_inference_mode_can_be_stepped_outside(backend):
    runs = []
    for inside in (True, False):
        params = parameters(torch.float32, [(3,), (4, 2)])
        optimizer = adamw(params, backend, policy=fa.ActiveLR(interval=2))
        train(optimizer, 3)
        given = copy.deepcopy(optimizer.state_dict())
        with torch.inference_mode(inside):
            optimizer.load_state_dict(given)
        runs.append([p.detach() for p in train(optimizer, 3, start=3)])
    assert all_equal(*runs)


def test_another_thread_that_writes_meanwhile_costs_only_time(monkeypatch):
    shared, other = SharedVersion(), SharedVersion()
    tensors = [shared.adopt(torch.zeros(2)) for _ in range(3)] + [other.adopt(torch.zeros(2)) for _ in range(3)]
    original, calls = torch.autograd.graph.increment_version, []

    def increment(raised):
        original(raised)
        calls.append(raised)
        if len(calls) == 2:
            tensors[-1].add_(1)

    params = [torch.zeros(2) for _ in tensors]
    with monkeypatch.context() as m:
        m.setattr(torch.autograd.graph, "increment_version", increment)
        written = Written(params, [dict(enumerate(tensors))])
    before = [t._version for t in tensors]
    written.raise_versions()
    assert all(t._version > version for t, version in zip(tensors, before, strict=True))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_counters_are_told_apart(counters, data):
    """Whatever tensors share: all state goes up, and of the parameters those that take part."""
    versions = [SharedVersion() for _ in range(31)]
    tensors = [torch.zeros(2) if c == 0 else versions[c].adopt(torch.zeros(2)) for c in counters]
    params = [torch.zeros(2) for _ in tensors]
    absent = data.draw(st.sets(st.integers(0, len(tensors) - 1)))
    written = Written(params, [dict(enumerate(tensors))])
    before = [t._version for t in tensors + params]
    written.raise_versions(sorted(absent))
    is_up = [t._version > v for t, v in zip(tensors + params, before, strict=True)]
    assert is_up == [True] * len(tensors) + [i not in absent for i in range(len(tensors))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.Parameter(torch.ones(2), requires_grad=False),
        lambda: torch.ones(2, requires_grad=True),
        lambda: torch.inference_mode()(torch.ones)(2),
    ],
)
def test_what_is_no_plain_tensor_keeps_its_own(make: Callable[[], Tensor]):
    version, value = SharedVersion(), make()
    version.adopt(torch.ones(2))  # the first one stays itself whatever it is
    assert version.adopt(value) is value


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(4, 3).t(),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(10, dtype=torch.float64)[3:],
        torch.randn(0, 3),
        torch.randn(5).to(torch.int8),
        torch.empty(3, device="meta"),
    ],
)
def test_adopting_keeps_everything_else(value):
    version = SharedVersion()
    version.adopt(torch.ones(3, device=value.device))
    adopted = version.adopt(value)
    assert adopted is not value
    for name in ("shape", "dtype", "device", "is_leaf", "requires_grad", "grad_fn", "layout"):
        assert getattr(adopted, name) == getattr(value, name), name
    assert adopted.stride() == value.stride()
    assert adopted.storage_offset() == value.storage_offset()
    assert adopted.untyped_storage()._cdata == value.untyped_storage()._cdata
    assert not adopted._is_view()


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_under_inference_mode(backend):
    """State that is made there has no versions at all."""
    runs = []
    for inside in (True, False):
        params = parameters(torch.float32, [(3,), (4, 2)])
        with torch.inference_mode(inside):
            optimizer = adamw(params, backend, policy=fa.ActiveLR(interval=2))
            train(optimizer, 5)
        assert optimizer.state[params[0]]["exp_avg"].is_inference() == inside
        runs.append([p.detach() for p in params])
    assert all_equal(*runs)
