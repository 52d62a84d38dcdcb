"""Version counters: autograd notices everything that a step writes, and nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.backends.written import Written

from ..common.cases import BACKENDS, CASES, Gradients, all_equal, parameters, train

SHAPES = [(7,), (3, 5), (), (2, 3), (0,), (129,)]


def adamw(params, backend: str = "reference", **arguments) -> fa.AdamW:
    return fa.AdamW(params, lr=0.01, weight_decay=0.1, backend=backend, **arguments)


def copied(optimizer):
    return copy.deepcopy(optimizer)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def loaded(optimizer):
    """Loads a state dict in which all tensors are float64, so that they are converted."""
    given = copy.deepcopy(optimizer.state_dict())
    for state in given["state"].values():
        state.update({name: value.double() for name, value in state.items()})
    optimizer.load_state_dict(given)
    return optimizer


def loaded_as_it_is(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def grown(optimizer):
    for i in range(3):
        p = torch.full((3,), 1.0 + i).requires_grad_()
        optimizer.add_param_group({"params": [p]})
        train(optimizer, 1, start=10 + i)
    return optimizer


def silent(optimizer, steps: range) -> list[list[str]]:
    """Returns what each of these steps, and an interval end after them, changes without a new version."""
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


@pytest.mark.thinned
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_everything_that_a_step_writes_gets_a_new_version(case, backend):
    optimizer = case.build(parameters(torch.float32, SHAPES), backend=backend)
    train(optimizer, 3)
    assert not any(silent(optimizer, range(3, 7)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [copied, pickled, loaded, loaded_as_it_is, grown])
def test_steps_give_new_versions_to_copied_and_loaded_state(change: Callable, backend):
    optimizer = adamw(parameters(torch.float32, SHAPES), backend, policy=fa.ActiveLR(interval=3))
    train(optimizer, 3)
    optimizer = change(optimizer)
    assert not any(silent(optimizer, range(40, 44)))


def test_a_missing_new_version_is_noticed(monkeypatch):
    monkeypatch.setattr(Written, "raise_versions", lambda self, absent: None)
    for backend in BACKENDS:
        optimizer = adamw(parameters(torch.float32, SHAPES), backend)
        train(optimizer, 3)
        assert any(silent(optimizer, range(3, 4))) == (backend != "reference"), backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_with_state_of_another_parameter_stays_valid(backend):
    """Versions of state that was created together are independent."""
    params = parameters(torch.float32, [(3,), (4, 2)])
    optimizer = adamw(params, backend)
    train(optimizer, 1)
    penalty = (optimizer.state[params[1]]["exp_avg"] * params[1]).sum()
    optimizer.state[params[0]]["exp_avg"].zero_()
    penalty.backward()


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
def test_a_graph_that_a_step_does_not_touch_stays_valid(backend):
    """A step does not change versions of parameters or state of another optimizer."""
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
    """As in torch: references to tensors of the dict keep referring to the state, and autograd notices."""
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
def test_state_loaded_under_inference_mode_can_be_stepped_outside(backend):
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_under_inference_mode(backend):
    """State that is created there has no version counters."""
    runs = []
    for inside in (True, False):
        params = parameters(torch.float32, [(3,), (4, 2)])
        with torch.inference_mode(inside):
            optimizer = adamw(params, backend, policy=fa.ActiveLR(interval=2))
            train(optimizer, 5)
        assert optimizer.state[params[0]]["exp_avg"].is_inference() == inside
        runs.append([p.detach() for p in params])
    assert all_equal(*runs)
