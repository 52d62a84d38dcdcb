"""Intervals of all policies: when they end, who shares them, and what is kept."""

from __future__ import annotations

import pytest
import torch

import fused_adaptive as fa

from ..common.cases import POLICIES, Gradients, all_equal, is_allowed, parameters, train
from ..common.single import element_gain, feed, gain, one_parameter

# ---- intervals ----

INTERVAL_POLICIES = {
    name: policy for name, policy in POLICIES.items() if getattr(policy, "counter", None) and is_allowed("SGD", name)
}


def without_interval(policy):
    arguments = {**policy.arguments(), "interval": None}
    arguments.pop("name")
    return type(policy).from_arguments(arguments)


@pytest.mark.feature("end_interval() by hand")
@pytest.mark.parametrize("name", INTERVAL_POLICIES)
def test_end_interval_by_hand_equals_the_automatic_end(name):
    """The gradient source differs: if the end is known in advance, its gain changes before the last update."""
    policy = INTERVAL_POLICIES[name]
    automatic = fa.SGD(parameters(), lr=0.1, momentum=0.5, policy=policy)
    manual = fa.SGD(parameters(), lr=0.1, momentum=0.5, policy=without_interval(policy))
    for step in range(9):
        train(automatic, 1, start=step)
        train(manual, 1, start=step)
        if (step + 1) % policy.interval == 0:
            manual.end_interval()
            rates = (automatic.learning_rates(per_tensor=True), manual.learning_rates(per_tensor=True))
            if step < policy.interval or getattr(policy, "source", None) != "gradient":
                assert rates[0] == rates[1]
    if getattr(policy, "source", None) != "gradient":
        assert all_equal(automatic.param_groups[0]["params"], manual.param_groups[0]["params"])
        assert automatic.learning_rates()[0]["mean"] != 0.1


def test_an_end_by_hand_restarts_the_count():
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=3, high=0.1, on_zero="shrink"))
    feed(optimizer, [1.0, 1.0], [1.0, 1.0])
    optimizer.end_interval()
    assert element_gain(optimizer) == [0.9, 0.9]
    feed(optimizer, [1.0, 1.0], [1.0, 1.0])
    assert element_gain(optimizer) == [0.9, 0.9]
    feed(optimizer, [1.0, 1.0])
    assert element_gain(optimizer) == [1.0, 1.0]


@pytest.mark.parametrize("name", INTERVAL_POLICIES)
def test_an_end_without_any_step_changes_nothing(name):
    optimizer = fa.SGD(parameters(), policy=INTERVAL_POLICIES[name])
    optimizer.end_interval()  # no state yet
    train(optimizer, 6)
    before = optimizer.learning_rates(per_tensor=True)
    optimizer.end_interval()
    first = optimizer.learning_rates(per_tensor=True)
    optimizer.end_interval()
    assert optimizer.learning_rates(per_tensor=True) == first
    if 6 % INTERVAL_POLICIES[name].interval == 0:
        assert first == before


def test_calls_without_a_gradient_count():
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=3, high=0.1, on_zero="shrink"))
    feed(optimizer, [1.0, -1.0], None, None)
    assert element_gain(optimizer) == [0.9, 0.9]
    feed(optimizer, None, [1.0, 1.0], None)
    assert element_gain(optimizer) == [1.0, 0.9 * 0.9]


def test_calls_before_the_first_gradient_count_for_the_policy():
    policy, params = fa.ActiveLR(interval=2, low=0.9, on_zero="shrink"), parameters(shapes=[(2,), (3,)])
    optimizer = fa.SGD(params[:1], policy=policy)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:]})
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert (optimizer.state[params[1]]["element_gain"] == 0.9).all()


def test_a_step_skipped_by_amp_is_not_counted():
    params = parameters(shapes=[(2,), (3,)])
    groups = [{"params": [p], "policy": fa.ActiveLR(interval=3 + i)} for i, p in enumerate(params)]
    optimizer = fa.SGD(groups, fused=True)
    for found, expected in ((1.0, 0), (0.0, 1), (1.0, 1)):
        params[0].grad = torch.ones_like(params[0])
        optimizer.found_inf = torch.full((1,), found)  # type: ignore[attr-defined]  # as in GradScaler
        optimizer.step()
        assert optimizer.param_groups[1]["idle_calls"] == expected
        assert optimizer.state[params[0]]["active_step"] == expected


