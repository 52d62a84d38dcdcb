"""Participants are kept between steps, and every change between two steps reaches the next one.

A change in the middle of a training must give the same bits as in a training that collects them in every step.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

import fused_adaptive as fa
from fused_adaptive.core import python_calls
from fused_adaptive.core.backbone import Backbone
from fused_adaptive.core.random_rates import RandomRates
from fused_adaptive.engine import fingerprint
from fused_adaptive.engine.participants import Participants
from fused_adaptive.optimizers import base

from ..common.breaking import broken, fails
from ..common.cases import BACKENDS, POLICIES, all_equal, parameters
from .changes import ACTIVE, ANEW, CHANGES, ONLY_AT_FIRST, Change, Run, adamw, first, groups_of, plain, sgd


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    """Selects the reference backend by default."""
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", "reference")


@pytest.fixture
def by_python(monkeypatch):
    """Compares objects in Python, as without a native library."""
    monkeypatch.setattr(python_calls, "same_objects", lambda: None)


def outcome(change: Change, keeps: bool) -> tuple[Any, ...]:
    run = Run(change.build(), keeps)
    run.train(5)
    change.make(run.optimizer)
    run.train(6)
    return run.result()


def is_seen(change: Change) -> bool:
    return outcome(change, True) == outcome(change, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_steps_is_seen(name, backend, monkeypatch):
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", backend)
    assert is_seen(CHANGES[name])


@pytest.mark.parametrize("name", [n for n, change in CHANGES.items() if change.visible and n != "add_param_group"])
def test_a_change_that_is_not_noticed_gives_other_results(name):
    with broken(Participants, "is_current", lambda *_: True):
        assert fails(lambda: is_seen(CHANGES[name]), KeyError, ValueError, TypeError, AttributeError)


def is_noticed(change: Change) -> bool:
    run = Run(change.build(), True)
    run.train(5)
    assert run.optimizer._current_participants() is not None
    change.make(run.optimizer)
    noticed = run.optimizer._current_participants() is None
    run.train(2)
    assert run.optimizer._current_participants() is not None
    return noticed


NOTICED = [n for n, change in CHANGES.items() if n != "state cleared, plain SGD"]


@pytest.mark.parametrize("name", NOTICED)
def test_a_change_is_noticed(name):
    """Covers changes that matter only to a backend with its own tables."""
    assert is_noticed(CHANGES[name])


@pytest.mark.parametrize("name", NOTICED)
def test_a_change_is_noticed_by_python(name, by_python):
    assert is_noticed(CHANGES[name])


class Operations(TorchDispatchMode):
    """Counts operations on tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def without_options(self: Backbone, group: Any) -> tuple[()]:
    return ()


@pytest.mark.parametrize("name", ["amsgrad", "rectify", "nesterov", "momentum set", "momentum cleared", "fused"])
def test_a_backbone_without_its_options_fails(name):
    with broken(type(CHANGES[name].build().backbone), "static_options", without_options):
        assert fails(lambda: is_noticed(CHANGES[name]), KeyError)


def test_tensors_are_compared_by_identity_and_not_read(monkeypatch):
    """Values would be read from the device, and a kernel holds the address of one of two equal tensors."""

    def is_noticed_without_an_operation() -> bool:
        run = Run(adamw(), True)
        run.train(5)
        CHANGES["entry replaced by an equal one"].make(run.optimizer)
        with Operations() as operations:
            return run.optimizer._current_participants() is None and not operations.count

    assert is_noticed_without_an_operation()
    monkeypatch.setattr(python_calls, "same_objects", lambda: None)
    assert is_noticed_without_an_operation()
    with broken(fingerprint, "_SameTensor", torch.no_grad):
        assert not is_noticed_without_an_operation()


@pytest.mark.parametrize("value", [torch.zeros(()), "active", [1, 2]])
def test_an_invalid_policy_is_refused_during_training(value):
    run = Run(adamw(), True)
    run.train(3)
    before = plain(run.params())
    run.optimizer.param_groups[0]["policy"] = value
    with pytest.raises(TypeError, match="policy must be one of"):
        run.train(1)
    assert plain(run.params()) == before
    run.optimizer.param_groups[0]["policy"] = ACTIVE
    run.train(1)


def test_a_group_can_be_added_after_a_policy_was_set_by_hand():
    optimizer = adamw()
    optimizer.param_groups[0]["policy"] = fa.Hypergradient(1e-3)
    optimizer.add_param_group({"params": parameters(shapes=[(2,)], seed=1)})
    optimizer.learning_rates()
    assert [g["policy"]["name"] for g in optimizer.param_groups] == ["Hypergradient", "ActiveLR", "ActiveLR"]


