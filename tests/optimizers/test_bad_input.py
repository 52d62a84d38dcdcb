"""Bad input raises an error that names the cause and the remedy, before anything is modified."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.core.checks import check_gradient

from ..common.cases import BACKENDS, Gradients, parameters, state_of, train

NAN = math.nan
ACTIVE = fa.ActiveLR(interval=2)

BAD_HYPERPARAMETERS: list[tuple[type, dict[str, Any], str]] = [
    (fa.AdamW, {"lr": -1e-3}, "lr must be finite and >= 0, got -0.001"),
    (fa.AdamW, {"lr": NAN}, "lr must be finite"),
    (fa.SGD, {"lr": NAN}, "lr must be finite"),
    (fa.SGD, {"lr": math.inf}, "lr must be finite"),
    (fa.AdamW, {"lr": torch.tensor([0.1, 0.2])}, "one element"),
    (fa.AdamW, {"lr": torch.tensor(NAN)}, "lr must be finite"),
    (fa.AdamW, {"betas": (1.0, 0.999)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    (fa.RAdam, {"betas": (0.9, -0.1)}, r"betas\[1\]"),
    (fa.AdaBelief, {"betas": (0.9, NAN)}, r"betas\[1\]"),
    (fa.AdamW, {"betas": (0.9,)}, "pair"),
    (fa.AdamW, {"betas": 0.9}, "betas must be a pair of numbers, got 0.9"),
    (fa.AdamW, {"eps": -1e-8}, "eps must be"),
    (fa.AdamW, {"eps": NAN}, "eps must be"),
    (fa.AdamW, {"weight_decay": -0.1}, "weight_decay must be"),
    (fa.SGD, {"weight_decay": NAN}, "weight_decay must be"),
    (fa.SGD, {"momentum": -0.9}, "momentum must be"),
    (fa.NAdam, {"momentum_decay": -0.1}, "momentum_decay must be"),
    (fa.NAdam, {"momentum_decay": NAN}, "momentum_decay must be"),
    (fa.SGD, {"momentum": 0.9, "dampening": NAN}, "dampening must be"),
    (fa.SGD, {"nesterov": True}, "nesterov=True needs momentum > 0"),
    (fa.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening = 0"),
    *[
        (cls, {"differentiable": True}, "differentiable=True is not supported")
        for cls in (fa.SGD, fa.AdamW, fa.RAdam, fa.NAdam)
    ],
]


@pytest.mark.parametrize(("cls", "arguments", "message"), BAD_HYPERPARAMETERS)
@pytest.mark.parametrize("where", ["constructor", "group", "added group"])
def test_bad_hyperparameters(cls, arguments, message, where):
    params = parameters()
    if where == "constructor":
        with pytest.raises(ValueError, match=message):
            cls(params, **arguments)
    elif where == "group":
        with pytest.raises(ValueError, match=message):
            cls([{"params": params, **arguments}])
    else:
        optimizer = cls(params[:2])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": params[2:], **arguments})
        assert len(optimizer.param_groups) == 1


def test_hyperparameters_that_are_not_numbers():
    with pytest.raises(TypeError, match="lr must be a number, got 'fast'"):
        fa.AdamW(parameters(), lr="fast")  # type: ignore[arg-type]


BAD_POLICIES: list[tuple[Any, type[Exception], str]] = [
    (lambda: fa.ActiveLR(), TypeError, "needs interval=.*steps_per_epoch"),
    (lambda: fa.TrainableLR(), TypeError, "needs interval="),
    (lambda: fa.ActiveLR(interval=0), ValueError, "interval must be at least 1, got 0"),
    (lambda: fa.TrainableLR(interval=-3), ValueError, "at least 1"),
    (lambda: fa.ActiveLR(interval=2.5), TypeError, "must be an int or None"),  # type: ignore[arg-type]
    (lambda: fa.ActiveLR(interval=True), ValueError, "at least 1, got True"),
    (lambda: fa.ActiveLR(interval=1, low=0.0), ValueError, r"low must be in \(0, 1\]"),
    (lambda: fa.ActiveLR(interval=1, low=1.1), ValueError, "low must be"),
    (lambda: fa.ActiveLR(interval=1, low=NAN), ValueError, "low must be"),
    (lambda: fa.ActiveLR(interval=1, high=-0.1), ValueError, "high must be"),
    (lambda: fa.ActiveLR(interval=1, high=NAN), ValueError, "high must be"),
    (lambda: fa.ActiveLR(interval=1, on_zero="skip"), ValueError, "'hold' or 'shrink'"),
    (lambda: fa.ActiveLR(interval=1, gain_bounds=(1.5, 2.0)), ValueError, "lo <= 1 <= hi"),
    (lambda: fa.ActiveLR(interval=1, gain_bounds=(0.5, NAN)), ValueError, "lo <= 1 <= hi"),
    (lambda: fa.ActiveLR(interval=1, gain_bounds=2.0), TypeError, "must be a pair"),
    (lambda: fa.ActiveLR(interval=1, gain_bounds=(0.5, 1.0, 2.0)), TypeError, "must be a pair"),
    (lambda: fa.ActiveLR(interval=1, high="much"), TypeError, "high must be a number, got 'much'"),
    (lambda: fa.ActiveAdamW(parameters()), TypeError, "needs interval=.*steps_per_epoch"),
    (lambda: fa.TrainableLR(interval=1, granularity="element"), ValueError, "'global' or 'tensor'"),
    (lambda: fa.TrainableLR(interval=1, source="loss"), ValueError, "'displacement', 'gradient', 'preconditioned'"),
    (lambda: fa.TrainableLR(interval=1, eta=-1.0), ValueError, "eta must be"),
    (lambda: fa.TrainableLR(interval=1, eta=0.1, source="preconditioned"), ValueError, "not 'preconditioned'"),
    (lambda: fa.TrainableLR(naive=True), ValueError, "needs eta="),
    (lambda: fa.TrainableLR(naive=True, eta=0.1, interval=3), ValueError, "leave interval= out"),
    (lambda: fa.TrainableLR(naive=True, eta=0.1, granularity="tensor"), ValueError, "leave granularity="),
    (lambda: fa.Hypergradient(-1.0), ValueError, "hyper_lr must be"),
    (lambda: fa.Hypergradient(NAN), ValueError, "hyper_lr must be"),
    (lambda: fa.Hypergradient(1e-3, granularity="layer"), ValueError, "'global' or 'tensor'"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD_POLICIES)
def test_bad_policy_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


NAIVE = fa.TrainableLR(naive=True, eta=0.1)
GRADIENT = fa.TrainableLR(interval=2, source="gradient")
BAD_COMBINATIONS: list[tuple[type, dict[str, Any], str]] = [
    (
        fa.AdamW,
        {"policy": fa.TrainableLR(interval=2, source="displacement")},
        "gain would run away; use source='gradient'",
    ),
    (fa.RAdam, {"policy": fa.TrainableLR(interval=2, source="displacement")}, "cannot drive RAdam"),
    (fa.AdaBelief, {"policy": fa.TrainableLR(interval=2, source="displacement")}, "cannot drive AdaBelief"),
    (fa.AdamW, {"policy": NAIVE}, "SGD with momentum=0 and weight_decay=0 only"),
    (fa.SGD, {"policy": NAIVE, "momentum": 0.9}, "momentum=0"),
    (fa.SGD, {"policy": NAIVE, "weight_decay": 0.1}, "weight_decay=0"),
    (fa.SGD, {"policy": (ACTIVE, ACTIVE)}, "do not go together: ActiveLR, ActiveLR"),
    (fa.SGD, {"policy": (ACTIVE, fa.Hypergradient(1e-3))}, "do not go together: ActiveLR, Hypergradient"),
    (fa.SGD, {"policy": (GRADIENT, fa.Hypergradient(1e-3))}, "do not go together"),
    (fa.SGD, {"policy": (ACTIVE, fa.FixedLR())}, "do not go together"),
    (fa.SGD, {"policy": (ACTIVE, GRADIENT, GRADIENT)}, "do not go together"),
    (fa.SGD, {"policy": ()}, "do not go together"),
    (fa.SGD, {"policy": (ACTIVE, fa.TrainableLR(interval=2, source="displacement"))}, "use source='gradient'"),
    (fa.AdamW, {"policy": (ACTIVE, fa.TrainableLR(interval=2, source="preconditioned"))}, "use source='gradient'"),
    (fa.SGD, {"policy": (ACTIVE, NAIVE)}, "naive=False"),
    (fa.SGD, {"policy": {"name": "Magic"}}, "unknown policy 'Magic': known are FixedLR, ActiveLR"),
    (fa.SGD, {"backend": "tpu"}, "unknown backend 'tpu': choose 'auto' or one of 'native', 'triton', 'reference'"),
]


@pytest.mark.parametrize(("cls", "arguments", "message"), BAD_COMBINATIONS)
def test_bad_combinations(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(parameters(), **arguments)
    if "policy" in arguments:
        with pytest.raises(ValueError, match=message):
            cls([{"params": parameters(), **arguments}])


def test_combinations_that_are_allowed_resolve_their_source():
    sources = {
        optimizer: optimizer(parameters(), policy=fa.TrainableLR(interval=2)).param_groups[0]["policy"]["source"]
        for optimizer in (fa.SGD, fa.AdamW, fa.RAdam, fa.NAdam, fa.AdaBelief)
    }
    assert {optimizer for optimizer, source in sources.items() if source == "displacement"} == {fa.SGD}
    assert {source for optimizer, source in sources.items() if optimizer is not fa.SGD} == {"gradient"}
    together = fa.SGD(parameters(), policy=(ACTIVE, fa.TrainableLR(interval=2))).param_groups[0]["policy"]
    assert together[1]["source"] == "gradient"


def test_values_that_are_not_policies():
    with pytest.raises(TypeError, match="policy must be one of FixedLR, ActiveLR"):
        fa.AdamW(parameters(), policy="active")
    with pytest.raises(TypeError, match="policy must be one of"):
        fa.AdamW(parameters(), policy=fa.ActiveLR)


def test_the_naive_variant_needs_all_parameters_in_one_policy():
    params = parameters()
    with pytest.raises(ValueError, match="all param groups must have that same policy"):
        fa.SGD([{"params": params[:2], "policy": NAIVE}, {"params": params[2:]}])
    optimizer = fa.SGD(params[:2], policy=NAIVE)
    with pytest.raises(ValueError, match="all param groups"):
        optimizer.add_param_group({"params": params[2:], "policy": ACTIVE})
    assert len(optimizer.param_groups) == 1


def test_bad_parameters():
    p = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="empty parameter list"):
        fa.AdamW([])
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(3,\) is the same tensor as parameter 0"):
        fa.AdamW([p, p])
    with pytest.raises(ValueError, match="same tensor"):
        fa.AdamW([("a", p), ("b", p)])
    with pytest.raises(ValueError, match="more than one parameter group"):
        fa.AdamW([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError, match="iterable"):
        fa.AdamW(p)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ordered"):
        fa.AdamW([{"params": {p}}])
    with pytest.raises(ValueError, match="non-leaf"):
        fa.AdamW([p * 2])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        fa.AdamW([1.0])  # type: ignore[list-item]
    optimizer = fa.AdamW([p])
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([p])  # type: ignore[arg-type]


# ---- gradients, at step() ----


def sparse(p: torch.Tensor) -> None:
    p.grad = torch.zeros_like(p).to_sparse()


def wrong_shape(p: torch.Tensor) -> None:
    p.grad = torch.zeros_like(p)
    p.data = torch.zeros(2, 2, dtype=p.dtype)


BAD_GRADIENTS = {
    "sparse": (sparse, r"gradient of parameter 2 of shape \(3, 5\) is sparse .*sparse=False"),
    "shape": (wrong_shape, r"parameter 2 of shape \(2, 2\) has shape \(3, 5\)"),
}


def snapshot(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = [p for group in optimizer.param_groups for p in group["params"] if p.device.type == "cpu"]
    return [value.detach().clone() for value in [*values, *state_of(optimizer).values()]]


@pytest.mark.feature("bad gradients are refused before anything changes")
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.parametrize("steps", [0, 3])
def test_bad_gradients(kind, steps):
    """The bad gradient is the last of three: the parameters before it must not change."""
    spoil, message = BAD_GRADIENTS[kind]
    params = parameters(shapes=[(4,), (2,), (3, 5)])
    optimizer = fa.AdamW(params, policy=ACTIVE)
    train(optimizer, steps)
    Gradients().set(params, steps)
    spoil(params[2])
    before, names = snapshot(optimizer), list(state_of(optimizer))
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert list(state_of(optimizer)) == names
    assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer), before, strict=True))


def test_gradient_on_another_device():
    """torch permits this with ``p.data = p.data.cuda()``. Without a GPU, a substitute for the parameter is used."""
    stand_in = SimpleNamespace(
        grad=torch.zeros(3, device="meta"), dtype=torch.float32, shape=(3,), device=torch.device("cpu")
    )
    with pytest.raises(
        RuntimeError, match=r"parameter 4 of shape \(3,\) is on meta and the parameter on cpu: move the"
    ):
        check_gradient(4, cast(torch.Tensor, stand_in))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["betas", "eps", "momentum_decay", "weight_decay", "maximize", "lr"])
def test_a_group_that_has_lost_an_option(name, backend):
    optimizer = fa.ActiveNAdam([{"params": parameters()}, {"params": parameters(seed=1)}], interval=2, backend=backend)
    train(optimizer, 3)
    lost, before = optimizer.param_groups[1].pop(name), snapshot(optimizer)
    Gradients().set([p for group in optimizer.param_groups for p in group["params"]], 3)
    for call in (optimizer.step, optimizer.end_interval):
        with pytest.raises(KeyError, match=f"param group 1 has lost '{name}': set it again"):
            call()
    assert all(map(torch.equal, snapshot(optimizer), before))
    optimizer.param_groups[1][name] = lost
    optimizer.step()
    assert not all(map(torch.equal, snapshot(optimizer), before))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("momentum_decay", -1e4, "momentum_decay must be finite and >= 0, got -10000"),  # its powers overflow
        ("betas", (1.0, 0.999), r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ("betas", (0.9, 1.5), r"betas\[1\] must be in \[0, 1\), got 1.5"),
        ("weight_decay", NAN, "weight_decay must be finite and >= 0, got nan"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_that_is_set_out_of_its_range(backend, name, value, message):
    optimizer = fa.NAdam([{"params": parameters()}, {"params": parameters(seed=1)}], backend=backend)
    train(optimizer, 3)
    optimizer.param_groups[1][name] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before))


@pytest.mark.gpu
def test_gradient_left_on_the_cpu():
    p = torch.ones(3, requires_grad=True)
    optimizer = fa.SGD([p], lr=0.1)
    p.grad = torch.ones(3)
    p.data = p.data.cuda()
    with pytest.raises(RuntimeError, match="is on cpu and the parameter on cuda"):
        optimizer.step()


@pytest.mark.parametrize(("dtype", "message"), [(torch.complex64, r"view_as_real"), (torch.int32, "leave it out")])
def test_gradients_that_are_not_floating_point(dtype, message):
    good = torch.ones(2, requires_grad=True)
    bad = torch.zeros(3, dtype=dtype, requires_grad=dtype.is_complex)
    optimizer = fa.SGD([good, bad], lr=0.1)
    good.grad, bad.grad = torch.ones(2), torch.zeros(3, dtype=dtype)
    with pytest.raises(RuntimeError, match=rf"parameter 1 of shape \(3,\) is {dtype}.*{message}"):
        optimizer.step()
    assert good.tolist() == [1.0, 1.0]


def test_named_parameters_are_named_in_errors():
    layer = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = fa.AdamW(layer.named_parameters())
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 \(weight\) of shape \(4, 2\)"):
        optimizer.step()


# ---- checkpoints ----


def spoiled(name: str) -> tuple[dict[str, Any], str]:
    optimizer = fa.AdamW(parameters(), policy=ACTIVE)
    train(optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"]
    if name == "missing policy state":
        del state[1]["grad_sum"]
        return saved, r"parameter 1 of shape \(3, 5\) lacks 'grad_sum'"
    if name == "missing backbone state":
        del state[1]["exp_avg"]
        return saved, "lacks 'exp_avg'"
    if name == "wrong shape":
        state[1]["element_gain"] = torch.ones(4)
        return saved, r"'element_gain' of parameter 1 of shape \(3, 5\) has shape \(4,\) instead of \(3, 5\)"
    if name == "scalar of wrong shape":
        state[1]["active_step"] = torch.ones(4)
        return saved, r"'active_step' .* instead of \(\)"
    if name == "no tensor":
        state[1]["exp_avg"] = {}
        return saved, r"'exp_avg' of parameter 1 .* is no tensor but \{\}"
    if name == "groups":
        saved["param_groups"] *= 2
        return saved, "2 parameter groups, the optimizer has 1"
    if name == "sizes":
        saved["param_groups"][0]["params"].pop()
        return saved, "5 parameters in group 0, the optimizer has 6"
    if name == "policy":
        saved["param_groups"][0]["policy"]["increment"] = -1.0
        return saved, "policy in group 0 .* increment must be"
    saved["param_groups"][0]["differentiable"] = True
    return saved, "differentiable=True"


SPOILED = [
    "missing policy state",
    "missing backbone state",
    "wrong shape",
    "scalar of wrong shape",
    "no tensor",
    "groups",
    "sizes",
    "policy",
    "differentiable",
]


@pytest.mark.parametrize("name", SPOILED)
def test_bad_checkpoints(name):
    saved, message = spoiled(name)
    optimizer = fa.AdamW(parameters(), policy=ACTIVE)
    train(optimizer, 2)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer), before, strict=True))
    assert optimizer.state_dict()["param_groups"] == groups
    train(optimizer, 2)


def test_a_checkpoint_of_another_optimizer_is_refused():
    sgd = torch.optim.SGD(parameters(), momentum=0.9)
    train(sgd, 1)
    with pytest.raises(ValueError, match="lacks 'step': it was saved by another optimizer"):
        fa.AdamW(parameters()).load_state_dict(sgd.state_dict())


# ---- valid input ----


@pytest.mark.parametrize("policy", [None, ACTIVE, fa.TrainableLR(interval=2), GRADIENT, fa.Hypergradient(1e-3)])
def test_warm_up_from_zero_is_valid(policy):
    if getattr(policy, "source", None) is None and isinstance(policy, fa.TrainableLR):
        optimizer: fa.AdaptiveOptimizer = fa.SGD(parameters(), lr=0.0, policy=policy)
    else:
        optimizer = fa.AdamW(parameters(), lr=0.0, policy=policy)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    params = train(optimizer, 5)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.param_groups[0]["lr"] = 0.01
    train(optimizer, 5, start=5)
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], before[0])
