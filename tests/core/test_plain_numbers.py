"""Numbers from YAML, configuration libraries and numpy: refused at once, or converted to plain ones."""

from __future__ import annotations

import collections.abc
import io
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fused_adaptive as fa

from ..common.cases import BACKENDS, parameters, train, unmoved

YAML = r"YAML reads 1e-3 as a string: write 1\.0e-3"


class Pair(collections.abc.Sequence):
    """A sequence that is not a list, like hydra's ListConfig."""

    def __init__(self, *items: Any) -> None:
        self._items = items

    def __getitem__(self, i: Any) -> Any:
        return self._items[i]

    def __len__(self) -> int:
        return len(self._items)


def loads_safely(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


STRINGS: list[tuple[Any, dict[str, Any]]] = [
    *[(fa.AdamW, {name: "1e-3"}) for name in ("lr", "eps", "weight_decay", "max_grad_norm")],
    *[(fa.SGD, {name: "0.1"}) for name in ("lr", "momentum", "weight_decay")],
    (fa.SGD, {"momentum": 0.9, "dampening": "0.1"}),
    (fa.RAdam, {"betas": ("0.9", 0.99)}),
    (fa.AdaBelief, {"betas": Pair(0.9, "0.99")}),
]


@pytest.mark.parametrize(("cls", "arguments"), STRINGS)
def test_strings_are_refused_as_numbers(cls, arguments):
    with pytest.raises(TypeError, match=YAML):
        cls(parameters(), **arguments)
    if "max_grad_norm" in arguments:
        return
    with pytest.raises(TypeError, match=YAML):
        cls([{"params": parameters(), **arguments}])
    optimizer, params = cls(parameters()[:2]), parameters()[2:]
    group = {"params": params, **arguments}
    with pytest.raises(TypeError, match=YAML):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert group.keys() == {"params", *arguments}


@pytest.mark.parametrize("name", ["nesterov", "maximize", "capturable", "fused", "foreach"])
def test_strings_are_refused_as_flags(name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'false', a string"):
        fa.SGD(parameters(), momentum=0.9, **{name: "false"})
    with pytest.raises(TypeError, match="skip_nonfinite must be True or False"):
        fa.SGD(parameters(), skip_nonfinite="false")  # type: ignore[arg-type]


MODEL = nn.Linear(2, 2)
BUILDS: dict[str, Any] = {
    "ActiveLR high": lambda v: fa.ActiveLR(interval=1, high=v),
    "ActiveLR increment": lambda v: fa.ActiveLR(interval=1, increment=v),
    "ActiveLR low": lambda v: fa.ActiveLR(interval=1, low=v),
    "TrainableLR c": lambda v: fa.TrainableLR(interval=1, c=v),
    "TrainableLR eta": lambda v: fa.TrainableLR(interval=1, eta=v),
    "Hypergradient hyper_lr": lambda v: fa.Hypergradient(v),
    "ASLR min_lr": lambda v: fa.ASLR(fa.SGD(MODEL.parameters(), lr=1.0), min_lr=v),
    "ASLR max_lr": lambda v: fa.ASLR(fa.SGD(MODEL.parameters(), lr=0.5), max_lr=v),
    "AALR lr": lambda v: fa.AALR(fa.SGD(MODEL.parameters()), MODEL, initial_loss=1.0, lr=v),
    "AALR initial_loss": lambda v: fa.AALR(fa.SGD(MODEL.parameters()), MODEL, initial_loss=v),
    "param_groups": lambda v: fa.param_groups(MODEL, v),
}


@pytest.mark.parametrize("name", BUILDS)
def test_policies_and_controllers_accept_numpy_numbers_and_refuse_strings(name):
    with pytest.raises(TypeError, match=r"must be a number, got '0\.5'"):
        BUILDS[name]("0.5")
    for value in (np.float64(0.5), np.float32(0.5), np.array(0.5)):
        made, expected = BUILDS[name](value), BUILDS[name](0.5)
        if isinstance(made, fa.Policy):
            assert made == expected
            assert {type(v) for v in made.arguments().values()} <= {float, int, str, bool, type(None)}
        elif isinstance(made, list):
            assert type(made[0]["weight_decay"]) is float
        else:
            assert str(loads_safely(made.state_dict())) == str(expected.state_dict())


def test_bounds_and_intervals_of_policies():
    with pytest.raises(TypeError, match="gain_bounds must be a pair of numbers"):
        fa.ActiveLR(interval=1, gain_bounds="12")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gain_bounds must be a pair of numbers"):
        fa.ActiveLR(interval=1, gain_bounds=("0.5", "2"))  # type: ignore[arg-type]
    policy = fa.ActiveLR(interval=np.array(3), gain_bounds=np.array([0.5, 2.0]))  # type: ignore[arg-type]
    assert policy == fa.ActiveLR(interval=3, gain_bounds=(0.5, 2.0))
    assert type(policy.interval) is int
    with pytest.raises(TypeError, match="interval must be an int"):
        fa.ActiveLR(interval="3")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["min_lr", "max_lr"])
def test_the_range_test_refuses_strings(name):
    with pytest.raises(TypeError, match=YAML):
        fa.lr_range_test(MODEL, fa.SGD(MODEL.parameters()), [], nn.functional.mse_loss, **{name: "1e-3"})


PAIRS = [
    [0.5, 0.75],
    Pair(0.5, 0.75),
    np.array([0.5, 0.75]),
    torch.tensor([0.5, 0.75]),
    (np.float32(0.5), torch.tensor(0.75)),
]


@pytest.mark.parametrize("betas", PAIRS, ids=lambda pair: type(pair).__name__)
def test_a_pair_becomes_a_plain_tuple(betas):
    optimizer = fa.AdamW(parameters()[:2], betas=betas)
    optimizer.add_param_group({"params": parameters()[2:], "betas": betas})
    for group in optimizer.param_groups:
        assert group["betas"] == (0.5, 0.75)
        assert [type(beta) for beta in group["betas"]] == [float, float]
        assert type(group["betas"]) is tuple


def test_an_omegaconf_list_becomes_a_plain_tuple():
    omegaconf = pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"betas": [0.5, 0.75]})
    assert fa.Adam(parameters(), betas=config.betas).param_groups[0]["betas"] == (0.5, 0.75)


