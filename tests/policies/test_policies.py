"""Intervals, and cases of each policy that the golden trajectories do not cover."""

from __future__ import annotations

import math

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.core.view import inner_product
from fused_adaptive.policies.trainable import newton_factor

from ..common.cases import Gradients, parameters, train
from ..common.single import element_gain, feed, gain, one_parameter


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
    for accumulate in (2.0, "2", True):
        with pytest.raises(TypeError, match="steps_per_epoch: accumulate must be an int, got"):
            fa.steps_per_epoch(range(3), accumulate=accumulate)


# ---- ActiveLR ----


def test_signs_are_compared_and_not_products_which_underflow():
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=1, high=0.1))
    feed(optimizer, [1e-200, 1e-200], [1e-200, -1e-200])
    assert element_gain(optimizer) == [1.1, 0.9]


@pytest.mark.parametrize(("on_zero", "expected"), [("hold", [1.0, 1.1, 1.0]), ("shrink", [0.729, 0.729, 0.729])])
def test_gains_hold_or_shrink_if_a_sum_is_zero(on_zero, expected):
    """If gains hold, a sum of 0 keeps the previous sign: the second element's is that of the first step."""
    optimizer = fa.SGD([one_parameter((1.0, 1.0, 1.0))], policy=fa.ActiveLR(interval=1, high=0.1, on_zero=on_zero))
    feed(optimizer, [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0])
    assert element_gain(optimizer) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_zero", ["hold", "shrink"])
def test_nonfinite_gradients_shrink_gains_and_are_forgotten(bad, on_zero):
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=1, high=0.1, on_zero=on_zero))
    feed(optimizer, [bad, 1.0])
    held, after_nothing = (1.0, 0.9) if on_zero == "hold" else (0.9, 0.81)
    assert element_gain(optimizer) == [0.9, held]
    feed(optimizer, [1.0, 1.0])  # the earlier sum is reset, so there is no sign to compare with
    assert element_gain(optimizer) == pytest.approx([after_nothing, held + 0.1])
    feed(optimizer, [1.0, 1.0])
    assert element_gain(optimizer) == pytest.approx([after_nothing + 0.1, held + 0.2])


def test_gains_are_clamped_to_their_bounds():
    optimizer = fa.SGD([one_parameter()], policy=fa.ActiveLR(interval=1, gain_bounds=(0.85, 1.25)))
    feed(optimizer, *[[1.0, (-1.0) ** i] for i in range(8)])
    assert element_gain(optimizer) == [1.25, 0.85]


def test_raw_gradients_are_summed_without_coupled_decay():
    policy = fa.ActiveLR(interval=1, high=0.1)
    optimizer = fa.SGD([one_parameter()], lr=1e-9, weight_decay=100.0, policy=policy)
    feed(optimizer, [-1.0, 1.0], [-1.0, 1.0])
    assert element_gain(optimizer) == [1.1, 1.1]  # ĝ = g + 100·p would have the other first sign


def test_a_decay_factor_never_goes_below_zero():
    for policy in (fa.ActiveLR(interval=100), fa.TrainableLR(interval=100)):
        optimizer = fa.SGD([one_parameter()], lr=1.0, weight_decay=3.0, decoupled_weight_decay=True, policy=policy)
        feed(optimizer, [0.0, 0.0])
        assert optimizer.param_groups[0]["params"][0].tolist() == [0.0, 0.0]


# ---- TrainableLR ----


@pytest.mark.parametrize("c", [0.05, 0.25, 2.0])
def test_newton_factor_lies_between_three_quarters_and_one_plus_c(c):
    grid = [-1e300, -5.0, -1.0, -1e-300, 0.0, 1e-300, 0.3, 1.0, 7.0, 1e300]
    factors = [newton_factor(num, abs(sq), c) for num in grid for sq in grid]
    assert all(0.75 <= f <= 1 + c for f in factors)
    assert newton_factor(0.0, 1.0, c) == 1.0
    assert newton_factor(1.0, 1.0, c) == pytest.approx(1 + c)
    assert newton_factor(1.0, 3.0, 0.25) == 1 + 1 / 8
    assert newton_factor(math.nan, 1.0, c) == newton_factor(1.0, math.inf, c) == 0.75
    assert newton_factor(-1.0, -2.0, c) == 0.75  # negative curvature, preconditioned only


@pytest.mark.parametrize("source", ["displacement", "gradient", "preconditioned"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_nonfinite_products_shrink_the_gain_and_reset_the_interval(source, granularity):
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


def test_gain_stays_if_nothing_moved():
    for source in ("displacement", "gradient", "preconditioned"):
        optimizer = fa.SGD(parameters(), lr=0.0, policy=fa.TrainableLR(interval=2, source=source))
        train(optimizer, 6)
        assert gain(optimizer) == 1.0
        optimizer.param_groups[0]["lr"] = 0.1
        train(optimizer, 8, start=6)
        assert gain(optimizer) != 1.0


def test_eta_uses_the_lr_of_the_last_step_after_a_scheduler_changed_it():
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


def test_eta_weights_the_slopes_of_groups_by_rate_over_largest_rate():
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
    assert gain(optimizer) == pytest.approx(1 + 0.01 * (0.1 * 2 + 0.5 * 2) / 0.5**2)


# ---- Hypergradient ----


def test_hypergradient_gain_is_never_negative_and_can_grow_again():
    optimizer = fa.SGD([one_parameter()], lr=0.1, policy=fa.Hypergradient(1.0))
    feed(optimizer, [1.0, 1.0], [-1.0, -1.0])
    assert gain(optimizer) == 0.0
    feed(optimizer, [-1.0, -1.0])
    assert gain(optimizer) == pytest.approx(20.0)


def test_hypergradient_inner_products_are_complete_before_any_tensor_moves():
    """Coupled decay makes ĝ depend on p: if the rate changed midway, the second tensor would have another gain."""
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


def test_hypergradient_gain_stays_at_lr_zero_and_with_nonfinite_products():
    optimizer = fa.SGD([one_parameter()], lr=0.0, policy=fa.Hypergradient(1.0))
    feed(optimizer, [1.0, 1.0], [1.0, 1.0])
    assert gain(optimizer) == 1.0
    optimizer.param_groups[0]["lr"] = 0.1
    feed(optimizer, [math.nan, 1.0])
    assert gain(optimizer) == 1.0


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_first_gradient_of_a_late_tensor_does_not_freeze_a_global_gain(momentum):
    """A tensor has no last direction at its first step: it adds nothing, not 0 times a gradient that may be NaN."""
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