def test_foreign_state_that_cannot_be_compared_is_accepted():
    numpy = pytest.importorskip("numpy")
    run = Run(adamw(), True)
    run.train(2)
    for _ in range(2):
        run.optimizer.state["mine"] = {"array": numpy.zeros(3)}  # type: ignore[index]
        run.train(1)


@pytest.mark.parametrize("name", ANEW)
def test_a_new_optimizer_collects_participants(name):
    results = []
    for keeps in (True, False):
        run = Run(adamw(), keeps)
        run.train(5)
        assert "_participants" not in run.optimizer.__getstate__()
        run.optimizer = ANEW[name](run.optimizer) or run.optimizer
        run.seen = run.params()
        assert run.optimizer._participants is None
        run.train(5)
        results.append(run.result())
    assert results[0] == results[1]


@pytest.mark.feature("intermittent gradients, groups and policies that change")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_many_changes_with_intermittent_gradients(seed, backend, monkeypatch):
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", backend)
    makes = [c.make for name, c in CHANGES.items() if c.build is adamw and name not in ONLY_AT_FIRST]

    def result(keeps: bool) -> tuple[Any, ...]:
        rng, run = random.Random(seed), Run(adamw(), keeps, missing=0.4)
        for _ in range(15):
            run.train(rng.randrange(3))
            change = rng.choice(makes)
            try:
                change(run.optimizer)
            except (KeyError, IndexError, AttributeError):
                continue  # the entry that it changes is missing
        run.train(2)
        return run.result()

    assert result(True) == result(False)


# ---- when parameters join ----


@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-gradient-global", "hypergradient-tensor"])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_late_parameters_and_intermittent_gradients(momentum, policy):
    def result(keeps: bool) -> tuple[Any, ...]:
        run = Run(fa.SGD(groups_of(), lr=0.05, momentum=momentum, policy=POLICIES[policy]), keeps, missing=0.7)
        run.train(12)
        return run.result()

    assert result(True) == result(False)
    with broken(Participants, "has_newcomers", lambda _: False):
        assert fails(lambda: result(True) == result(False))


@pytest.mark.parametrize("build", [adamw, sgd(), sgd(momentum=0.9)], ids=["AdamW", "SGD", "SGD-momentum"])
def test_reading_the_state_of_a_parameter_that_has_none(build):
    """``optimizer.state`` is a defaultdict: reading it creates an empty dict."""

    def result(keeps: bool) -> tuple[Any, ...]:
        run = Run(build(), keeps)
        late = first(run.optimizer, 1)
        for step in range(8):
            run.gradients.set(run.params(), step)
            if step < 5:
                late.grad = None
            run.forget()
            run.optimizer.step()
            if step in (0, 3):
                assert run.optimizer.state[late] == {}
                assert [key for key, value in run.optimizer.state.items() if value is run.optimizer.state[late]]
            run.forget()
            run.rates.append(run.optimizer.learning_rates(per_tensor=True))
        return run.result()

    assert result(True) == result(False)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_steps_skipped_by_amp(momentum):
    """The first step is skipped too, and creates state but no momentum."""

    def result(keeps: bool) -> tuple[Any, ...]:
        run = Run(fa.SGD(groups_of(), lr=0.05, momentum=momentum, policy=ACTIVE, fused=True), keeps, missing=0.5)
        for step in range(10):
            run.optimizer.found_inf = torch.tensor(float(step in (0, 1, 5)))  # type: ignore[attr-defined]
            run.optimizer.grad_scale = torch.tensor(2.0**step)  # type: ignore[attr-defined]
            run.train(1)
        return run.result()

    assert result(True) == result(False)


def test_a_late_parameter_with_a_bad_gradient_changes_nothing():
    run = Run(adamw(), True)
    late = first(run.optimizer, 1)
    run.gradients.set(run.params(), 0)
    late.grad = None
    run.optimizer.step()
    before = run.result()
    late.grad = torch.zeros_like(late).to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 1 of shape \(2, 2\) is sparse"):
        run.optimizer.step()
    assert run.result() == before
    assert late not in run.optimizer.state