@pytest.mark.parametrize("betas", [{0.5, 0.75}, {"a": 0.5, "b": 0.75}, "ab", (0.5, 0.75, 0.9), np.array(0.5)])
def test_betas_that_are_not_a_pair_are_refused(betas):
    with pytest.raises(ValueError, match="betas must be a pair of numbers"):
        fa.AdamW(parameters(), betas=betas)


NUMPY = {"float64": np.float64, "float32": np.float32, "0-dim": np.array, "longdouble": np.longdouble}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", NUMPY)
def test_numpy_numbers_are_plain_in_groups_and_checkpoints(kind, backend):
    number = NUMPY[kind]
    optimizer = fa.SGD(
        [{"params": parameters(torch.float32), "weight_decay": number(0.25)}],
        lr=number(0.5),
        momentum=number(0.5),
        nesterov=np.True_,  # type: ignore[arg-type]
        max_grad_norm=number(2.0),
        policy=fa.ActiveLR(interval=2, high=0.1),
        backend=backend,
    )
    group = optimizer.param_groups[0]
    assert [type(group[name]) for name in ("lr", "momentum", "weight_decay")] == [float] * 3
    assert group["nesterov"] is True
    assert type(optimizer.max_grad_norm) is float
    train(optimizer, 1)
    momentum = number(0.25) if kind != "0-dim" else 0.25
    group.update(lr=number(1.0), momentum=momentum, initial_lr=number(1.0))  # as a manual schedule
    train(optimizer, 1, start=1)
    assert group["lr_ref"] == 1.0
    saved = loads_safely(optimizer.state_dict())["param_groups"][0]
    assert (saved["lr"], saved["momentum"], saved["initial_lr"]) == (1.0, 0.25, 1.0)


