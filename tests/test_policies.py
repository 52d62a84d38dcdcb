"""Interval bookkeeping and the corners of each policy that the golden trajectories do not reach."""

from __future__ import annotations

import math

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.policies.trainable import newton_factor
from fused_adaptive.slot import inner_product

from .cases import POLICIES, Gradients, all_equal, is_allowed, parameters, train


def one_parameter(value=(1.0, 1.0)):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def feed(optimizer, *grads):
    """One step for each gradient of the only parameter; None is a call without a gradient."""
    (p,) = optimizer.param_groups[0]["params"]
    for grad in grads:
        p.grad = None if grad is None else torch.tensor(grad, dtype=p.dtype)
        optimizer.step()


def element_gain(optimizer):
    (p,) = optimizer.param_groups[0]["params"]
    return optimizer.state[p]["element_gain"].tolist()


def gain(optimizer, index=0):
    return optimizer.state[optimizer.param_groups[0]["params"][index]]["gain"].item()


# ---- intervals ----

INTERVAL_POLICIES = {
    name: policy for name, policy in POLICIES.items() if getattr(policy, "counter", None) and is_allowed("SGD", name)
}


def without_interval(policy):
    arguments = {**policy.arguments(), "interval": None}
    arguments.pop("name")
    return type(policy).from_arguments(arguments)


@pytest.mark.parametrize("name", INTERVAL_POLICIES)
def test_end_interval_by_hand_equals_the_automatic_end(name):
    """But for the gradient source, whose gain changes before the last update when the end is known in advance."""
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
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=3, first_interval="shrink"))
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
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=3, first_interval="shrink"))
    feed(optimizer, [1.0, -1.0], None, None)
    assert element_gain(optimizer) == [0.9, 0.9]
    feed(optimizer, None, [1.0, 1.0], None)
    assert element_gain(optimizer) == [1.0, 0.9 * 0.9]


def test_calls_before_the_first_gradient_count_for_the_policy_wherever_that_comes():
    policy, params = fa.ActiveLR(interval=2, first_interval="shrink"), parameters(shapes=[(2,), (3,)])
    optimizer = fa.SGD(params[:1], policy=policy)
    optimizer.step()
    optimizer.add_param_group({"params": params[1:]})
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert (optimizer.state[params[1]]["element_gain"] == 0.9).all()


def test_a_step_that_amp_skips_is_no_idle_call():
    params = parameters(shapes=[(2,), (3,)])
    groups = [{"params": [p], "policy": fa.ActiveLR(interval=3 + i)} for i, p in enumerate(params)]
    optimizer = fa.SGD(groups, fused=True)
    for found, expected in ((1.0, 0), (0.0, 1), (1.0, 1)):
        params[0].grad = torch.ones_like(params[0])
        optimizer.found_inf = torch.full((1,), found)
        optimizer.step()
        assert optimizer.param_groups[1]["idle_calls"] == expected
        assert optimizer.state[params[0]]["active_step"] == expected


def test_a_flag_that_is_set_later_completes_the_state_and_keeps_the_count():
    params = parameters(shapes=[(2,), (3,)])
    optimizer = fa.AdamW(params, policy=fa.ActiveLR(interval=5))
    train(optimizer, 1)
    optimizer.param_groups[0]["amsgrad"] = True
    params[0].grad = None
    optimizer.step()
    assert [optimizer.state[p]["active_step"].item() for p in params] == [2, 2]
    assert all("max_exp_avg_sq" in optimizer.state[p] for p in params)


def test_an_interval_without_gradients_keeps_gain_and_sign():
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=2))
    feed(optimizer, [1.0, -1.0], [1.0, -1.0], None, None, None, None, [1.0, 1.0], [1.0, 1.0])
    assert element_gain(optimizer) == [1.1, 0.9]


def test_late_tensor_shares_the_count_and_a_global_gain():
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


def test_late_tensor_of_an_element_policy_starts_fresh_in_the_middle():
    params = parameters(shapes=[(4,), (3,)])
    optimizer = fa.AdamW(params, policy=fa.ActiveLR(interval=4))
    for step in range(7):
        Gradients().set(params, step)
        if step < 6:
            params[1].grad = None
        optimizer.step()
    assert optimizer.state[params[1]]["active_step"] == 3
    assert (optimizer.state[params[1]]["grad_sign_prev"] == 2).all()
    assert optimizer.state[params[1]]["step"] == 1
    train(optimizer, 1, start=7)
    assert (optimizer.state[params[1]]["element_gain"] == 1).all()  # its first end: held
    assert (optimizer.state[params[0]]["element_gain"] != 1).all()


@pytest.mark.parametrize("name", INTERVAL_POLICIES)
def test_restart_interval_keeps_gains_and_forgets_the_rest(name):
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


