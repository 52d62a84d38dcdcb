"""The interface of ``torch.optim.Optimizer``: signatures, hooks, closures, groups, schedulers, copies."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

import fused_adaptive as fa

from ..common.cases import BACKENDS, POLICIES, Gradients, all_equal, parameters, state_of, train

NAMESAKES = [(getattr(fa, n), getattr(torch.optim, n)) for n in ("SGD", "Adam", "AdamW", "RAdam", "NAdam")]
KINDS = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@pytest.mark.parametrize(("ours", "theirs"), NAMESAKES)
def test_arguments_have_the_defaults_and_positions_of_torchs_optimizer(ours, theirs):
    mine, torchs = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    for name, parameter in torchs.items():
        assert name in mine, name
        assert mine[name].default == parameter.default, name
    positional = [name for name, p in torchs.items() if p.kind in KINDS]
    assert [name for name, p in mine.items() if p.kind in KINDS] == positional
    assert {"policy", "backend", "capturable", "decoupled_weight_decay", "fused"} <= mine.keys()


def test_adabelief_has_the_defaults_and_order_of_the_authors_package():
    signature = inspect.signature(fa.AdaBelief).parameters
    assert [n for n, p in signature.items() if p.kind in KINDS] == [
        "params",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "amsgrad",
    ]
    defaults = {n: signature[n].default for n in ("lr", "betas", "eps", "weight_decay", "amsgrad", "rectify")}
    assert defaults == {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-16,
        "weight_decay": 0,
        "amsgrad": False,
        "rectify": True,
    }
    assert signature["decoupled_weight_decay"].default is True


@pytest.mark.parametrize(("ours", "theirs"), NAMESAKES)
def test_param_groups_have_torchs_keys(ours, theirs):
    mine, torchs = ours(parameters()).param_groups[0], theirs(parameters()).param_groups[0]
    assert torchs.keys() <= mine.keys()
    assert all(mine[key] == value for key, value in torchs.items() if key != "params")
    assert isinstance(ours(parameters()), torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RAdam", "NAdam", "AdaBelief"])
def test_names_from_the_papers_are_the_optimizers_with_activelr(name):
    active, plain = getattr(fa, f"Active{name}"), getattr(fa, name)
    one = active(parameters(), 0.03, interval=2, high=0.2, low=0.7, weight_decay=0.1)
    two = plain(parameters(), 0.03, weight_decay=0.1, policy=fa.ActiveLR(interval=2, high=0.2, low=0.7))
    assert all_equal(train(one, 9), train(two, 9))
    assert isinstance(one, plain)
    assert fa.ActiveBelief is fa.ActiveAdaBelief
    with pytest.raises(TypeError, match=f"use {name}"):
        active(parameters(), interval=2, policy=fa.FixedLR())


def test_names_from_the_papers_show_their_arguments():
    arguments = inspect.signature(fa.ActiveAdamW).parameters
    expected = inspect.signature(fa.AdamW).parameters.keys() - {"policy"}
    assert expected | {"interval", "increment", "high", "low", "on_zero", "gain_bounds"} == arguments.keys()


def test_the_profiler_names_the_step():
    optimizer = fa.AdamW(parameters(), policy=fa.ActiveLR(interval=2))
    with torch.profiler.profile() as profile:
        train(optimizer, 1)
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-preconditioned-tensor", "hypergradient-global"])
def test_torch_compile_around_the_step_changes_nothing(policy):
    """There are graph breaks where the reference reads scalars."""
    compiled, eager = (fa.SGD(parameters(), lr=0.1, momentum=0.9, policy=POLICIES[policy]) for _ in range(2))
    step = torch.compile(compiled.step, backend="eager")
    for i in range(5):
        Gradients().set(compiled.param_groups[0]["params"], i)
        step()
    assert all_equal(compiled.param_groups[0]["params"], train(eager, 5))


@pytest.mark.feature("closures")
def test_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned():
    p = torch.tensor([2.0], requires_grad=True)
    optimizer, calls = fa.SGD([p], lr=0.1), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 4.0
    assert calls == [True]
    assert p.item() == pytest.approx(1.6)


@pytest.mark.feature("hooks of step() and state_dict()")
def test_hooks_are_called_around_the_step_and_around_the_state_dict():
    optimizer, seen = fa.AdamW(parameters(), policy=fa.ActiveLR(interval=2)), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("loading") or state)
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    train(optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "saving", "saved", "loading", "loaded"]


def test_a_load_hook_may_replace_the_state_dict():
    optimizer = fa.SGD(parameters(), lr=0.5)
    groups = [{**optimizer.state_dict()["param_groups"][0], "lr": 0.25}]
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {**state, "param_groups": groups})
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.feature("maximize")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_maximize_is_minimizing_the_negative(policy):
    ascending = fa.SGD(parameters(), lr=0.1, momentum=0.5, maximize=True, policy=policy)
    descending = fa.SGD(parameters(), lr=0.1, momentum=0.5, policy=policy)
    for step in range(7):
        up, down = (list(o.param_groups[0]["params"]) for o in (ascending, descending))
        Gradients().set(up, step)
        for p, q in zip(up, down, strict=True):
            assert p.grad is not None
            q.grad = -p.grad
        ascending.step()
        descending.step()
    assert all_equal(up, down)


def test_zero_grad_sets_to_none_or_zero():
    optimizer = fa.AdamW(parameters())
    train(optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in optimizer.param_groups[0]["params"])
    optimizer.zero_grad()
    assert all(p.grad is None for p in optimizer.param_groups[0]["params"])


@pytest.mark.feature("add_param_group in the middle")
def test_add_param_group_mid_training_equals_groups_from_the_start():
    """While its gradients are missing, a group that is added late equals one that was there from the start."""
    late = parameters()
    optimizer = fa.AdamW(late[:2], lr=0.01)
    early = parameters()
    reference = fa.AdamW([{"params": early[:2]}, {"params": early[2:], "lr": 0.1}], lr=0.01)
    for step in range(6):
        if step == 3:
            optimizer.add_param_group({"params": late[2:], "lr": 0.1})
        for params, o in ((late, optimizer), (early, reference)):
            Gradients().set(params, step)
            if step < 3:
                for p in params[2:]:
                    p.grad = None
            o.step()
    assert all_equal(late, early)


@pytest.mark.feature("named parameters")
def test_named_parameters_and_their_names_survive():
    model = torch.nn.Linear(3, 2)
    optimizer = fa.AdamW(model.named_parameters(), policy=fa.ActiveLR(interval=2))
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, 3)
    other = fa.AdamW(torch.nn.Linear(3, 2).named_parameters(), policy=fa.ActiveLR(interval=2))
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["param_names"]  # as of parameters that were not named
    other.load_state_dict(saved)
    assert other.learning_rates(per_tensor=True)[0]["tensors"][1]["name"] == "bias"


# ---- schedulers ----

LAMBDA = [lambda epoch: 0.9**epoch]
SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, LAMBDA[0]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda _: 0.95),
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, total_iters=20),
    "LinearLR": lambda o: lrs.LinearLR(o, total_iters=20),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 9),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.9), lrs.ConstantLR(o)]),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=3), lrs.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.001, 0.1, 4),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=4),
}


def test_every_scheduler_of_torch_is_tested():
    exported = {n for n in lrs.__all__ if isinstance(getattr(lrs, n), type)} - {"LRScheduler"}
    assert exported | {"SWALR"} == set(SCHEDULERS)


def drive(optimizer: torch.optim.Optimizer, scheduler: Any, start: int, steps: int) -> None:
    for step in range(start, start + steps):
        train(optimizer, 1, start=step)
        if isinstance(scheduler, lrs.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("cls", ["SGD", "AdamW"])
def test_schedulers_set_the_same_lr_as_with_torchs_optimizers(name, cls):
    arguments = {"momentum": 0.9} if cls == "SGD" else {}
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer = getattr(fa, cls)(ours, lr=0.1, weight_decay=0.1, backend="reference", **arguments)
    reference = getattr(torch.optim, cls)(theirs, lr=0.1, weight_decay=0.1, foreach=False, **arguments)
    mine, torchs = SCHEDULERS[name](optimizer), SCHEDULERS[name](reference)
    drive(optimizer, mine, 0, 10)
    drive(reference, torchs, 0, 10)
    assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"] != 0.1
    assert all_equal(ours, theirs)


@pytest.mark.feature("every torch.optim.lr_scheduler, with an adapting policy")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_and_adapting_policy_resume_together(name):
    """The scheduler sets lr, and the policy sets gains; neither writes the other's."""

    def build(params):
        optimizer = fa.AdamW(params, lr=0.1, policy=fa.ActiveLR(interval=3))
        return optimizer, SCHEDULERS[name](optimizer)

    straight, params = build(parameters()), parameters()
    drive(*straight, 0, 10)
    first = build(params)
    drive(*first, 0, 5)
    second = build([p.detach().clone().requires_grad_() for p in params])
    second[1].load_state_dict(first[1].state_dict())
    second[0].load_state_dict(first[0].state_dict())
    drive(*second, 5, 5)
    assert all_equal(second[0].param_groups[0]["params"], straight[0].param_groups[0]["params"])