def test_backends_raise_the_message_for_a_bad_gradient():
    named = [(f"layer.{i}", p) for i, p in enumerate(parameters(shapes=[(2,), (3,), (4,)]))]
    optimizer = fa.AdamW([{"params": named[:1]}, {"params": named[1:]}])
    Run(optimizer, True).train(2)
    participants = optimizer._current_participants()
    assert participants is not None
    participants.check_gradients()
    named[2][1].grad = torch.zeros(4, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 2 \(layer.2\) of shape \(4,\) is sparse"):
        participants.check_gradients()


# ---- data of one step does not reach the next ----


def test_scale_and_draw_are_used_in_one_step_only():
    """A step with random rates is followed by one without; a step with scaled gradients by one without."""

    def result(keeps: bool) -> tuple[Any, ...]:
        run = Run(fa.SGD(groups_of(), lr=0.05, policy=POLICIES["tlr-gradient-eta"], fused=True), keeps)
        for draw, scale in ((None, None), (RandomRates(7, 0.5), 4.0), (None, 8.0), (None, None)):
            run.optimizer._random_rates = draw
            run.optimizer.grad_scale = None if scale is None else torch.tensor(scale)  # type: ignore[attr-defined]
            run.train(2)
        return run.result()

    assert result(True) == result(False)


def test_the_trial_of_the_naive_variant_divides_gradients_by_the_scale():
    def result(keeps: bool, scale: float) -> tuple[Any, ...]:
        p = torch.tensor([2.0, -1.0], dtype=torch.float64, requires_grad=True)
        run = Run(fa.SGD([p], lr=0.1, policy=fa.TrainableLR(naive=True, eta=0.01), fused=True), keeps)

        def closure() -> None:
            run.optimizer.zero_grad()
            (scale * (torch.tensor([1.0, 4.0]) * p * p).sum()).backward()

        for _ in range(4):
            run.optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
            run.forget()
            run.optimizer.step(closure)
        return run.result()

    assert result(True, 4.0) == result(False, 4.0) == result(True, 1.0)


# ---- how often participants are collected ----


class Calls:
    """Counts the calls of a function of ``optimizer.py``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.count, self.function = 0, getattr(base, name)
        monkeypatch.setattr(base, name, self)

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        return self.function(*args)


@pytest.mark.parametrize("policy", [p for p in POLICIES if "displacement" not in p])
@pytest.mark.parametrize("build", [fa.AdamW, lambda *a, **k: fa.SGD(*a, momentum=0.9, **k)])
def test_participants_are_collected_once_while_nothing_changes(build, policy, monkeypatch):
    """SGD's first update, which creates momentum, is no change; nor are schedulers, interval ends and reports."""
    calls = Calls(monkeypatch, "collect")
    run = Run(build(groups_of(), lr=0.01, policy=POLICIES[policy]), True)
    run.train(1)
    for step in range(19):
        for group in run.optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
            group["weight_decay"] = 0.1 * step
        run.train(1)
    assert calls.count == 1
    with broken(Participants, "is_current", lambda *_: False):
        run.train(3)
    assert calls.count > 3


def test_tensors_without_state_stay_participants_if_their_gradient_is_missing(monkeypatch):
    calls = Calls(monkeypatch, "collect")
    Run(sgd()(), True, missing=0.5).train(30)
    assert calls.count <= 6
    function = calls.function
    calls.count, calls.function = (
        0,
        lambda backbone, groups, states, before, *rest: function(backbone, groups, states, {}, *rest),
    )
    Run(sgd()(), True, missing=0.5).train(30)
    assert calls.count > 12


def test_participants_do_not_keep_replaced_state_alive():
    """After ``state.clear()`` the next step frees the old state before it creates the new one."""
    alive: list[bool] = []
    run = Run(adamw(), True)
    run.train(1)
    old = WeakTensorKeyDictionary()
    old[run.optimizer.state[first(run.optimizer)]["exp_avg"]] = True
    run.optimizer.state.clear()
    function = base.collect

    def watched(*args: Any) -> Participants:
        alive.append(len(old) > 0)
        return function(*args)

    with broken(base, "collect", watched):
        run.train(1)
    assert alive == [False]


def test_torch_compile_around_a_step_that_collects_participants():
    def result(compiles: bool) -> list[torch.Tensor]:
        run = Run(adamw(), True)
        step = torch.compile(run.optimizer.step, backend="eager") if compiles else run.optimizer.step
        for i in range(8):
            run.gradients.set(run.params(), i)
            step()
            if i in (2, 5):
                CHANGES["state cleared" if i == 2 else "policy in place"].make(run.optimizer)
        return run.params()

    assert all_equal(result(True), result(False))