def test_a_flag_that_is_set_later_creates_its_state_and_keeps_the_count():
    params = parameters(shapes=[(2,), (3,)])
    optimizer = fa.AdamW(params, policy=fa.ActiveLR(interval=5))
    train(optimizer, 1)
    optimizer.param_groups[0]["amsgrad"] = True
    params[0].grad = None
    optimizer.step()
    assert [optimizer.state[p]["active_step"].item() for p in params] == [2, 2]
    assert all("max_exp_avg_sq" in optimizer.state[p] for p in params)


def test_an_interval_without_gradients_keeps_gain_and_sign():
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=2, high=0.1))
    feed(optimizer, [1.0, -1.0], [1.0, -1.0], None, None, None, None, [1.0, 1.0], [1.0, 1.0])
    assert element_gain(optimizer) == [1.1, 0.9]


def test_a_late_tensor_gets_the_count_and_the_global_gain():
    params = parameters(shapes=[(4,), (3,)])
    policy = fa.TrainableLR(interval=4, source="gradient")
    optimizer = fa.SGD(params[:1], lr=0.1, policy=policy)
    train(optimizer, 10)
    assert gain(optimizer) != 1.0
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, 1, start=10)
    first, second = (optimizer.state[p] for p in params)
    assert first["tlr_step"] == second["tlr_step"] == 3
    assert first["gain"] == second["gain"]
    assert (first["tlr_applied"], second["tlr_applied"]) == (3, 1)
    assert (second["grad_mean_prev"] == 0).all()
    train(optimizer, 1, start=11)
    assert first["tlr_step"] == second["tlr_step"] == 0
    assert first["gain"] == second["gain"]


def test_a_late_tensor_of_an_element_policy_starts_with_empty_sums():
    params = parameters(shapes=[(4,), (3,)])
    optimizer = fa.AdamW(params, policy=fa.ActiveLR(interval=4))
    for step in range(7):
        Gradients().set(params, step)
        if step < 6:
            params[1].grad = None
        optimizer.step()
    assert optimizer.state[params[1]]["active_step"] == 3
    assert (optimizer.state[params[1]]["grad_sign_prev"] == 0).all()
    assert optimizer.state[params[1]]["step"] == 1
    train(optimizer, 1, start=7)
    assert (optimizer.state[params[1]]["element_gain"] == 1).all()  # at its first interval end gains are kept
    assert (optimizer.state[params[0]]["element_gain"] != 1).all()


@pytest.mark.parametrize("name", INTERVAL_POLICIES)
def test_restart_interval_keeps_gains_and_resets_the_rest(name):
    optimizer = fa.SGD(parameters(), lr=0.1, policy=INTERVAL_POLICIES[name])
    train(optimizer, 7)
    rates = optimizer.learning_rates(per_tensor=True)
    optimizer.restart_interval()
    assert optimizer.learning_rates(per_tensor=True) == rates
    fresh = fa.SGD(optimizer.param_groups[0]["params"], lr=0.1, policy=INTERVAL_POLICIES[name])
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = fresh.param_groups[0]["lr"] = 0.0
    train(fresh, 1)
    fresh.restart_interval()
    optimizer.param_groups[0]["lr"] = lr
    for p in optimizer.param_groups[0]["params"]:
        for key, value in optimizer.state[p].items():
            if key not in ("gain", "element_gain", "lr_last"):
                assert torch.equal(value, fresh.state[p][key]), key


def test_only_groups_with_equal_policies_share_a_global_gain():
    params = parameters(shapes=[(4,), (3,), (5,)])
    shared, other = (
        fa.TrainableLR(interval=2, source="gradient"),
        fa.TrainableLR(interval=2, source="gradient", eta=0.1),
    )
    groups = [{"params": [p], "policy": policy} for p, policy in zip(params, (shared, shared, other), strict=True)]
    optimizer = fa.SGD(groups, lr=0.1)
    train(optimizer, 8)
    gains = [optimizer.state[p]["gain"].item() for p in params]
    assert gains[0] == gains[1] != gains[2]
    whole = fa.SGD(parameters(shapes=[(4,), (3,)]), lr=0.1, policy=shared)
    for step in range(8):
        mine = whole.param_groups[0]["params"]
        Gradients().set([*mine, torch.zeros(5)], step)
        whole.step()
    assert gain(whole) == pytest.approx(gains[0], rel=1e-12)
