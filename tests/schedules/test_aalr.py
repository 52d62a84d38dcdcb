"""AALR: golden traces, the paper's pseudo-code as an oracle, resets, resuming, bad input."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fused_adaptive as fa
from fused_adaptive.schedules import snapshots
from fused_adaptive.schedules.aalr import Progress, Rules, advance, reset

from ..common.cases import POLICIES
from .common import Net, StepsInGroup, epoch, one_thread, same, values  # noqa: F401

TRACES = sorted((Path(__file__).parents[1] / "golden").glob("aalr_*.json"))


# ---- the algorithm ----


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_golden_trace(path):
    trace = json.loads(path.read_text())
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    names = ("initial_loss", "lr", "patience", "check_offset")
    controller = fa.AALR(optimizer, model, **{name: trace[name] for name in names})
    assert optimizer.param_groups[0]["lr"] == trace["lr"]
    for loss, lr, action in zip(trace["losses"], trace["lr_after"], trace["action"], strict=True):
        controller.step(float(loss))
        assert (controller.get_last_lr(), optimizer.param_groups[0]["lr"]) == ([lr], lr)
        assert controller.action == action


def pseudocode(rules: Rules) -> Generator[tuple[float, str], float, None]:
    """Algorithm 1 as printed, with one ``yield`` of rate and action per epoch, and with the spec's decisions."""
    lr, best, action = rules.initial_lr, rules.initial_loss, ""
    offset = rules.check_offset

    def is_bad(loss):
        return not math.isfinite(loss)

    i = 0
    while i < rules.patience:
        loss = yield lr, action
        i, action = i + 1, ""
        if loss > best or is_bad(loss):
            lr, i, best, action = lr / 2, 0, rules.initial_loss, "restore_initial"
        else:
            best = loss
    lr, p, action = 2 * lr, 1, "save"
    while True:
        for window in (1, 2):
            for _ in range(p + offset):
                loss = yield lr, action
                action = ""
                if is_bad(loss) and rules.eager_nonfinite:
                    break
            if is_bad(loss):
                lr, p, action = lr / 2, 2 * p, "restore_best"
                break
            if loss < best:
                lr, p, best, action = 2 * lr, 1, loss, "save"
                break
            if window == 2:
                lr, p = lr / 2, 2 * p


LOSSES = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(0, 3), st.sampled_from([0.5, 1.0, 2.0]))


