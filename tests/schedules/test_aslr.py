"""ASLR: golden traces, a decimal oracle, use of its draws, resuming and copies."""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from decimal import Decimal, Inexact, getcontext, localcontext
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fused_adaptive as fa
from fused_adaptive.core.random_rates import RandomRates

from ..common.cases import POLICIES
from .common import Net, epoch, one_thread, same, values  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:ASLR. the lr of param group 0")

GOLDEN = Path(__file__).parents[1] / "golden"
TRACES = sorted(p for p in GOLDEN.glob("aslr_*.json") if p.stem != "aslr_draws")


def parameters(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(count)]


def controlled(lr: Any = 0.1, **arguments: Any) -> fa.ASLR:
    return fa.ASLR(torch.optim.SGD(parameters(), lr=lr), **arguments)


# ---- the search ----


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_golden_trace(path):
    trace = json.loads(path.read_text())
    controller = controlled(trace["lr"])
    for cost, center, width in zip(trace["costs"], trace["center_after"], trace["width_after"], strict=True):
        controller.step(float(cost))
        assert (controller.center, controller.width) == (center, width)
        assert controller.get_last_lr() == [center] == [controller.optimizer.param_groups[0]["lr"]]


def oracle(c: Decimal, costs: list[float]) -> list[tuple[Decimal, Decimal]]:
    """Algorithm 1 as printed (except for the first minimum), in decimal; returns center and width after each epoch."""
    min_cost, search_direction, search_range, search_steps = math.inf, 1, 1, 0
    trace = []
    for cost in costs:
        if not cost <= min_cost or math.isinf(cost):
            s = Decimal(10) ** math.floor(c.log10())
            c = Decimal("0.9") * c if c + search_direction * s == 0 else c + search_direction * s
            search_steps += 1
            if search_steps == search_range:
                search_range, search_steps, search_direction = search_range + 1, 0, -search_direction
        else:
            min_cost, search_direction, search_range, search_steps = cost, 1, 1, 0
        trace.append((c, Decimal(10) ** math.floor(c.log10())))
    return trace


@pytest.mark.parametrize("exponent", range(-8, 2))
def test_equals_a_decimal_oracle_over_ten_decades(exponent):
    rng = random.Random(exponent)
    costs, level = [], 1.0
    while len(costs) < 1000:
        level *= 0.999
        plateau = rng.choice([1, 5, 40])  # the longer ones cross decades
        costs += [rng.choice([math.nan, math.inf, level * (1 + rng.random())]) for _ in range(plateau)] + [level]
    start = Decimal(rng.randint(1, 9)).scaleb(exponent)
    controller = controlled(float(start))
    trace = oracle(start, costs)
    for cost, (center, width) in zip(costs, trace, strict=True):
        controller.step(cost)
        assert (controller.center, controller.width) == (float(center), float(width))
        assert controller._center == center
    assert len({width for _, width in trace}) > 1, "decades were crossed"


def test_costs_that_never_improve_keep_a_usable_rate():
    controller = controlled()
    for cost in [1.0] + [2.0, math.nan] * 5000:
        controller.step(cost)
        assert 0 < controller.center < math.inf
    bounded = controlled(min_lr=1e-3, max_lr=0.5)
    seen = set()
    for _ in range(1000):
        bounded.step(math.inf)
        seen.add(bounded.center)
    assert (min(seen), max(seen)) == (1e-3, 0.5)


def test_the_users_decimal_context_has_no_effect():
    with localcontext() as context:
        context.prec = 1
        getcontext().Emax = 5
        controller = controlled(0.0149, min_lr=0.00149, max_lr=0.77)
        centers = []
        for cost in [0.5, 0.6, 0.6, 0.6, 0.7, 0.8]:
            controller.step(cost)
            centers.append(controller.center)
        assert controlled(0.0958, max_lr=17.5).center == 0.1  # rounded up to the next decade
        getcontext().traps[Inexact] = True
        assert controlled(0.0149, min_lr=0.00149).center == 0.01
    assert centers == [0.01, 0.02, 0.01, 0.009, 0.01, 0.02]


@pytest.mark.parametrize(
    ("lr", "center"),
    [
        (0.1, 0.1),
        (torch.tensor(0.1), 0.1),  # 0.10000000149 in float32
        (0.95, 1.0),
        (0.0349, 0.03),
        (0.035, 0.04),
        (2.5e-05, 3e-05),
        (1, 1.0),
        (7e-320, 7e-320),
        (numpy.float64(0.25), 0.3),
    ],
)
def test_the_first_center_has_one_digit(lr, center):
    assert controlled(lr).center == center