def test_groups_with_equal_policies_share_a_global_gain_and_others_do_not():
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


def test_steps_per_epoch_counts_optimizer_steps():
    assert fa.steps_per_epoch(range(10)) == 10
    assert fa.steps_per_epoch(range(10), accumulate=4) == 3
    assert fa.steps_per_epoch(torch.utils.data.DataLoader(list(range(100)), batch_size=32)) == 4
    with pytest.raises(TypeError, match="end_interval"):
        fa.steps_per_epoch(iter([1]))
    with pytest.raises(ValueError, match="accumulate"):
        fa.steps_per_epoch(range(3), accumulate=0)
    with pytest.raises(ValueError, match="empty"):
        fa.steps_per_epoch([])


# ---- ActiveLR ----


def test_signs_are_compared_and_not_products_that_underflow():
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=1))
    feed(optimizer, [1e-200, 1e-200], [1e-200, -1e-200])
    assert element_gain(optimizer) == [1.1, 0.9]


def test_zero_on_either_side_shrinks():
    optimizer = fa.SGD([one_parameter((1.0, 1.0, 1.0))], policy=fa.ActiveLR(interval=1))
    feed(optimizer, [0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    assert element_gain(optimizer) == [0.9, 0.9, 0.9]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("first_interval", ["hold", "shrink"])
def test_non_finite_gradients_shrink_and_do_not_poison(bad, first_interval):
    optimizer = fa.SGD([one_parameter()], lr=0.0, policy=fa.ActiveLR(interval=1, first_interval=first_interval))
    feed(optimizer, [bad, 1.0])
    held = 1.0 if first_interval == "hold" else 0.9
    assert element_gain(optimizer) == [0.9, held]
    feed(optimizer, [1.0, 1.0])
    assert element_gain(optimizer) == pytest.approx([0.81, held + 0.1])
    feed(optimizer, [1.0, 1.0])
    assert element_gain(optimizer) == pytest.approx([0.91, held + 0.2])


def test_gains_are_clamped_to_their_bounds():
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=1, gain_bounds=(0.85, 1.25)))
    feed(optimizer, *[[1.0, (-1.0) ** i] for i in range(8)])
    assert element_gain(optimizer) == [1.25, 0.85]


def test_raw_gradients_are_summed_before_coupled_decay():
    optimizer = fa.SGD([one_parameter()], lr=0.0, weight_decay=100.0, policy=fa.ActiveLR(interval=1))
    feed(optimizer, [-1.0, 1.0], [-1.0, 1.0])
    assert element_gain(optimizer) == [1.1, 1.1]  # ĝ = g + 100·p would have flipped the first sign


def test_a_decay_factor_never_goes_below_zero():
    for policy in (fa.ActiveLR(interval=100), fa.TrainableLR(interval=100)):
        optimizer = fa.SGD([one_parameter()], lr=1.0, weight_decay=3.0, decoupled_weight_decay=True, policy=policy)
        feed(optimizer, [0.0, 0.0])
        assert optimizer.param_groups[0]["params"][0].tolist() == [0.0, 0.0]


# ---- TrainableLR ----


def test_newton_factor_lies_between_three_quarters_and_five_quarters():
    grid = [-1e300, -5.0, -1.0, -1e-300, 0.0, 1e-300, 0.3, 1.0, 7.0, 1e300]
    factors = [newton_factor(num, abs(sq)) for num in grid for sq in grid]
    assert all(0.75 <= f <= 1.25 for f in factors)
    assert newton_factor(0.0, 1.0) == 1.0
    assert newton_factor(1.0, 1.0) == 1.25
    assert newton_factor(1.0, 3.0) == 1 + 1 / 8
    assert newton_factor(math.nan, 1.0) == newton_factor(1.0, math.inf) == 0.75
    assert newton_factor(-1.0, -2.0) == 0.75  # negative curvature, preconditioned only