def test_onecycle_cycles_momentum_and_betas_while_adapting():
    for cls, key in ((fa.SGD, "momentum"), (fa.AdamW, "betas")):
        optimizer = cls(
            parameters(), lr=0.1, policy=fa.Hypergradient(1e-4), **({"momentum": 0.9} if cls is fa.SGD else {})
        )
        before, scheduler = optimizer.param_groups[0][key], lrs.OneCycleLR(optimizer, 0.1, total_steps=12)
        drive(optimizer, scheduler, 0, 10)
        assert optimizer.param_groups[0][key] != before
        assert all(p.isfinite().all() for p in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("cls", [torch.optim.AdamW, fa.AdamW, fa.ActiveAdamW])
def test_loading_removes_what_a_scheduler_has_left_in_the_groups(cls):
    """Finders of learning rates put the optimizer back; the next scheduler begins at the rate that they found."""
    optimizer = cls(parameters(), lr=0.01, **({"interval": 3} if cls is fa.ActiveAdamW else {}))
    saved = copy.deepcopy(optimizer.state_dict())
    drive(optimizer, lrs.OneCycleLR(optimizer, 5.0, total_steps=12), 0, 2)
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert not {"initial_lr", "max_lr"} & group.keys()
    group["lr"] = 0.2
    lrs.LambdaLR(optimizer, lambda epoch: 1.0)
    assert group["lr"] == 0.2
    train(optimizer, 1)
    assert group.get("lr_ref", 0.2) == 0.2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_that_ends_below_0_steps_and_resumes(backend):
    """torch's optimizers refuse a negative lr in constructors only."""
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    optimizer, reference = fa.AdamW(ours, lr=0.1, backend=backend), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for step, lr in enumerate((0.1, 0.01, -0.02, np.float64(-0.05))):
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = lr
            train(each, 1, start=step)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    other = fa.AdamW(ours, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == -0.05
    other.param_groups[0]["policy"] = fa.ActiveLR(interval=2)
    train(other, 1)
    assert other.param_groups[0]["lr_ref"] == 0


# ---- copies ----


def stream(obj: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), stream])
@pytest.mark.parametrize(
    "policy", ["fixed", "active", "tlr-preconditioned-global", "tlr-times-active", "hypergradient-tensor"]
)
def test_a_copy_is_independent(copier, policy):
    optimizer = fa.AdamW(parameters(), lr=0.01, policy=POLICIES[policy], fused=True, backend="reference")
    train(optimizer, 4)
    twin = copier(optimizer)
    untouched = {name: value.clone() for name, value in state_of(twin).items()}
    ours = train(optimizer, 5, start=4)
    assert all(torch.equal(value, untouched[name]) for name, value in state_of(twin).items())
    assert all_equal(train(twin, 5, start=4), ours)
    assert twin._step_supports_amp_scaling


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), stream])
def test_a_copy_has_every_public_attribute(copier):
    optimizer = fa.AdamW(parameters(), max_grad_norm=0.5, skip_nonfinite=True)
    train(optimizer, 1)
    twin = copier(optimizer)
    public = {name for name in dir(optimizer) if not name.startswith("_") and hasattr(optimizer, name)}
    assert public <= {name for name in dir(twin) if hasattr(twin, name)}
    assert (twin.max_grad_norm, twin.skip_nonfinite, twin.process_group) == (0.5, True, None)
    assert torch.equal(twin.grad_norm, optimizer.grad_norm)
    assert twin.grad_norm is not optimizer.grad_norm