def test_a_first_center_other_than_lr_warns():
    with pytest.warns(UserWarning, match=r"ASLR: the lr of param group 0, 0.0349, becomes 0.03"):
        controlled(0.0349)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controlled(torch.tensor(0.1))


@pytest.mark.parametrize(
    ("bounds", "low", "high"),
    [((0.001, 0.2), 0.001, 0.2), ((0.0011, 0.29), 0.002, 0.2), ((0.095, None), 0.1, None), ((None, 1.99), None, 1.0)],
)
def test_bounds_are_rounded_inwards(bounds, low, high):
    min_lr, max_lr = bounds
    assert low is None or controlled(1e-5, min_lr=min_lr, max_lr=max_lr).center == low
    assert high is None or controlled(50.0, min_lr=min_lr, max_lr=max_lr).center == high


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": 1.0}, TypeError, "seed must be an int"),
        ({"seed": True}, TypeError, "seed"),
        ({"min_lr": 0.0}, ValueError, "min_lr must be finite and > 0"),
        ({"max_lr": math.inf}, ValueError, "max_lr must be finite"),
        ({"min_lr": 0.21, "max_lr": 0.29}, ValueError, "no rate of one significant digit"),
        ({"lr": 0.0}, ValueError, "the lr of param group 0 is 0"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        controlled(**arguments)


# ---- use of the draws ----


def factor(seed: int, n: int, index: int, relative_width: float) -> float:
    return RandomRates(seed, relative_width, n).factors(torch.tensor([index])).item()


def test_each_tensor_draws_in_each_step():
    params = parameters(4)
    groups = [{"params": params[:3], "lr": 0.05}, {"params": params[3:], "lr": 0.01}]
    optimizer = fa.SGD(groups, lr=1.0)
    fa.ASLR(optimizer, seed=5)
    for n in range(3):
        for i, p in enumerate(params):
            p.grad = None if i == 1 and n == 1 else torch.ones_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert [g["lr"] for g in groups] == [0.05, 0.01]
        for i, p in enumerate(params):
            lr = 0.0 if i == 1 and n == 1 else (0.05, 0.01)[i > 2] * factor(5, n, i, 0.2)
            torch.testing.assert_close(before[i] - p, torch.full_like(p, lr), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "policy", ["fixed", "active-shrink", "tlr-gradient-tensor", "tlr-times-active", "hypergradient-global"]
)
@pytest.mark.parametrize("cls", [fa.SGD, fa.AdamW, fa.RAdam, fa.NAdam, fa.AdaBelief], ids=lambda cls: cls.__name__)
def test_the_rate_is_lr_times_gain_times_draw(cls, policy):
    """A tensor moves as if the drawn rate were the lr of its group, also with decoupled decay."""

    def build():
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(3)]
        return params, cls([{"params": [p]} for p in params], lr=0.03, weight_decay=0.1, policy=POLICIES[policy])

    (ours, optimizer), (theirs, expected) = build(), build()
    fa.ASLR(optimizer, seed=1)
    for n in range(7):
        gradients = [torch.randn(5, dtype=torch.float64) for _ in ours]
        rates = [0.03 * factor(1, n, i, 1 / 3) for i in range(3)]
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad, q.grad = gradients[i].clone(), gradients[i].clone()
            if not policy.startswith("hypergradient"):  # its slope is multiplied by lr, with or without a draw
                expected.param_groups[i]["lr"] = rates[i]
        optimizer.step()
        if policy.startswith("hypergradient"):
            before = [q.detach().clone() for q in theirs]
            expected.step()
            for i, q in enumerate(theirs):
                q.data.copy_(before[i] + (q.detach() - before[i]) * factor(1, n, i, 1 / 3))
        else:
            expected.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-14)


def test_the_displacement_is_divided_by_the_drawn_rates():
    """``lr_sum`` includes the draws, so the direction of a constant gradient equals the gradient."""
    params = parameters(1)
    optimizer = fa.SGD(params, lr=0.1, policy=fa.TrainableLR(interval=3, source="displacement"))
    fa.ASLR(optimizer)
    for _ in range(3):
        params[0].grad = torch.full((3,), 0.5, dtype=torch.float64)
        optimizer.step()
    direction = optimizer.state[params[0]]["direction_prev"]
    torch.testing.assert_close(direction, torch.full_like(direction, 0.5), rtol=1e-13, atol=0)


