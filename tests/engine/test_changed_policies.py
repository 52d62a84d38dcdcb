"""Policies and structure changed by hand: state follows, whatever is called between the change and a step."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import fused_adaptive as fa
from fused_adaptive import ActiveLR, AdamW, Hypergradient, TrainableLR
from fused_adaptive.backends import native

from ..common.cases import BACKENDS

pytestmark = pytest.mark.parametrize("backend", BACKENDS)

GLOBAL = TrainableLR(interval=2, source="gradient")


def params_of(*values):
    return [nn.Parameter(torch.full((3,), float(v), dtype=torch.float64)) for v in values]


def step(optimizer, value=1.0):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, value)
    optimizer.step()


def same(optimizer):
    return optimizer


def add_group(optimizer):
    optimizer.add_param_group({"params": params_of(3)})
    return optimizer


def end_interval(optimizer):
    optimizer.end_interval()
    return optimizer


def through_a_copy(optimizer):
    return copy.deepcopy(optimizer)


def failing_step(optimizer):
    p = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(2, 2)))
    optimizer.param_groups[0]["params"][-1].grad = torch.zeros(2, 2).to_sparse()
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    del optimizer.param_groups[0]["params"][-1]
    return optimizer


def through_a_checkpoint(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    groups = [{"params": list(group["params"])} for group in optimizer.param_groups]
    other = type(optimizer)(groups, backend=optimizer._backend_requested)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


BETWEEN = [same, add_group, end_interval, through_a_copy, through_a_checkpoint, failing_step]


def gains(optimizer):
    return {s["gain"].item() for s in optimizer.state.values() if "gain" in s}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_group_that_joins_a_global_policy_gets_its_gain(backend, between):
    p, q = params_of(1, 2)
    own = TrainableLR(interval=2, source="gradient", c=0.5)
    optimizer = fa.SGD([{"params": [p], "policy": GLOBAL}, {"params": [q], "policy": own}], lr=0.01, backend=backend)
    for _ in range(5):
        step(optimizer)
    assert gains(optimizer) == {1.25, 1.5}
    optimizer.param_groups[1]["policy"] = GLOBAL
    optimizer = between(optimizer)
    step(optimizer)
    assert len(gains(optimizer)) == 1
    assert gains(optimizer) < {1.25, 1.5625}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_direction_is_not_used_after_the_structure_has_changed(backend, between):
    optimizer = AdamW(params_of(1), lr=0.1, policy=Hypergradient(0.01), backend=backend)
    step(optimizer)
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer = between(optimizer)
    step(optimizer)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["gain"] == 1
    step(optimizer)
    assert optimizer.state[optimizer.param_groups[0]["params"][0]]["gain"] > 1


@pytest.mark.parametrize(
    "meanwhile", [None, ActiveLR(interval=3, high=0.1), TrainableLR(interval=3, source="gradient")]
)
def test_a_policy_that_is_set_again_starts_a_new_interval(backend, meanwhile):
    policy = TrainableLR(interval=3, source="displacement")
    (p,) = params_of(1)
    optimizer = fa.SGD([p], lr=0.01, policy=policy, backend=backend)
    for _ in range(5):
        step(optimizer)
    optimizer.param_groups[0]["policy"] = meanwhile
    for _ in range(4):
        step(optimizer)
    optimizer.param_groups[0]["policy"] = policy
    before, gain = p.detach().clone(), optimizer.state[p]["gain"].item()
    step(optimizer)
    state = optimizer.state[p]
    assert torch.equal(state["interval_start"], before)
    assert state["tlr_step"] == state["tlr_applied"] == 1
    assert not state["direction_prev"].any()
    assert state["gain"] == gain


@pytest.mark.parametrize("cls", [AdamW, fa.SGD])
def test_a_direction_from_before_another_policy_is_only_known_from_moments(backend, cls):
    (p,) = params_of(0)
    optimizer = cls([p], lr=0.1, policy=Hypergradient(0.1), backend=backend)
    step(optimizer)
    optimizer.param_groups[0]["policy"] = None
    for _ in range(2):
        step(optimizer, -1)
    optimizer.param_groups[0]["policy"] = Hypergradient(0.1)
    step(optimizer, -1)
    assert (optimizer.state[p]["gain"] != 1) == (cls is AdamW)


def test_a_policy_with_changed_numbers_keeps_its_state(backend):
    (p,) = params_of(1)
    optimizer = AdamW([p], lr=0.01, policy=ActiveLR(interval=5, high=0.1), backend=backend)
    for count in range(1, 5):
        optimizer.param_groups[0]["policy"] = ActiveLR(interval=5, high=0.1 / count)
        step(optimizer)
        assert optimizer.state[p]["active_step"] == count
    assert torch.equal(optimizer.state[p]["grad_sum"], torch.full_like(p, 4))


def test_sums_with_another_meaning_are_reset(backend):
    (p,) = params_of(1)
    optimizer = AdamW([p], lr=0.01, policy=TrainableLR(interval=4, source="gradient"), backend=backend)
    for _ in range(3):
        step(optimizer)
    optimizer.param_groups[0]["policy"] = TrainableLR(interval=4, source="preconditioned")
    before = p.detach().clone()
    step(optimizer)
    assert optimizer.state[p]["tlr_step"] == 1
    assert torch.equal(optimizer.state[p]["interval_start"], before)


POLICIES = [
    ActiveLR(interval=4, high=0.1),
    TrainableLR(interval=4, granularity="tensor", source="gradient"),
    TrainableLR(interval=4, granularity="tensor", source="preconditioned"),
    TrainableLR(interval=4, granularity="tensor", source="gradient", eta=0.1),
    Hypergradient(0.01, granularity="tensor"),
]


@pytest.mark.parametrize("second", POLICIES, ids=repr)
@pytest.mark.parametrize("first", [POLICIES[0], POLICIES[1], None], ids=repr)
def test_gradient_release_follows_changed_policies_as_the_usual_loop(backend, first, second):
    results = []
    for releases in (False, True):
        model = nn.ParameterList(params_of(2, 3, 4))
        groups = [{"params": [model[0]], "policy": first}, {"params": [model[1], model[2]], "policy": second}]
        optimizer = AdamW(groups, lr=0.01, backend=backend)
        if releases:
            fa.release_gradients(model, optimizer)
        for i in range(9):
            if i == 2:
                optimizer.param_groups[0]["policy"] = second
            if i == 6:
                optimizer.param_groups[1]["policy"] = first
            optimizer.zero_grad()
            active = list(model) if i else [model[0], model[1]]
            torch.stack([(p - 1).square().sum() for p in active]).sum().backward()
            optimizer.step()
        results.append([p.detach() for p in model] + [t for p in model for t in optimizer.state[p].values()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("plain", "complete"),
    [
        ({"name": "ActiveLR", "interval": 1}, {"increment": 1e-4}),
        ({"name": "TrainableLR", "interval": 1}, {"source": "gradient"}),
        ({"name": "ActiveLR", "interval": 1, "high": 0.1, "gain_bounds": [0.5, 2.0]}, {"gain_max": 2.0}),
    ],
)
def test_a_plain_policy_that_was_set_by_hand_gets_its_defaults(backend, plain, complete):
    (p,) = params_of(1)
    optimizer = AdamW([p], lr=1e-2, backend=backend)
    optimizer.param_groups[0]["policy"] = plain
    step(optimizer)
    assert complete.items() <= optimizer.param_groups[0]["policy"].items()
    assert optimizer.param_groups[0]["lr_ref"] == 1e-2


@pytest.mark.parametrize(
    ("plain", "complaint"),
    [
        ({"name": "TrainableLR", "interval": 1, "source": "displacement"}, "cannot drive AdamW"),
        ({"name": "TrainableLR", "naive": True, "eta": 1.0}, "defined for SGD"),
        ([{"name": "Hypergradient", "hyper_lr": 0.1}, {"name": "ActiveLR", "interval": 1}], "do not go together"),
        ({"name": "ActiveLR", "interval": 1, "high": 0.1, "low": 5}, "low must be"),
    ],
)
def test_an_invalid_plain_policy_is_refused_before_anything_changes(backend, plain, complaint):
    p, q = params_of(1, 2)
    optimizer = AdamW([{"params": [p]}, {"params": [q]}], lr=1e-2, backend=backend)
    step(optimizer)
    before = copy.deepcopy([p, q, *optimizer.state[p].values()])
    optimizer.param_groups[1]["policy"] = plain
    with pytest.raises(ValueError, match=complaint):
        step(optimizer)
    assert all(map(torch.equal, before, [p, q, *optimizer.state[p].values()]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", None),
        ("lr", "x"),
        ("lr", torch.tensor([0.1, 0.2])),
        ("betas", None),
        ("eps", "y"),
        ("weight_decay", None),
    ],
)
def test_an_invalid_number_is_refused_before_anything_changes(backend, name, value):
    p, q = params_of(1, 2)
    optimizer = AdamW(
        [{"params": [p]}, {"params": [q]}], lr=0.1, policy=ActiveLR(interval=1, high=0.1), backend=backend
    )
    step(optimizer)
    before = copy.deepcopy([p, q, *optimizer.state[p].values()])
    optimizer.param_groups[1][name] = value
    with pytest.raises((TypeError, ValueError), match=name):
        step(optimizer)
    assert all(map(torch.equal, before, [p, q, *optimizer.state[p].values()]))


def test_a_state_dict_between_a_change_and_a_step_is_plain_and_complete(backend):
    (p,) = params_of(1)
    optimizer = AdamW([p], lr=1e-3, backend=backend)
    step(optimizer)
    optimizer.param_groups[0]["policy"] = ActiveLR(interval=2)
    other = through_a_checkpoint(optimizer)
    assert other.param_groups[0]["policy"]["increment"] == 1e-4
    assert "element_gain" in other.state[p]


def test_state_dict_does_not_convert_or_move_state(backend):
    """State may have been converted or moved to save memory, and a checkpoint does not undo that."""
    (p,) = params_of(1)
    optimizer = AdamW([p], lr=1e-3, backend=backend)
    step(optimizer)
    optimizer.state[p]["exp_avg"] = put = optimizer.state[p]["exp_avg"].half()
    assert optimizer.state_dict()["state"][0]["exp_avg"] is put


def test_a_call_without_gradients_counts_also_at_rate_0(backend):
    (p,) = params_of(1)
    optimizer = AdamW([p], lr=0.0, policy=ActiveLR(interval=3, high=0.1), backend=backend)
    optimizer.step()
    step(optimizer)
    assert optimizer.state[p]["active_step"] == 2


def test_warnings_show_the_users_line(backend):
    (p,) = params_of(1)
    with pytest.warns(UserWarning, match="only a start") as caught:
        optimizer = AdamW([p], lr=1e-6, policy=ActiveLR(interval=3), backend=backend)
    assert caught[0].filename == __file__
    optimizer.param_groups[0]["policy"] = ActiveLR(interval=4)
    with pytest.warns(UserWarning, match="only a start") as caught:
        step(optimizer)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)


def test_numbers_are_read_before_the_first_of_several_plans_runs(backend, monkeypatch):
    """If tensors are on several devices, each device has a plan."""
    if backend == "native":
        monkeypatch.setattr(native, "views_of_plans", lambda participants, _: [[view] for view in participants.views])
    p, q = params_of(1, 2)
    optimizer = AdamW([{"params": [p]}, {"params": [q]}], lr=0.1, backend=backend)
    step(optimizer)
    before = copy.deepcopy([p, q])
    optimizer.param_groups[1]["weight_decay"] = None
    with pytest.raises(TypeError, match="weight_decay"):
        step(optimizer)
    assert all(map(torch.equal, before, [p, q]))


def test_state_that_a_copy_or_checkpoint_completes_has_no_graph(backend):
    optimizer = AdamW(params_of(1.0), backend=backend)
    step(optimizer)
    optimizer.param_groups[0]["policy"] = TrainableLR(interval=3, source="preconditioned")
    state = optimizer.state_dict()["state"][0]
    assert not any(value.requires_grad for value in state.values())
    copy.deepcopy((optimizer, state))