def test_tuples_and_policies_set_by_hand_are_plain_in_checkpoints():
    optimizer = fa.AdamW(parameters(), policy=fa.ActiveLR(interval=2))
    optimizer.param_groups[0]["betas"] = (np.float64(0.5), 0.75)
    optimizer.param_groups[0]["policy"]["low"] = np.float64(0.5)
    train(optimizer, 1)
    saved = loads_safely(optimizer.state_dict())["param_groups"][0]
    assert saved["betas"] == (0.5, 0.75)
    assert saved["policy"]["low"] == 0.5


def test_other_numbers_become_floats_and_tensors_stay():
    lr = torch.tensor(0.5)
    optimizer = fa.AdamW(parameters(), lr=lr, eps=Decimal("0.125"), weight_decay=np.int64(0))  # type: ignore[arg-type]
    group = optimizer.param_groups[0]
    assert group["lr"] is lr
    assert type(group["eps"]) is float
    assert type(group["weight_decay"]) is int
    optimizer.state_dict()
    assert group["lr"] is lr


SET_BY_HAND = [Decimal("0.5"), Fraction(1, 2), np.array(0.5), np.array([0.5]), np.float32(0.5)]


@pytest.mark.parametrize("value", SET_BY_HAND, ids=lambda value: type(value).__name__)
def test_a_number_set_by_hand_is_plain_in_a_checkpoint_without_a_step(value):
    optimizer = fa.AdamW(parameters())
    optimizer.param_groups[0].update(lr=value, initial_lr=value)
    saved = loads_safely(optimizer.state_dict())["param_groups"][0]
    assert (saved["lr"], saved["initial_lr"]) == (0.5, 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", SET_BY_HAND, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
def test_a_number_set_by_hand_counts_as_a_float(name, value, backend):
    params, others = parameters(), parameters()
    for ps, number in ((params, value), (others, 0.5)):
        optimizer = fa.ActiveSGD(ps, lr=0.1, momentum=0.9, interval=1, backend=backend)
        train(optimizer, 1)
        optimizer.param_groups[0][name] = number
        train(optimizer, 3, start=1)
        saved = loads_safely(optimizer.state_dict())["param_groups"][0]
        assert type(saved[name]) is float
        assert saved["lr_ref"] == (0.5 if name == "lr" else 0.1)
    assert all(map(torch.equal, params, others))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("cls", "name"), [(fa.AdamW, "eps"), (fa.SGD, "momentum"), (fa.SGD, "lr"), (fa.NAdam, "eps")])
def test_a_string_set_by_hand_is_refused_before_anything_moves(cls, name, backend):
    params = parameters()
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], backend=backend)
    train(optimizer, 2)
    optimizer.param_groups[1][name] = "0.25"
    message = rf"{name} must be a number, got '0.25', a string"
    with unmoved(params), pytest.raises(TypeError, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eps", "1e-8", "eps must be a number, got '1e-8'"),
        ("lr", None, "lr must be a number, got None"),
        ("lr", torch.ones(2), "lr as a tensor must have one element"),
        ("weight_decay", -1.0, "weight_decay must be finite and >= 0"),
    ],
)
def test_a_checkpoint_with_a_bad_number_is_refused(name, value, message):
    optimizer = fa.AdamW(parameters())
    train(optimizer, 1)
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=f"group 0 of the loaded state dict is not usable: {message}"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("backend", BACKENDS)
def test_betas_without_an_order_are_refused_when_set_by_hand(backend):
    optimizer = fa.AdamW(parameters(), backend=backend)
    optimizer.param_groups[0]["betas"] = {0.9, 0.99}
    with pytest.raises(ValueError, match="betas must be a pair of numbers"):
        train(optimizer, 1)