@given(
    st.lists(LOSSES, min_size=30, max_size=120),
    st.integers(1, 4),
    st.sampled_from([0, 1]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_equals_the_pseudocode(losses, patience, offset, eager):
    rules = Rules(initial_loss=2.0, patience=patience, check_offset=offset, eager_nonfinite=eager)
    oracle = pseudocode(rules)
    assert next(oracle) == (0.1, "")
    now = Progress(lr=0.1, best=2.0)
    for loss in losses:
        now, action = advance(now, loss, rules)
        assert (now.lr, action) == oracle.send(loss)


# ---- effects on model and optimizer ----


@pytest.fixture(params=["device", "file"])
def where(request, tmp_path):
    return tmp_path / "best.pt" if request.param == "file" else request.param


def test_restores_the_initial_and_the_best_model(where):
    model = Net()
    optimizer = fa.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = fa.AALR(optimizer, model, initial_loss=5.0, patience=1, snapshot=where)
    initial, addresses = values(model), [p.data_ptr() for p in model.parameters()]

    epoch(model, optimizer, 0)
    assert not same(values(model), initial)
    controller.step(math.nan)
    assert same(values(model), initial)
    assert not optimizer.state

    epoch(model, optimizer, 1)
    best = values(model)
    controller.step(4.0)
    epoch(model, optimizer, 2)
    controller.step(math.inf)
    assert controller.action == "restore_best"
    assert same(values(model), best)
    assert not optimizer.state
    assert addresses == [p.data_ptr() for p in model.parameters()], "restored in place, not replaced"


OPTIMIZERS = {
    "torch-SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, dampening=0.1),
    "torch-AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "torch-Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.5),
    "torch-Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "steps in the group": lambda p: StepsInGroup(p, lr=0.01),
    **{
        f"{name}-{policy}": lambda p, cls=cls, policy=policy: cls(p, lr=0.01, policy=POLICIES[policy])
        for name, cls, policies in (
            ("SGD", fa.SGD, ("active", "tlr-displacement-global", "hypergradient-global")),
            ("AdamW", fa.AdamW, ("fixed", "tlr-gradient-tensor", "tlr-preconditioned-global", "tlr-times-active")),
        )
        for policy in policies
    },
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_reset_optimizer_equals_a_new_one(build):
    model = Net()
    optimizer = build(model.parameters())
    initial = values(model)
    epoch(model, optimizer, 0, steps=7)
    snapshots.restore_(snapshots.tensors_of(model), initial)
    reset(optimizer)

    fresh = Net()
    snapshots.restore_(snapshots.tensors_of(fresh), initial)
    new = build(fresh.parameters())
    for seed in (1, 2):
        assert epoch(model, optimizer, seed, steps=5) == epoch(fresh, new, seed, steps=5)
        assert same(values(model), values(fresh))
    assert same(optimizer.state_dict(), new.state_dict())


@pytest.mark.parametrize("lr", [10.0, 1e4])
def test_training_recovers_from_a_divergent_first_lr(lr):
    model = Net()
    optimizer = fa.SGD(model.parameters(), lr=1.0, momentum=0.9)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    initial_loss = epoch(model, frozen, 0, steps=10)
    controller = fa.AALR(optimizer, model, initial_loss=initial_loss, lr=lr, patience=5)
    losses = []
    for _ in range(40):
        losses.append(epoch(model, optimizer, 0, steps=10))
        controller.step(losses[-1])
    assert not losses[0] < initial_loss, "the start does diverge"
    assert controller.progress.phase == 2
    assert controller.progress.best < 0.1 * initial_loss


def test_groups_keep_their_ratios_and_tensors_are_changed_in_place():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    rate = torch.tensor(0.02)
    groups = [{"params": a.parameters(), "lr": rate}, {"params": b.parameters(), "lr": 0.005}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, foreach=False, capturable=False)
    controller = fa.AALR(optimizer, nn.ModuleList([a, b]), initial_loss=1.0, lr=0.4, patience=1)
    assert optimizer.param_groups[0]["lr"] is rate
    assert controller.get_last_lr() == pytest.approx([0.4, 0.1])
    controller.step(torch.tensor(0.5))
    assert optimizer.param_groups[0]["lr"] is rate
    assert isinstance(optimizer.param_groups[1]["lr"], float)
    assert controller.get_last_lr() == [lr["lr"] for lr in optimizer.param_groups] == pytest.approx([0.8, 0.2])


# ---- resuming ----


@pytest.mark.parametrize("cut", [1, 3, 5, 8, 11])
def test_training_resumes_bit_for_bit_in_the_middle_of_a_phase(cut, where, tmp_path):
    def build(path):
        torch.manual_seed(1)
        model = Net()
        optimizer = fa.AdamW(model.parameters(), lr=0.1, policy=fa.ActiveLR(interval=3))
        snapshot = path if isinstance(where, Path) else where
        return model, optimizer, fa.AALR(optimizer, model, initial_loss=40.0, lr=0.4, patience=3, snapshot=snapshot)

    def run(parts, epochs):
        model, optimizer, controller = parts
        for i in epochs:
            loss = epoch(model, optimizer, i)
            controller.step(math.nan if i in (0, 7) else loss + (1.0 if i in (9, 10) else 0.0))

    whole = build(tmp_path / "whole.pt")
    run(whole, range(14))
    before = build(tmp_path / "before.pt")
    run(before, range(cut))
    file = tmp_path / "checkpoint.pt"
    torch.save([part.state_dict() for part in before] + [before[0].seen], file)
    run(before, range(cut, 14))  # this replaces the snapshot of the time of the checkpoint
    after = build(tmp_path / "after.pt")
    *saved, seen = torch.load(file, weights_only=True)
    for part, state in zip(after, saved, strict=True):
        part.load_state_dict(state)
    after[0].seen.copy_(seen)  # pyright: ignore
    run(after, range(cut, 14))
    assert {"restore_initial", "save", "restore_best"} <= _actions(build, run, tmp_path)
    assert same(values(after[0]), values(whole[0]))
    assert same(after[1].state_dict(), whole[1].state_dict())
    assert same(after[2].state_dict(), whole[2].state_dict())


def _actions(build, run, tmp_path):
    parts, seen = build(tmp_path / "actions.pt"), set()
    for i in range(14):
        run(parts, [i])
        seen.add(parts[2].action)
    return seen


def test_the_state_of_another_model_is_refused():
    model, other = Net(), nn.Linear(4, 1)
    mine = fa.AALR(torch.optim.SGD(model.parameters(), lr=0.1), model, initial_loss=1.0)
    theirs = fa.AALR(torch.optim.SGD(other.parameters(), lr=0.1), other, initial_loss=1.0)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(ValueError, match="the snapshot does not fit the model"):
        mine.load_state_dict(theirs.state_dict())
    assert same(mine.state_dict(), before)


# ---- bad input ----


def build(**arguments: Any) -> fa.AALR:
    model = Net()
    arguments = {"initial_loss": 1.0, **arguments}
    return fa.AALR(torch.optim.SGD(model.parameters(), lr=0.1), model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"initial_loss": None}, TypeError, "the initial_loss must be a number, got None"),
        ({"initial_loss": math.nan}, ValueError, "initial_loss must be finite"),
        ({"initial_loss": math.inf}, ValueError, "untrained model"),
        ({"initial_loss": "low"}, TypeError, "initial_loss must be a number"),
        ({"lr": 0.0}, ValueError, "lr must be finite and > 0"),
        ({"lr": math.nan}, ValueError, "lr must be"),
        ({"patience": 0}, ValueError, "patience must be an int of at least 1"),
        ({"patience": 1.5}, ValueError, "patience"),
        ({"check_offset": 2}, ValueError, "check_offset must be 0"),
        ({"snapshot": None}, TypeError, "snapshot must be 'device', 'pinned' or the path of a file, got None"),
        ({"snapshot": ""}, TypeError, "snapshot must be"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        build(**arguments)


def test_bad_models():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with pytest.raises(ValueError, match="has no parameters"):
        fa.AALR(optimizer, nn.ReLU(), initial_loss=1.0)
    with pytest.raises(ValueError, match=r"shape \(8, 4\) in param group 0 is not the model's"):
        fa.AALR(optimizer, Net(), initial_loss=1.0)
    with pytest.raises(TypeError, match="must be a torch"):
        fa.AALR(optimizer, model.parameters(), initial_loss=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="initial_loss must be finite") as caught:
        fa.AALR(optimizer, model, initial_loss=math.inf)
    assert optimizer.param_groups[0]["lr"] == 0.3
    fa.AALR(optimizer, model, initial_loss=1.0)  # the failed controllers did not claim the optimizer
    assert caught.tb is not None, "although its frames are still there"


@pytest.mark.parametrize("loss", [2.0, math.nan])
def test_losses_that_never_improve_raise_an_error_that_changes_nothing(loss):
    controller = build()
    initial = values(controller.model)
    for _ in range(40):
        controller.step(loss)
    state, lr = copy.deepcopy(controller.state_dict()), controller.get_last_lr()
    epoch(controller.model, controller.optimizer, 0)
    with pytest.raises(RuntimeError, match="the rate is not the cause"):
        controller.step(loss)
    assert same(values(controller.model), initial)
    assert same(controller.state_dict(), state)
    assert controller.get_last_lr() == lr
    controller.step(0.5)  # training can continue
    assert controller.progress.good == 1


def test_the_best_model_is_restored_when_a_plateau_exhausts_the_halvings():
    controller = build(patience=1)
    for _ in range(40):
        controller.step(math.nan)
    controller.step(0.5)
    best = values(controller.model)
    epoch(controller.model, controller.optimizer, 0)
    with pytest.raises(RuntimeError, match=r"The model is restored"):  # noqa: PT012
        while True:
            controller.step(0.6)
    assert controller.progress.phase == 2
    assert same(values(controller.model), best)


def test_a_model_with_another_structure_is_not_partly_restored():
    controller = build()
    controller.model.layers.append(nn.Linear(1, 1))  # pyright: ignore
    before = values(controller.model)
    with pytest.raises(ValueError, match=r"'layers\.4\.(weight|bias)'"):
        controller.step(math.nan)
    assert same(values(controller.model), before)
    assert controller.get_last_lr() == [0.1]


def test_parameters_added_later_must_be_the_models():
    controller = build()
    with torch.no_grad():
        controller.model.seen += 1  # pyright: ignore
    before = values(controller.model)
    other = nn.Parameter(torch.zeros(3))
    controller.optimizer.add_param_group({"params": [other], "lr": 0.1})
    for call in (lambda: controller.step(math.nan), controller.state_dict):
        with pytest.raises(ValueError, match=r"shape \(3,\) in param group 1 is not the model's"):
            call()
    assert same(values(controller.model), before)
    assert controller.get_last_lr() == [0.1]


def test_a_buffer_made_by_expand_is_restored(where):
    model = Net()
    model.register_buffer("mask", torch.arange(3.0).reshape(3, 1).expand(2, 3, 4))
    controller = fa.AALR(torch.optim.SGD(model.parameters(), lr=0.1), model, initial_loss=1.0, snapshot=where)
    before = {name: t.clone() for name, t in model.named_buffers()}
    epoch(model, controller.optimizer, 0)
    next(b for name, b in model.named_buffers() if name == "mask")[0, :, 0] += 1  # writes to all
    controller.step(math.nan)
    assert same(dict(model.named_buffers()), before)


def test_wrappers_are_unwrapped():
    model = Net()
    wrapped = torch.compile(model, backend="eager")
    controller = fa.AALR(torch.optim.SGD(model.parameters(), lr=0.1), wrapped, initial_loss=1.0)  # pyright: ignore
    assert controller.state_dict()["snapshot"].keys() == snapshots.tensors_of(model).keys()