@pytest.mark.parametrize("source", ["displacement", "gradient", "preconditioned"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_non_finite_products_shrink_and_restart(source, granularity):
    policy = fa.TrainableLR(interval=1, source=source, granularity=granularity)
    optimizer = fa.SGD(parameters(shapes=[(3,), (2,)]), lr=0.1, policy=policy)
    params = train(optimizer, 2)
    before = [gain(optimizer, i) for i in (0, 1)]
    Gradients().set(params, 2)
    assert params[0].grad is not None
    params[0].grad[1] = math.nan
    finite = [p.detach().clone() for p in params]
    optimizer.step()
    assert gain(optimizer) == before[0] * 0.75
    assert (gain(optimizer, 1) == before[1] * 0.75) == (granularity == "global")
    with torch.no_grad():
        for p, value in zip(params, finite, strict=True):
            p.copy_(value)  # as after a checkpoint
    optimizer.restart_interval()
    train(optimizer, 4, start=3)
    assert all(math.isfinite(gain(optimizer, i)) for i in (0, 1))


def test_gain_stays_where_nothing_moved():
    for source in ("displacement", "preconditioned"):
        optimizer = fa.SGD(parameters(), lr=0.0, policy=fa.TrainableLR(interval=2, source=source))
        train(optimizer, 6)
        assert gain(optimizer) == 1.0
        optimizer.param_groups[0]["lr"] = 0.1
        train(optimizer, 8, start=6)
        assert gain(optimizer) != 1.0


def test_eta_uses_the_lr_of_the_last_step_also_when_a_scheduler_has_moved_on():
    def run(change_lr):
        optimizer = fa.SGD([one_parameter()], lr=0.1, policy=fa.TrainableLR(interval=None, source="gradient", eta=0.01))
        feed(optimizer, [1.0, 2.0])
        optimizer.end_interval()
        feed(optimizer, [1.0, 1.0])
        if change_lr:
            optimizer.param_groups[0]["lr"] = 123.0
        optimizer.end_interval()
        return gain(optimizer)

    assert run(change_lr=True) == run(change_lr=False) == pytest.approx(1 + 0.01 * 3.0 / 0.1)


def test_eta_with_groups_of_different_rates_adds_each_over_its_own():
    a, b = one_parameter(), one_parameter()
    policy = fa.TrainableLR(interval=1, source="gradient", eta=0.01)
    optimizer = fa.SGD(
        [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.5}, {"params": [one_parameter()], "lr": 0.0}],
        policy=policy,
    )
    for _ in range(2):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
    assert gain(optimizer) == pytest.approx(1 + 0.01 * (2 / 0.1 + 2 / 0.5))


# ---- Hypergradient ----


def test_the_gain_never_goes_below_zero_and_comes_back():
    optimizer = fa.SGD([one_parameter()], lr=0.1, policy=fa.Hypergradient(1.0))
    feed(optimizer, [1.0, 1.0], [-1.0, -1.0])
    assert gain(optimizer) == 0.0
    feed(optimizer, [-1.0, -1.0])
    assert gain(optimizer) == pytest.approx(20.0)


def test_inner_products_are_complete_before_any_tensor_moves():
    """Coupled decay makes ĝ depend on p: with a rate changed midway the second tensor would see another gain."""
    params = parameters(shapes=[(3,), (2,)])
    optimizer = fa.SGD(params, lr=0.1, weight_decay=0.5, policy=fa.Hypergradient(1e-2))
    train(optimizer, 1)
    previous = [optimizer.state[p]["direction_prev"].clone() for p in params]
    Gradients().set(params, 1)
    with torch.no_grad():
        coupled = [p.grad + 0.5 * p for p in params]
        h = sum((g * u).sum().item() for g, u in zip(coupled, previous, strict=True))
        expected = [p - 0.1 * (1 + 1e-2 * h / 0.1) * g for p, g in zip(params, coupled, strict=True)]
    optimizer.step()
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-12, atol=1e-12)


def test_hypergradient_stays_at_lr_zero_and_on_non_finite_products():
    optimizer = fa.SGD([one_parameter()], lr=0.0, policy=fa.Hypergradient(1.0))
    feed(optimizer, [1.0, 1.0], [1.0, 1.0])
    assert gain(optimizer) == 1.0
    optimizer.param_groups[0]["lr"] = 0.1
    feed(optimizer, [math.nan, 1.0])
    assert gain(optimizer) == 1.0


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_newcomers_first_gradient_does_not_freeze_a_global_gain(momentum):
    """At its first step a tensor has no last direction: nothing, and not 0 times a gradient that may be NaN."""
    params = parameters(shapes=[(2,), (3,)])
    optimizer = fa.SGD(params, lr=0.1, momentum=momentum, policy=fa.Hypergradient(0.01))
    for first in (None, torch.full((3,), math.nan, dtype=torch.float64)):
        params[0].grad, params[1].grad = torch.ones_like(params[0]), first
        optimizer.step()
    assert gain(optimizer) == pytest.approx(1.2)


# ---- inner products ----


@pytest.mark.parametrize("numel", [0, 1, 3, 16383, 16384, 16385, 100_003])
def test_inner_product_is_exact_and_does_not_depend_on_threads(numel):
    a, b = torch.randn(2, numel).unbind()
    expected = math.fsum((a.double() * b.double()).tolist())
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(inner_product(a, b))
    finally:
        torch.set_num_threads(threads)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(expected, rel=1e-12, abs=1e-12)
