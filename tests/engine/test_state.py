"""Checkpoints: plain and complete, in the right dtypes, resumed bit for bit, to and from torch."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint.state_dict as dcp_state
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import fused_adaptive as fa

from ..common.cases import CASES, Case, Gradients, all_equal, every_case, parameters, state_of, train

NAMESAKES = {
    name: (getattr(fa, name), getattr(torch.optim, name)) for name in ("SGD", "Adam", "AdamW", "RAdam", "NAdam")
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "NAdam": {"lr": 0.01, "weight_decay": 0.1, "momentum_decay": 0.05},
}


def through_disk(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def clones(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def resumes_bit_for_bit(case: Case, dtype: torch.dtype, at: int, drop: str = "") -> bool:
    """Compares training that is saved and resumed after ``at`` steps with training without a break."""
    straight, broken, gradients = parameters(dtype), parameters(dtype), Gradients(missing=0.2)
    train(case.build(straight), 9, gradients=gradients)
    first = case.build(broken)
    train(first, at, gradients=gradients)
    saved = through_disk(first.state_dict())
    for values in saved["state"].values():
        if drop in values:
            values[drop].zero_()
    resumed = clones(broken)
    second = case.build(resumed, lr=9.0, policy=None)  # hyperparameters and policy of the checkpoint are used
    second.load_state_dict(saved)
    train(second, 9 - at, start=at, gradients=gradients)
    return all_equal(straight, resumed)


@pytest.mark.thinned
@pytest.mark.feature("checkpoints resume bit for bit, anywhere in an interval")
@every_case
def test_resume_at_any_point_of_an_interval(case):
    """Intervals are 2 and 3 steps, so these points are in the middle and at the end of intervals."""
    dtype = torch.bfloat16 if case.decoupled else torch.float32
    assert all(resumes_bit_for_bit(case, dtype, at) for at in (1, 3, 4))


def test_resume_check_fails_when_state_is_lost():
    assert not resumes_bit_for_bit(Case("AdamW", "active", True), torch.float32, 4, drop="grad_sum")
    assert not resumes_bit_for_bit(Case("AdamW", "active", True), torch.float32, 4, drop="active_step")
    assert not resumes_bit_for_bit(Case("SGD", "tlr-displacement-global", True), torch.float32, 4, drop="lr_sum")
    assert not resumes_bit_for_bit(
        Case("SGD-nesterov", "hypergradient-global", True), torch.float32, 4, drop="direction_prev"
    )


@pytest.mark.thinned
@every_case
def test_state_is_plain_and_shaped_as_the_parameter_or_scalar(case):
    optimizer = case.build(parameters(torch.bfloat16))
    train(optimizer, 1)
    names = [set(values) for values in optimizer.state_dict()["state"].values()]
    train(optimizer, 7, start=1)
    saved = optimizer.state_dict()
    # All names exist from the first step on.
    assert [set(values) for values in saved["state"].values()] == names
    params = optimizer.param_groups[0]["params"]
    for i, values in saved["state"].items():
        for name, value in values.items():
            assert isinstance(value, torch.Tensor), name
            assert value.shape in ((), params[i].shape), name
            assert value.dtype in (torch.float32, torch.float64, torch.int8, torch.int64), name
    assert saved.keys() == {"state", "param_groups"}
    policy = saved["param_groups"][0]["policy"]
    for plain in policy if isinstance(policy, list) else [policy]:
        assert all(isinstance(v, (int, float, str, type(None))) for v in plain.values())


EXPECTED_NAMES = {
    ("AdamW", "fixed"): "step exp_avg exp_avg_sq",
    ("AdamW-amsgrad", "fixed"): "step exp_avg exp_avg_sq max_exp_avg_sq",
    ("AdaBelief-plain", "fixed"): "step exp_avg exp_avg_var max_exp_avg_var",
    ("SGD", "fixed"): "",
    ("SGD-momentum", "fixed"): "momentum_buffer",
    ("SGD", "active"): "element_gain grad_sum grad_sign_prev active_step active_applied",
    (
        "SGD",
        "tlr-displacement-global",
    ): "gain lr_sum tlr_step tlr_applied tlr_applied_prev interval_start direction_prev",
    ("SGD", "tlr-gradient-tensor"): "gain lr_sum tlr_step tlr_applied tlr_applied_prev grad_mean_sum grad_mean_prev",
    ("SGD", "tlr-preconditioned-global"): (
        "gain lr_sum tlr_step tlr_applied tlr_applied_prev interval_start direction_prev grad_mean_sum"
    ),
    ("SGD", "hypergradient-global"): "gain direction_valid direction_prev",
    ("SGD-momentum", "hypergradient-global"): "momentum_buffer gain direction_valid",
    ("SGD-nesterov", "hypergradient-global"): "momentum_buffer gain direction_valid direction_prev",
    ("AdamW", "hypergradient-tensor"): "step exp_avg exp_avg_sq gain direction_valid",
}


@pytest.mark.parametrize(("optimizer", "policy"), EXPECTED_NAMES)
def test_names_on_disk(optimizer, policy):
    built = Case(optimizer, policy, True).build(parameters())
    train(built, 1)
    assert set(built.state[built.param_groups[0]["params"][0]]) == set(EXPECTED_NAMES[optimizer, policy].split())


@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-preconditioned-global"])
def test_bf16_parameters_keep_float32_and_int8_state(policy):
    def dtypes(optimizer: fa.AdaptiveOptimizer) -> dict[str, torch.dtype]:
        return {name: value.dtype for name, value in state_of(optimizer).items()}

    case = Case("AdamW", policy, True)
    optimizer, other = case.build(parameters(torch.bfloat16)), case.build(parameters(torch.bfloat16))
    train(optimizer, 5)
    other.load_state_dict(through_disk(optimizer.state_dict()))
    assert dtypes(other) == dtypes(optimizer)
    assert torch.bfloat16 not in dtypes(other).values()
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer).values(), state_of(other).values(), strict=True))
    if policy == "active":
        assert dtypes(other)["0.grad_sign_prev"] == torch.int8
    # torch's own loading would round the state, so load_state_dict differs here.
    rounding = torch.optim.AdamW(parameters(torch.bfloat16))
    rounding.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert dtypes_of(rounding)["0.exp_avg"] == torch.bfloat16


def dtypes_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in state_of(optimizer).items()}


@pytest.mark.feature("checkpoints of torch.optim go on, bit for bit", backend="reference")
@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMESAKES)
def test_training_continues_bit_for_bit_from_a_torch_checkpoint(name, dtype):
    ours_cls, torch_cls = NAMESAKES[name]
    params = parameters(dtype)
    theirs = torch_cls(params, foreach=False, **ARGUMENTS[name])
    train(theirs, 4)
    saved, mine = through_disk(theirs.state_dict()), clones(params)
    optimizer = ours_cls(mine, lr=7.0)
    optimizer.load_state_dict(saved)
    assert all_equal(train(optimizer, 6, start=4), train(theirs, 6, start=4))


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMESAKES)
def test_training_continues_bit_for_bit_in_torch_from_our_checkpoint(name, dtype):
    ours_cls, torch_cls = NAMESAKES[name]
    params = parameters(dtype)
    optimizer = ours_cls(params, **ARGUMENTS[name])
    train(optimizer, 4)
    theirs = torch_cls(clones(params), lr=7.0, foreach=False)
    theirs.load_state_dict(through_disk(optimizer.state_dict()))
    theirs.param_groups[0]["foreach"] = False
    if name == "NAdam":  # torch loads mu_product in the parameters' dtype, and then rounds it otherwise
        for state in optimizer.state.values():
            state["mu_product"] = state["mu_product"].to(dtype)
    assert all_equal(train(theirs, 6, start=4), train(optimizer, 6, start=4))


@pytest.mark.parametrize(
    "policy", ["active", "tlr-gradient-global", "tlr-preconditioned-tensor", "hypergradient-global"]
)
@pytest.mark.parametrize("name", NAMESAKES)
def test_policy_state_starts_fresh_after_a_torch_checkpoint(name, policy):
    """As if the first steps were taken with torch: the moments continue, and the gains start at 1."""
    torch_cls = NAMESAKES[name][1]
    case = Case(name, policy, name == "AdamW")
    params = parameters()
    theirs = torch_cls(params, **ARGUMENTS[name])
    train(theirs, 5)
    optimizer = case.build(clones(params))
    optimizer.load_state_dict(through_disk(theirs.state_dict()))
    assert optimizer.param_groups[0]["policy"] == case.build(parameters()).param_groups[0]["policy"]
    assert optimizer.learning_rates()[0]["max"] == pytest.approx(ARGUMENTS[name]["lr"])
    train(optimizer, 12, start=5)
    assert optimizer.learning_rates()[0]["max"] != ARGUMENTS[name]["lr"]


def test_hypergradient_takes_its_direction_from_a_torch_checkpoint():
    """If the loaded moments determine the last direction, the first hypergradient equals that of our own run."""
    straight, params = parameters(), parameters()
    one = fa.AdamW(straight, lr=0.01, policy=fa.Hypergradient(0.0))
    train(one, 4)
    theirs = torch.optim.AdamW(params, lr=0.01)
    train(theirs, 4)
    two = fa.AdamW(clones(params), lr=0.01, policy=fa.Hypergradient(1e-3))
    two.load_state_dict(theirs.state_dict())
    one.param_groups[0]["policy"] = two.param_groups[0]["policy"]
    train(one, 1, start=4)
    train(two, 1, start=4)
    gain = two.state[two.param_groups[0]["params"][0]]["gain"].item()
    assert gain == pytest.approx(one.state[straight[0]]["gain"].item(), rel=1e-12)
    assert gain != 1.0


def test_a_flag_missing_in_the_checkpoint_keeps_the_constructors_value():
    theirs = torch.optim.SGD(parameters(), lr=0.3, momentum=0.9)
    train(theirs, 1)
    optimizer = fa.SGD(parameters(), lr=0.1, decoupled_weight_decay=True, policy=fa.ActiveLR(interval=2))
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.3, 0.9)
    assert group["decoupled_weight_decay"]
    assert group["policy"]["name"] == "ActiveLR"


def test_adamw_stays_decoupled_after_loading_a_checkpoint_of_adam():
    """As in torch.optim.AdamW, for which the flag is not a hyperparameter."""
    theirs = torch.optim.Adam(parameters(), lr=0.3, weight_decay=0.1)
    train(theirs, 1)
    for cls, decoupled in ((fa.AdamW, True), (fa.Adam, False)):
        optimizer = cls(parameters(), lr=0.1)
        optimizer.load_state_dict(theirs.state_dict())
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is decoupled
    ours = fa.AdamW(parameters(), decoupled_weight_decay=False)
    other = fa.AdamW(parameters())
    other.load_state_dict(ours.state_dict())
    assert other.param_groups[0]["decoupled_weight_decay"] is False  # our own checkpoints set the flag


def test_another_policy_can_be_set_after_loading():
    """The policy of a checkpoint is used; a policy that is set on the group afterwards replaces it."""
    optimizer = fa.AdamW(parameters(), policy=fa.ActiveLR(interval=2))
    optimizer.load_state_dict(fa.AdamW(parameters()).state_dict())
    assert optimizer.param_groups[0]["policy"] == {"name": "FixedLR"}
    optimizer.param_groups[0]["policy"] = fa.ActiveLR(interval=2)
    reference = fa.AdamW(parameters(), policy=fa.ActiveLR(interval=2))
    assert all_equal(train(optimizer, 5), train(reference, 5))
    assert optimizer.param_groups[0]["policy"] == reference.param_groups[0]["policy"]
    optimizer.param_groups[0]["policy"] = fa.TrainableLR(interval=2, source="displacement")
    with pytest.raises(ValueError, match="cannot drive AdamW"):
        optimizer.step()


def test_a_bad_policy_on_a_later_group_changes_nothing():
    params = parameters()
    optimizer = fa.SGD([{"params": params[:2]}, {"params": params[2:]}], momentum=0.9)
    optimizer.param_groups[1]["policy"] = fa.TrainableLR(naive=True, eta=0.1)
    with pytest.raises(ValueError, match="naive=True"):
        train(optimizer, 1)
    assert not optimizer.state


def test_numpy_numbers_are_plain_in_checkpoints():
    high = np.float32(0.25)
    optimizer = fa.SGD(parameters(), policy=fa.ActiveLR(interval=np.int64(2), high=high, low=np.float64(0.5)))
    policy = through_disk(optimizer.state_dict())["param_groups"][0]["policy"]
    assert (policy["interval"], policy["high"], policy["low"]) == (2, 0.25, 0.5)
    assert {type(policy[name]) for name in ("high", "low")} == {float}


def test_step_counts_in_old_checkpoints_can_be_python_numbers():
    optimizer = fa.AdamW(parameters())
    train(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for values in saved["state"].values():
        values["step"] = 3
    other = fa.AdamW(clones(optimizer.param_groups[0]["params"]))
    other.load_state_dict(saved)
    assert all_equal(train(other, 3, start=3), train(optimizer, 3, start=3))


def test_calls_before_the_first_gradient_count_and_survive_saving():
    """With interval=3 and two calls without gradients, the first call with gradients ends the interval."""
    for resume in (False, True):
        optimizer = fa.SGD(parameters(), policy=fa.ActiveLR(interval=3, low=0.9, on_zero="shrink"))
        optimizer.step()
        optimizer.step()
        if resume:
            saved = through_disk(optimizer.state_dict())
            optimizer = fa.SGD(parameters(), policy=fa.ActiveLR(interval=3, low=0.9, on_zero="shrink"))
            optimizer.load_state_dict(saved)
        train(optimizer, 1)
        assert optimizer.learning_rates()[0]["max"] == pytest.approx(0.9e-3)


def test_capturable_and_fused_keep_counts_on_the_parameters_device():
    for flag in ("capturable", "fused"):
        meta = torch.zeros(3, device="meta", requires_grad=True)
        spec = fa.AdamW.backbone.state_spec({"amsgrad": False})["step"]
        assert spec.device_for(meta, {flag: True}).type == "meta"
        assert spec.device_for(meta, {}).type == "cpu"


@pytest.mark.feature("torch.distributed.checkpoint, one process")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # a single process is intended
@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-preconditioned-global", "tlr-times-active"])
@pytest.mark.parametrize("named", [False, True])
def test_torch_distributed_checkpoint_round_trip_in_one_process(policy, named, tmp_path):
    """It creates state by a step with zero gradients and lr 0, and drops unknown entries."""
    model, other = (torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    case = Case("AdamW", policy, True)
    first, second = (case.build(m.named_parameters() if named else m.parameters()) for m in (model, other))
    train(first, 4)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    checkpoint = {"optimizer": dcp_state.get_optimizer_state_dict(model, first)}
    save(checkpoint, checkpoint_id=tmp_path, no_dist=True)
    loaded = {"optimizer": dcp_state.get_optimizer_state_dict(other, second)}
    load(loaded, checkpoint_id=tmp_path, no_dist=True)
    dcp_state.set_optimizer_state_dict(other, second, loaded["optimizer"])
    assert second.param_groups[0]["policy"] == first.param_groups[0]["policy"]
    assert all_equal(train(second, 5, start=4), train(first, 5, start=4))


@pytest.mark.gpu
@every_case
def test_resume_across_devices(case):
    params = [p.detach().cuda().requires_grad_() for p in parameters(torch.float32)]
    optimizer = case.build(params)
    grads = Gradients()
    for step in range(5):
        shadow = parameters(torch.float32)
        grads.set(shadow, step)
        for p, q in zip(params, shadow, strict=True):
            assert q.grad is not None
            p.grad = q.grad.cuda()
        optimizer.step()
    other = case.build([p.detach().cpu().requires_grad_() for p in params])
    other.load_state_dict(through_disk(optimizer.state_dict()))
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        for name, value in optimizer.state[p].items():
            assert other.state[q][name].device.type == "cpu"
            assert torch.equal(other.state[q][name], value.cpu())


def test_all_cases_have_distinct_checkpoints():
    """Hyperparameters and policies in checkpoints differ between any two cases."""
    plain = [str(case.build(parameters()).param_groups[0]["policy"]) for case in CASES if case.optimizer == "SGD"]
    assert len(set(plain)) == len({case.policy for case in CASES if case.optimizer == "SGD"})