@pytest.mark.parametrize("skipped", [True, False])
def test_the_step_after_a_skipped_one_repeats_its_draws(skipped):
    params = parameters(1)
    optimizer = fa.SGD(params, lr=0.1, fused=True)
    controller = fa.ASLR(optimizer)
    params[0].grad = torch.ones_like(params[0])
    optimizer.found_inf = torch.tensor([float(skipped)])  # pyright: ignore
    optimizer.step()
    del optimizer.found_inf  # pyright: ignore
    assert controller.state_dict()["n"] == (0 if skipped else 1)
    optimizer.step()
    expected = 1 - 0.1 * (factor(0, 0, 0, 1.0) + (0.0 if skipped else factor(0, 1, 0, 1.0)))
    torch.testing.assert_close(params[0].detach(), torch.full_like(params[0], expected), rtol=1e-13, atol=0)


def test_nothing_is_drawn_without_jitter_or_controller():
    trajectories = []
    for jitter in (None, False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = fa.AdamW(model.parameters(), lr=0.01)
        controller = None if jitter is None else fa.ASLR(optimizer, jitter=jitter)
        assert (optimizer._random_rates is not None) is bool(jitter)
        epoch(model, optimizer, 0)
        if controller is not None and jitter:
            controller.remove()
            assert optimizer._random_rates is None
        trajectories.append(values(model))
    assert same(trajectories[0], trajectories[1])
    assert not same(trajectories[0], trajectories[2])


# ---- optimizers of other packages ----


def test_an_optimizer_of_another_package_draws_once_per_group():
    params = parameters(3)
    rate = torch.tensor(0.05, dtype=torch.float64)
    optimizer = torch.optim.SGD([{"params": params[:2], "lr": rate}, {"params": params[2:], "lr": 0.5}], foreach=False)
    controller = fa.ASLR(optimizer, seed=9)
    for n in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, p in enumerate(params):
            expected = (0.05, 0.5)[i > 1] * factor(9, n, int(i > 1), 0.2)
            torch.testing.assert_close(before[i] - p, torch.full_like(p, expected), rtol=1e-12, atol=0)
        assert [float(g["lr"]) for g in optimizer.param_groups] == [0.05, 0.5]
        assert optimizer.param_groups[0]["lr"] is rate
    assert controller.state_dict()["n"] == 3


def test_the_center_is_restored_after_a_step_that_raises():
    params = parameters(1)
    optimizer = torch.optim.SGD(params, lr=0.1)
    controller = fa.ASLR(optimizer)
    controller.step(1.0)

    def broken() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(broken)
    controller.step(2.0)
    assert optimizer.param_groups[0]["lr"] == 0.2
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(ZeroDivisionError):
        optimizer.step(broken)
    assert optimizer.param_groups[0]["lr"] != 0.2
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.2
    with pytest.raises(ZeroDivisionError):
        optimizer.step(broken)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.2
    controller.remove()
    optimizer.step()
    torch.testing.assert_close(
        params[0].detach().mean().item(), 1 - 0.2 * factor(0, 0, 0, 0.5) - 0.2, rtol=1e-13, atol=0
    )


# ---- resuming, copying ----

BUILD = {
    "ours": lambda params: fa.AdamW(params, lr=0.05, policy=fa.TrainableLR(interval=2, granularity="tensor")),
    "foreign": lambda params: torch.optim.AdamW(params, lr=0.05),
}


def run(model, optimizer, controller, epochs) -> None:
    for i in epochs:
        loss = epoch(model, optimizer, i)
        controller.step(math.nan if i == 4 else loss)


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)], ids=["optimizer-first", "controller-first"])
def test_training_resumes_bit_for_bit(build, order, tmp_path):
    def parts(seed):
        torch.manual_seed(seed)
        model = Net()
        optimizer = build(model.parameters())
        return model, optimizer, fa.ASLR(optimizer, seed=seed, min_lr=1e-3)

    whole = parts(1)
    run(*whole, range(6))
    torch.save([p.state_dict() for p in whole], tmp_path / "checkpoint.pt")
    run(*whole, range(6, 12))
    resumed, saved = parts(2), torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for i in order:
        resumed[i].load_state_dict(saved[i])
    run(*resumed, range(6, 12))
    assert same([p.state_dict() for p in resumed[1:]], [p.state_dict() for p in whole[1:]])
    assert same(values(resumed[0].layers), values(whole[0].layers))


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD.keys())
def test_copies_are_independent(build):
    model = Net()
    optimizer = build(model.parameters())
    controller = fa.ASLR(optimizer, seed=4)
    run(model, optimizer, controller, range(3))
    model2, optimizer2, controller2 = copy.deepcopy((model, optimizer, controller))
    run(model, optimizer, controller, range(3, 6))
    run(model2, optimizer2, controller2, range(3, 6))
    assert same(values(model), values(model2))
    assert same(controller.state_dict(), controller2.state_dict())
    assert controller2.optimizer is optimizer2
    alone = copy.deepcopy(optimizer)  # has no controller, so it can get one
    assert getattr(alone, "_random_rates", None) is None
    fa.ASLR(alone)
