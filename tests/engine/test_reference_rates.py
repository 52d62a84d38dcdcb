"""``lr_ref``: its value, and that schedules, frozen groups and unequal rates do not drive the gains."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as lrs

import fused_adaptive as fa
from fused_adaptive.engine import reference_rates

from ..common.breaking import broken
from ..common.cases import BACKENDS, Gradients, parameters, train
from ..common.single import feed, one_parameter
from ..optimizers.test_facade import SCHEDULERS

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def active_sgd(lr: Any = 0.1, **arguments: Any) -> fa.AdaptiveOptimizer:
    return fa.SGD([one_parameter()], lr=lr, policy=fa.ActiveLR(interval=2, increment=0.01), **arguments)


# ---- its value ----


def test_the_reference_rate_is_the_largest_rate_of_a_group():
    optimizer = active_sgd(0.1)
    (group,) = optimizer.param_groups
    assert group["lr_ref"] == 0.1
    for lr, expected in ((0.01, 0.1), (0.3, 0.3), (0.0, 0.3)):
        group["lr"] = lr
        feed(optimizer, [1.0, 1.0])
        assert group["lr_ref"] == expected


def test_the_reference_rate_includes_the_ends_of_a_schedule():
    warm_up = active_sgd(0.1)
    lrs.LinearLR(warm_up, start_factor=1e-3)
    cycle = active_sgd(0.1)
    lrs.OneCycleLR(cycle, max_lr=0.7, total_steps=10)
    for optimizer, lr, expected in ((warm_up, 1e-4, 0.1), (cycle, 0.028, 0.7)):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        feed(optimizer, [1.0, 1.0])
        assert optimizer.param_groups[0]["lr_ref"] == expected


def test_a_group_has_a_reference_rate_while_a_policy_adapts():
    optimizer = fa.SGD([one_parameter()], lr=0.1)
    (group,) = optimizer.param_groups
    for policy, lr, expected in (
        (None, 0.1, None),
        (fa.Hypergradient(1e-4), 0.02, 0.02),
        (fa.ActiveLR(interval=3), 0.01, 0.02),  # it belongs to the group, whatever policy adapts
        (None, 0.01, None),
        (fa.ActiveLR(interval=3), 0.005, 0.005),
    ):
        group["policy"], group["lr"] = policy, lr
        feed(optimizer, [1.0, 1.0])
        assert group.get("lr_ref") == expected


def test_the_reference_rate_is_saved_and_starts_anew_if_a_checkpoint_lacks_it():
    optimizer = active_sgd(0.1)
    optimizer.param_groups[0]["lr"] = 0.3
    feed(optimizer, [1.0, 1.0])
    optimizer.param_groups[0]["lr"] = 0.05
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    ours, theirs = active_sgd(7.0), active_sgd(7.0)
    ours.load_state_dict(torch.load(file, weights_only=True))
    theirs.load_state_dict(torch.optim.SGD([one_parameter()], lr=0.05).state_dict())
    assert (ours.param_groups[0]["lr_ref"], theirs.param_groups[0]["lr_ref"]) == (0.3, 0.05)


def test_an_lr_tensor_on_a_device_is_read_once():
    optimizer = active_sgd(torch.tensor(0.25))
    with broken(reference_rates, "is_on_host", lambda rate: False):
        optimizer.param_groups[0]["lr"].fill_(0.5)
        feed(optimizer, [1.0, 1.0])
        assert optimizer.param_groups[0]["lr_ref"] == 0.25
    feed(optimizer, [1.0, 1.0])
    assert optimizer.param_groups[0]["lr_ref"] == 0.5


def test_a_changed_reference_rate_keeps_the_plans():
    params = parameters(torch.float32)
    optimizer = fa.AdamW(params, lr=0.01, policy=fa.ActiveLR(interval=2))
    train(optimizer, 2)
    participants, compiled = optimizer._participants, optimizer._participants.plans
    optimizer.param_groups[0]["lr"] = 0.02
    train(optimizer, 2, start=2)
    assert optimizer.param_groups[0]["lr_ref"] == 0.02
    assert optimizer._participants is participants
    assert optimizer._participants.plans is compiled


# ---- groups ----


@every_backend
def test_groups_with_24_rates_share_one_policy_and_one_count(backend):
    params = parameters(shapes=[(3,)] * 24)
    groups = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)]
    optimizer = fa.AdamW(groups, policy=fa.ActiveLR(interval=3, increment=0.01), backend=backend)
    assert len({str(group["policy"]) for group in optimizer.param_groups}) == 1
    for step in range(9):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert len(optimizer._participants.members) == 1
        assert {optimizer.state[p]["active_step"].item() for p in params} == {(step + 1) % 3}
    for i, p in enumerate(params):  # two interval ends whose signs agree
        expected = torch.full_like(p, 1 + 2 * 0.01 / (1e-3 * (i + 1)))
        torch.testing.assert_close(optimizer.state[p]["element_gain"], expected)


@every_backend
def test_a_group_added_in_the_middle_of_an_interval_ends_with_the_others(backend):
    policy, (first, second) = fa.ActiveLR(interval=4), parameters(shapes=[(3,), (2,)])
    optimizer = fa.SGD([first], lr=0.1, policy=policy, backend=backend)
    train(optimizer, 2)
    optimizer.add_param_group({"params": [second], "lr": 1e-3, "policy": policy})
    train(optimizer, 1, start=2)
    assert optimizer.state[first]["active_step"] == optimizer.state[second]["active_step"] == 3
    train(optimizer, 1, start=3)
    assert optimizer.state[first]["active_step"] == optimizer.state[second]["active_step"] == 0
    assert (optimizer.state[second]["grad_sign_prev"] != 0).all()


POLICIES: dict[str, Callable[[], Any]] = {
    "active": lambda: fa.ActiveLR(interval=4, increment=0.01),
    "hypergradient": lambda: fa.Hypergradient(1e-4),
    "eta": lambda: fa.TrainableLR(interval=2, source="gradient", eta=1e-4),
    "naive": lambda: fa.TrainableLR(naive=True, eta=1e-4),
}
MORE_POLICIES = POLICIES | {
    "hypergradient-tensor": lambda: fa.Hypergradient(1e-4, granularity="tensor"),
    "tlr": lambda: fa.TrainableLR(interval=4),
    "tlr-gradient": lambda: fa.TrainableLR(interval=3, source="gradient"),
    "tlr-preconditioned": lambda: fa.TrainableLR(interval=3, source="preconditioned", granularity="tensor"),
    "both": lambda: (fa.TrainableLR(interval=3, source="gradient"), fa.ActiveLR(interval=4)),
}


class Regression:
    """A linear model with 16 inputs and 4 outputs, with noise, in minibatches of 32."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.x = torch.randn(512, 16)
        self.y = self.x @ torch.randn(16, 4) + 0.5 * torch.randn(512, 4)
        self.model, self.order = torch.nn.Linear(16, 4), torch.Generator().manual_seed(seed)
        self.loss = float("nan")

    def step(self, optimizer: Any) -> None:
        i = torch.randint(0, 512, (32,), generator=self.order)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = (self.model(self.x[i]) - self.y[i]).square().mean()
            loss.backward()
            return loss

        self.loss = optimizer.step(closure).item()