def test_repr_shows_policy_and_hyperparameters():
    text = repr(fa.AdamW(parameters(), policy=fa.ActiveLR(interval=7)))
    assert "ActiveLR" in text
    assert "interval" in text
    assert "weight_decay: 0.01" in text


# ---- learning_rates ----


def test_learning_rates_are_lr_times_gain():
    params = parameters()
    policy = (fa.TrainableLR(interval=2, source="gradient"), fa.ActiveLR(interval=3))
    optimizer = fa.AdamW(
        [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "policy": None}], lr=0.1, policy=policy
    )
    assert optimizer.learning_rates() == [dict.fromkeys(("min", "mean", "max"), lr) for lr in (0.5, 0.1)]
    train(optimizer, 12)
    first, second = optimizer.learning_rates(per_tensor=True)
    gains = [optimizer.state[p]["gain"] * optimizer.state[p]["element_gain"] for p in params[:2]]
    assert second["min"] == second["max"] == 0.1
    for entry, gain, p in zip(first["tensors"], gains, params[:2], strict=True):
        assert entry["numel"] == p.numel()
        assert entry["min"] == pytest.approx(0.5 * gain.min().item())
        assert entry["max"] == pytest.approx(0.5 * gain.max().item())
        assert entry["mean"] == pytest.approx(0.5 * gain.mean().item())
    assert first["mean"] == pytest.approx(0.5 * torch.cat([g.flatten() for g in gains]).mean().item())
    assert "tensors" not in optimizer.learning_rates()[0]
    assert first["min"] < 0.5


def test_a_global_gain_applies_to_a_tensor_that_has_not_moved_yet():
    params = parameters()
    optimizer = fa.SGD(params, lr=0.1, policy=fa.Hypergradient(1e-2))
    for step in range(3):
        Gradients().set(params, step)
        params[0].grad = None
        optimizer.step()
    tensors = optimizer.learning_rates(per_tensor=True)[0]["tensors"]
    assert tensors[0]["mean"] == tensors[1]["mean"] != 0.1
