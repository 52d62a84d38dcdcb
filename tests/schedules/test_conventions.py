"""Behavior that AALR and ASLR share with ``torch.optim.lr_scheduler``, and arguments that they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy
import pytest
import torch
from torch.optim import lr_scheduler

import fused_adaptive as fa

from .common import Net, epoch, one_thread, same, values  # noqa: F401

CONTROLLERS = {
    "AALR": lambda optimizer, model, **kw: fa.AALR(optimizer, model, initial_loss=3.0, **kw),
    "ASLR": lambda optimizer, model, **kw: fa.ASLR(optimizer, **kw),
}


@pytest.fixture(params=CONTROLLERS.values(), ids=CONTROLLERS.keys())
def make(request):
    return request.param


def parts(lr: Any = 0.1) -> tuple[Net, torch.optim.Optimizer]:
    model = Net()
    return model, torch.optim.SGD(model.parameters(), lr=lr)


# ---- metrics ----


@pytest.mark.parametrize(
    "metric",
    [2.5, 2, numpy.float32(2.5), torch.tensor(2.5), torch.tensor([2.5]), torch.tensor(2.5, dtype=torch.bfloat16)],
)
def test_metrics_are_converted_to_numbers(make, metric):
    model, optimizer = parts()
    controller = make(optimizer, model)
    controller.step(metric)
    assert controller.state_dict().get("best", 2.5) in (2, 2.5)
    assert controller.last_epoch == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((), TypeError, r"needs the epoch's loss: step\(loss\)"),
        ((None,), TypeError, "SequentialLR"),
        ((torch.ones((), requires_grad=True) * 2,), TypeError, r"graph.*pass loss\.item\(\) or loss\.detach\(\)"),
        ((torch.nn.Parameter(torch.ones(())),), TypeError, "graph"),
        ((torch.ones(2),), ValueError, r"one number, got a tensor of shape \(2,\)"),
        (("0.5",), TypeError, "must be a number, got '0.5'"),
        (([0.5, 1.0],), TypeError, "must be a number"),
        ((True,), TypeError, "must be a number"),
        ((1j,), TypeError, "must be a number"),
        ((torch.tensor(1 + 1j),), TypeError, "must be a number"),
        ((torch.ones((), device="meta"),), TypeError, "must be a number"),
        ((10**400,), TypeError, "must be a number"),
    ],
)
def test_other_metrics_are_refused_and_change_nothing(make, arguments, error, message):
    model, optimizer = parts()
    controller = make(optimizer, model)
    state = copy.deepcopy((controller.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=message):
        controller.step(*arguments)
    assert same((controller.state_dict(), optimizer.state_dict()), state)


# ---- the interface ----


def test_state_loads_with_weights_only_and_sets_the_rates(make, tmp_path):
    model, optimizer = parts()
    controller = make(optimizer, model)
    for loss in (2.0, 2.5, math.nan, 2.4):
        controller.step(loss)
    torch.save(controller.state_dict(), tmp_path / "state.pt")
    model2, optimizer2 = parts(lr=0.5)
    controller2 = make(optimizer2, model2)
    controller2.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(controller2.state_dict(), controller.state_dict())
    assert controller2.get_last_lr() == controller.get_last_lr() == [optimizer2.param_groups[0]["lr"]]
    for loss in (2.3, 2.6, 2.7):
        controller.step(loss)
        controller2.step(loss)
        assert controller2.get_last_lr() == controller.get_last_lr()


def test_the_state_of_other_groups_or_of_the_other_class_is_refused(make):
    model, optimizer = parts()
    controller = make(optimizer, model)
    before = copy.deepcopy(controller.state_dict())
    state = copy.deepcopy(before)
    with pytest.raises(ValueError, match="is of 2 param groups, the optimizer has 1"):
        controller.load_state_dict(state | {"ratios": [1.0, 1.0]})
    other = "ASLR" if isinstance(controller, fa.AALR) else "AALR"
    model2, optimizer2 = parts()
    with pytest.raises(KeyError):
        controller.load_state_dict(CONTROLLERS[other](optimizer2, model2).state_dict())
    del state["last_epoch"]
    if isinstance(controller, fa.AALR):
        state["progress"]["lr"] = 7.0
    else:
        state |= {"center": "0.7", "best": 7.0}
    with pytest.raises(KeyError):
        controller.load_state_dict(state)
    assert same(controller.state_dict(), before)


def test_a_bad_state_of_aslr_leaves_its_draws():
    optimizer = fa.SGD(Net().parameters(), lr=0.1)
    controller = fa.ASLR(optimizer)
    drawn = optimizer._random_rates
    with pytest.raises(ValueError, match="min_lr is 'low'"):
        controller.load_state_dict(controller.state_dict() | {"min_lr": "low"})
    assert optimizer._random_rates is drawn is not None


DAMAGED = {
    "ASLR": [
        *({"center": center} for center in ("NaN", "-0.1", "0", "Infinity", "a tenth", None)),
        *({name: "NaN"} for name in ("min_lr", "max_lr")),
        {"best": math.nan},
        {"dir": 0},
        {"steps": 3},
    ],
    "AALR": [
        {"action": "restore"},
        {"action": None},
        {"progress": {"lr": math.nan, "best": 1.0}},
        {"progress": {"lr": 0.1, "best": math.nan}},
    ],
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in DAMAGED for damage in DAMAGED[name]])
def test_a_damaged_state_is_refused_and_changes_nothing(name, damage):
    model, optimizer = parts(lr=0.1)
    controller = fa.ASLR(optimizer) if name == "ASLR" else fa.AALR(optimizer, model, initial_loss=2.0)
    before = copy.deepcopy(controller.state_dict())
    with pytest.raises(ValueError, match=f"the state of {name} is damaged, load another checkpoint"):
        controller.load_state_dict(copy.deepcopy(before) | damage)
    after = controller.state_dict()
    assert {**after, "snapshot": None} == {**before, "snapshot": None}
    assert optimizer.param_groups[0]["lr"] == 0.1
    controller.step(1.0)


def test_a_group_that_is_added_later_keeps_its_ratio(make):
    model, optimizer = parts(lr=0.1)
    head = torch.nn.Linear(1, 1)
    model.add_module("head", head)
    controller = make(optimizer, model)
    rate = controller.get_last_lr()[0]
    optimizer.add_param_group({"params": head.parameters(), "lr": rate / 2})
    controller.load_state_dict(copy.deepcopy(controller.state_dict()))
    for loss in (1.0, math.nan, 2.0, math.nan):
        controller.step(loss)
        first, second = controller.get_last_lr()
        assert second == first / 2 == optimizer.param_groups[1]["lr"]
    assert first != rate


def test_copies_and_pickles_set_the_lr_of_their_own_optimizer(make):
    model, optimizer = parts()
    everything = (model, optimizer, make(optimizer, model))
    for other in (copy.deepcopy(everything), pickle.loads(pickle.dumps(everything))):
        model2, optimizer2, controller2 = other
        assert controller2.optimizer is optimizer2
        controller2.step(math.nan)
        epoch(model2, optimizer2, 0)
        controller2.step(1.0)
    assert everything[2].last_epoch == 0
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---- other writers of the rate ----


def test_an_optimizer_with_a_scheduler_is_refused(make):
    model, optimizer = parts()
    lr_scheduler.StepLR(optimizer, 10)
    with pytest.raises(RuntimeError, match=r"lr_scheduler drives this optimizer.* use one of them"):
        make(optimizer, model)


def test_a_scheduler_that_is_added_later_is_noticed(make):
    model, optimizer = parts()
    controller = make(optimizer, model)
    state = copy.deepcopy(controller.state_dict())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    with pytest.raises(RuntimeError, match="drives this optimizer"):
        controller.step(1.0)
    assert same(controller.state_dict(), state)
    del scheduler


def test_any_other_change_of_the_rate_is_noticed(make):
    """ReduceLROnPlateau changes nothing but the rate itself."""
    model, optimizer = parts()
    controller = make(optimizer, model)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    controller.step(1.0)
    for loss in (1.0, 2.0, 3.0):
        plateau.step(loss)
    with pytest.raises(RuntimeError, match=r"the lr of param group 0 is 0\.0\d+, but .* had set 0\.1: something else"):
        controller.step(1.0)


def test_a_second_controller_is_refused(make):
    model, optimizer = parts()
    first = make(optimizer, model)
    for other in CONTROLLERS.values():
        with pytest.raises(RuntimeError, match=r"is driven by A[AS]LR already: call its remove\(\)"):
            other(optimizer, model)
    first.remove()
    make(optimizer, model).step(1.0)


def moved_by(optimizer: torch.optim.Optimizer) -> float:
    (p,) = optimizer.param_groups[0]["params"]
    before, p.grad = p.item(), torch.ones_like(p)
    optimizer.step()
    return before - p.item()


@pytest.mark.parametrize("cls", [torch.optim.SGD, fa.SGD])
def test_a_controller_that_was_removed_acts_no_more(make, cls):
    model = torch.nn.ParameterList([torch.zeros(1)])
    optimizer = cls(model, lr=0.1)
    first = make(optimizer, model)
    first.remove()
    second = fa.ASLR(optimizer)
    first.remove()
    assert moved_by(optimizer) != pytest.approx(0.1, rel=1e-4), "the draws of the second have ended"
    with pytest.raises(RuntimeError, match="does not drive its optimizer any more"):
        first.step(9.0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(RuntimeError, match="is driven by ASLR already"):
        make(optimizer, model)
    second.step(1.0)


@pytest.mark.parametrize("cls", [torch.optim.SGD, fa.SGD])
def test_the_draws_of_a_freed_controller_end_with_the_next_one(make, cls):
    model = torch.nn.ParameterList([torch.zeros(1)])
    optimizer = cls(model, lr=0.1)
    controller = fa.ASLR(optimizer, seed=1)
    del controller
    controller = fa.ASLR(optimizer, jitter=False) if make is CONTROLLERS["ASLR"] else make(optimizer, model)
    assert moved_by(optimizer) == pytest.approx(0.1, rel=1e-6)
    controller.step(1.0)


@pytest.mark.parametrize("cls", [torch.optim.SGD, fa.SGD])
def test_a_shallow_copy_leaves_the_optimizer_to_the_original(make, cls):
    model = torch.nn.ParameterList([torch.zeros(1)])
    optimizer = cls(model, lr=0.1)
    controller = make(optimizer, model)
    copied = copy.copy(controller)
    with pytest.raises(RuntimeError, match="or it is a shallow copy"):
        copied.step(1.0)
    copied.remove()
    draws = getattr(controller, "_random_rates", None)
    moved = 0.1 if draws is None else 0.1 * draws.factors(torch.arange(1)).item()
    assert moved_by(optimizer) == pytest.approx(moved, rel=1e-6), "each step draws once"
    controller.step(1.0)


def test_schedulers_that_pass_no_metric_cannot_step_controllers(make):
    model, optimizer = parts()
    controller = make(optimizer, model)
    sequence = lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer), controller], [2])
    optimizer.step()
    sequence.step()
    with pytest.raises(TypeError, match="SequentialLR and ChainedScheduler pass none"):
        sequence.step()
    with pytest.raises(TypeError, match="SequentialLR and ChainedScheduler pass none"):
        lr_scheduler.ChainedScheduler([controller]).step()


@pytest.mark.parametrize("cls", [torch.optim.SGD, fa.SGD])
def test_aslr_can_follow_a_warm_up(cls):
    model = Net()
    optimizer = cls(model.parameters(), lr=0.2)
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    for _ in range(5):
        epoch(model, optimizer, 0, steps=1)
        warm_up.step()
    with pytest.raises(RuntimeError, match="takes_over=True"):
        fa.ASLR(optimizer)
    controller = fa.ASLR(optimizer, takes_over=True)
    assert controller.center == pytest.approx(0.2)
    controller.step(1.0)
    controller.step(2.0)
    assert optimizer.param_groups[0]["lr"] == 0.3
    optimizer.param_groups[0]["lr"] = 0.17  # as by a scheduler that is still stepped
    with pytest.raises(RuntimeError, match="something else writes it"):
        controller.step(1.0)


def test_aalr_refuses_a_warm_up():
    model, optimizer = parts()
    lr_scheduler.LinearLR(optimizer)
    with pytest.raises(RuntimeError, match="A warm-up before it has no meaning"):
        fa.AALR(optimizer, model, initial_loss=1.0)


def test_takes_over_is_a_flag():
    with pytest.raises(TypeError, match=r"ASLR: takes_over must be True or False, got 'False'"):
        fa.ASLR(parts()[1], takes_over="False")


def test_only_optimizers_are_accepted(make):
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got list"):
        make([Net()], Net())


# ---- with policies ----

POLICIES = {
    "active": (fa.AdamW, fa.ActiveLR(interval=3)),
    "trainable": (fa.SGD, fa.TrainableLR(interval=3, granularity="tensor")),
    "both": (fa.AdamW, (fa.TrainableLR(interval=2), fa.ActiveLR(interval=3))),
}


@pytest.mark.parametrize(("cls", "policy"), POLICIES.values(), ids=POLICIES.keys())
def test_the_rate_with_a_policy_is_lr_times_gain(make, cls, policy):
    """The controller's lr and the policy's gain do not depend on each other, and multiply."""

    def build():
        torch.manual_seed(0)
        model = Net()
        return model, cls(model.parameters(), lr=0.1, policy=policy)

    model, optimizer = build()
    controller = make(optimizer, model, **({"jitter": False} if make is CONTROLLERS["ASLR"] else {"patience": 2}))
    by_hand, expected = build()
    gains, rates = [], set()
    for i, cost in enumerate((2.0, 1.9, 1.95, 1.9, 1.8, 1.95)):
        expected.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        assert epoch(model, optimizer, i, steps=4) == epoch(by_hand, expected, i, steps=4)
        assert same(values(model), values(by_hand))
        assert optimizer.learning_rates() == expected.learning_rates()
        gains.append(optimizer.learning_rates()[0]["mean"] / optimizer.param_groups[0]["lr"])
        rates.add(optimizer.param_groups[0]["lr"])
        controller.step(cost)
    assert len(rates) > 1
    assert len({round(gain, 6) for gain in gains}) > 1, "both have adapted"