def rates(policy: Any, schedule: Callable[[Any], Any], seed: int, steps: int = 120, **arguments: Any) -> list[float]:
    """Returns the largest rate after each step."""
    task = Regression(seed)
    optimizer = fa.SGD(task.model.parameters(), lr=1e-2, policy=policy, **arguments)
    scheduler, found = schedule(optimizer), []
    for _ in range(steps):
        task.step(optimizer)
        found.append(optimizer.learning_rates()[0]["max"])
        scheduler.step(task.loss) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()
    assert torch.tensor(task.loss).isfinite()
    return found


#: Schedules that never raise lr above its initial value.
FALLING: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 120),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 50),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.9),
    "to zero": lambda o: lrs.LambdaLR(o, lambda step: max(0.0, 1 - step / 60)),
    "off and on": lambda o: lrs.LambdaLR(o, lambda step: float(step // 10 % 2 == 0)),
}


@pytest.mark.thinned
@every_backend
@pytest.mark.parametrize("schedule", FALLING)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_schedule_that_only_lowers_lr_does_not_raise_the_rate(policy, schedule, backend):
    for seed in range(3):
        constant = max(rates(POLICIES[policy](), lambda o: lrs.LambdaLR(o, lambda step: 1.0), seed, backend=backend))
        assert max(rates(POLICIES[policy](), FALLING[schedule], seed, backend=backend)) <= 2 * constant


@pytest.mark.thinned
@pytest.mark.feature("every torch.optim.lr_scheduler, with an adapting policy")
@every_backend
@pytest.mark.parametrize("policy", MORE_POLICIES)
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_rates_stay_finite_with_every_schedule_and_policy(schedule, policy, backend):
    found = rates(MORE_POLICIES[policy](), SCHEDULERS[schedule], seed=0, steps=11, backend=backend)
    assert torch.tensor(found).isfinite().all()


def test_gain_bounds_limit_the_rate_after_a_restart_of_the_schedule():
    found = [
        max(rates(fa.TrainableLR(interval=4, gain_bounds=bounds), FALLING["restarts"], seed=0))
        for bounds in (None, (0.0, 2.0))
    ]
    assert found[1] <= 2e-2 < found[0]


# ---- rates of 0 and near it ----


def trained_beside(policy: Any, lr2: float, backend: str) -> tuple[float, float]:
    """Returns the gain of one group, and the loss, if another group with the same gain has the rate ``lr2``."""
    torch.manual_seed(0)
    w, b, x = torch.randn(10, 5, requires_grad=True), torch.randn(10, requires_grad=True), torch.randn(5)
    groups = [{"params": [w]}, {"params": [b], "lr": lr2}]
    optimizer = fa.SGD(groups, lr=1e-3, policy=policy, backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (w.mv(x) + b).square().sum()
        loss.backward()
        return loss

    for _ in range(20):
        loss = optimizer.step(closure)
    return float(optimizer.state[w]["gain"]), loss.item()


@every_backend
@pytest.mark.parametrize("policy", ["hypergradient", "eta", "naive"])
def test_a_rate_of_zero_is_the_limit_of_small_rates(policy, backend):
    def make() -> Any:
        return {
            "hypergradient": fa.Hypergradient(1e-6),
            "eta": fa.TrainableLR(interval=2, eta=1e-6),
            "naive": fa.TrainableLR(naive=True, eta=1e-6),
        }[policy]

    gain, loss = trained_beside(make(), 0.0, backend)
    assert gain != 1.0
    for lr2 in (1e-6, 1e-9, 1e-30):
        assert trained_beside(make(), lr2, backend) == pytest.approx((gain, loss), rel=0.05)
    assert trained_beside(make(), 1e-30, backend) == pytest.approx((gain, loss), rel=1e-6)


@every_backend
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("source", ["displacement", "gradient", "preconditioned"])
def test_a_frozen_group_does_not_affect_trainable_lr(source, granularity, backend):
    """The gain and the stored sums are the same as without the frozen group."""

    def run(with_frozen: bool) -> tuple[Any, fa.AdaptiveOptimizer]:
        head, body = parameters(shapes=[(5,), (7,)])
        groups = [{"params": [head]}] + [{"params": [body], "lr": 0.0}] * with_frozen
        policy = fa.TrainableLR(interval=3, source=source, granularity=granularity)
        optimizer = fa.SGD(groups, lr=0.1, policy=policy, backend=backend)
        for step in range(14):
            Gradients().set([head, body], step)
            optimizer.step()
        return head, optimizer

    (head, alone), (other, beside) = run(False), run(True)
    assert torch.equal(head, other)
    mine, yours = alone.state[head], beside.state[other]
    assert all(torch.equal(mine[name], yours[name]) for name in mine)
    frozen = beside.param_groups[1]["params"][0]
    previous = "grad_mean_prev" if source == "gradient" else "direction_prev"
    assert (beside.state[frozen][previous] == 0).all()


@every_backend
@pytest.mark.parametrize("source", ["displacement", "preconditioned"])
def test_a_gain_of_zero_stays_zero_and_the_previous_direction_is_kept(source, backend):
    policy = fa.TrainableLR(interval=2, source=source, granularity="tensor")
    optimizer = fa.SGD([one_parameter()], lr=0.1, policy=policy, backend=backend)
    feed(optimizer, *[[1.0, -0.5]] * 4)
    (state,) = optimizer.state.values()
    state["gain"].zero_()
    before = state["direction_prev"].clone()
    assert before.abs().sum() > 0
    feed(optimizer, *[[0.3, 0.2]] * 4)
    assert state["gain"] == 0
    assert torch.equal(state["direction_prev"], before)


@every_backend
@pytest.mark.parametrize("by_hand", [False, True], ids=["counted", "by hand"])
def test_active_lr_does_not_adapt_if_the_last_step_has_lr_zero(by_hand, backend):
    """Gains and signs stay, and the sum is reset. A change of lr since the last step does not matter."""
    (p,) = parameters(shapes=[(3,)])
    policy = fa.ActiveLR(interval=None if by_hand else 2, high=0.5)
    optimizer = fa.SGD([p], lr=0.1, policy=policy, backend=backend)

    def interval(sign: float, last_lr: float, lr_after: float) -> None:
        for lr in (0.1, last_lr):
            optimizer.param_groups[0]["lr"] = lr
            p.grad = torch.full_like(p, sign)
            optimizer.step()
        optimizer.param_groups[0]["lr"] = lr_after
        if by_hand:
            optimizer.end_interval()

    interval(1.0, last_lr=0.1, lr_after=0.1)
    interval(-1.0, last_lr=0.0, lr_after=0.1)
    state = optimizer.state[p]
    assert (state["element_gain"] == 1).all()
    assert (state["grad_sign_prev"] == 1).all()
    assert (state["grad_sum"] == 0).all()
    interval(1.0, last_lr=0.1, lr_after=0.0)
    assert (optimizer.state[p]["element_gain"] == 1.5).all()


@every_backend
def test_warm_up_from_zero_by_hand_uses_the_first_rate_as_reference(backend):
    """While lr has always been 0, there is no rate to divide an increment by; then it is the first other lr."""
    (p,) = parameters(shapes=[(3,)])
    optimizer = fa.SGD([p], lr=0.0, policy=fa.ActiveLR(interval=1, increment=0.02), backend=backend)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.0 if step < 3 else 0.04
        p.grad = torch.ones_like(p)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["element_gain"], torch.full_like(p, 1 + 2 * 0.02 / 0.04))
    assert optimizer.param_groups[0]["lr_ref"] == 0.04
