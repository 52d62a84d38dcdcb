"""Optimizers as frameworks use them: subclasses, handles with a copy of ``__dict__``, wrappers."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import fused_adaptive as fa
from fused_adaptive.integrations import unwrap

from ..common.cases import all_equal, parameters, train

ACTIVE = [fa.ActiveSGD, fa.ActiveAdam, fa.ActiveAdamW, fa.ActiveRAdam, fa.ActiveAdaBelief]


class Writer:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.steps += [step] if tag.endswith("mean") else []


# ---- handles: how Lightning, Fabric, Accelerate and users make them ----


def copied(optimizer: Any) -> Any:
    """As in Lightning before 2.0 and in Fabric: an object of a new subclass with a copy of ``__dict__``."""
    handle = object.__new__(type("Copied" + type(optimizer).__name__, (type(optimizer),), {}))
    handle.__dict__ = dict(optimizer.__dict__)
    return handle


class _Forwards:
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Forwarding", (type(self), type(optimizer)), {})  # pyright: ignore

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def subclass_without_init(optimizer: Any) -> Any:
    def step(self: Any, closure: Any = None) -> Any:
        return self.base.step(closure)

    def init(self: Any, base: Any) -> None:
        self.base = base

    return type("Holding", (type(optimizer),), {"__init__": init, "step": step})(optimizer)


def fabric(optimizer: Any) -> Any:
    lightning = pytest.importorskip("lightning.fabric")
    return lightning.Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


HANDLES = {"copied": copied, "forwards": _Forwards, "without init": subclass_without_init, "fabric": fabric}


class Wrapper(torch.optim.Optimizer):
    """As in Accelerate: an optimizer by class, whose constructor is never called."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class SharesGroups(torch.optim.Optimizer):
    """As in wrappers of sharpness-aware minimization: an optimizer with the param groups of another."""

    def __init__(self, base: Any) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base_optimizer = base

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)


WRAPPERS = {"wrapper": Wrapper, "wrapper of a wrapper": lambda o: Wrapper(Wrapper(o)), "shares groups": SharesGroups}


@pytest.mark.parametrize("name", HANDLES)
def test_attributes_and_calls_of_a_handle_reach_the_optimizer(name):
    optimizer = fa.ActiveAdamW(parameters(torch.float32), lr=0.01, interval=3)
    handle = HANDLES[name](optimizer)
    assert unwrap(handle) is optimizer
    handle.max_grad_norm = 0.5
    assert optimizer.max_grad_norm == 0.5
    with pytest.raises(TypeError, match="max_grad_norm must be a number"):
        handle.max_grad_norm = "1.0"
    train(handle, 1)
    assert handle.grad_norm is optimizer.grad_norm is not None
    for p in optimizer.state:
        assert optimizer.state[p]["active_step"] == 1
    handle.end_interval()
    train(optimizer, 1, start=1)
    handle.restart_interval()
    assert all(state["active_step"] == 0 for state in optimizer.state.values())
    assert handle.learning_rates() == optimizer.learning_rates()


@pytest.mark.parametrize("name", HANDLES)
def test_a_handle_works_after_a_checkpoint_is_loaded(name):
    optimizer, saved = (fa.ActiveAdamW(parameters(), lr=0.01, interval=3) for _ in range(2))
    handle = HANDLES[name](optimizer)
    train(saved, 2)
    optimizer.load_state_dict(saved.state_dict())
    assert handle.param_groups[0] is optimizer.param_groups[0]
    assert len(handle.state) == len(optimizer.state) > 0
    handle.load_state_dict(saved.state_dict())
    assert handle.param_groups[0] is optimizer.param_groups[0]


def test_grad_scaler_reaches_the_step_through_a_handle():
    p = nn.Parameter(torch.ones(3))
    optimizer = fa.SGD([p], lr=0.5, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    scaler.step(_Forwards(optimizer))  # type: ignore[arg-type]
    assert p.tolist() == [0.5] * 3
    assert not hasattr(optimizer, "grad_scale")


@pytest.mark.parametrize("name", [*HANDLES, *WRAPPERS])
def test_helpers_act_on_the_wrapped_optimizer(name):
    model, writer = nn.Linear(3, 2), Writer()
    optimizer = fa.ActiveSGD(model.parameters(), lr=0.1, interval=2, increment=0.01)
    handle = {**HANDLES, **WRAPPERS}[name](optimizer)
    logger = fa.log_learning_rates(handle, writer)
    aslr = fa.ASLR(handle)
    assert optimizer._random_rates is not None
    with pytest.raises(RuntimeError, match="driven by ASLR already"):
        fa.AALR(optimizer, model, initial_loss=1.0)
    for _ in range(4):
        model(torch.ones(1, 3)).sum().backward()
        handle.step()
    assert (logger.steps, writer.steps) == (4, [2, 4])
    assert int(optimizer._random_rates.step) == 4
    optimizer.end_interval()
    assert writer.steps == [2, 4, 4]
    aslr.remove()
    assert optimizer._random_rates is None
    aalr = fa.AALR(handle, model, initial_loss=1.0)
    assert aalr.optimizer is optimizer
    aalr.remove()
    optimizer.zero_grad()
    release = fa.release_gradients(model, handle)
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is None
    assert not torch.equal(model.weight, before)
    handle.step()
    release.remove()


def test_accelerates_wrapper_is_unwrapped():
    accelerate = pytest.importorskip("accelerate")
    optimizer = fa.ActiveAdamW(parameters(), lr=0.01, interval=3)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert fa.ASLR(prepared).optimizer is optimizer
    assert fa.log_learning_rates(prepared, Writer())._optimizer is optimizer


def test_a_wrapper_of_torchs_optimizer_is_unwrapped():
    p = nn.Parameter(torch.ones(2))
    inner = torch.optim.SGD([p], lr=0.1)
    wrapper = Wrapper(inner)
    aslr = fa.ASLR(wrapper)
    p.grad = torch.ones(2)
    wrapper.step()
    assert aslr.optimizer is inner
    assert aslr.state_dict()["n"] == 1


@pytest.mark.parametrize("base", [torch.optim.Optimizer, fa.AdamW])
def test_an_optimizer_whose_constructor_was_never_called_is_refused(base):
    broken = type("Broken", (base,), {"__init__": lambda self: None})()
    model: Any = nn.Linear(2, 2)
    attempts: list[Any] = [
        lambda: fa.ASLR(broken),
        lambda: fa.AALR(broken, model, initial_loss=1.0),
        lambda: fa.log_learning_rates(broken, Writer()),
        lambda: unwrap(broken),
    ]
    if base is fa.AdamW:
        attempts += [broken.step, broken.end_interval, broken.learning_rates, broken.state_dict]
    for attempt in attempts:
        with pytest.raises(TypeError, match=r"has not called super\(\).__init__\(\).*integrations.unwrap"):
            attempt()


# ---- subclasses ----


@pytest.mark.parametrize("cls", ACTIVE)
def test_subclasses_of_any_depth_step_like_their_base_class(cls):
    class Mixin:
        pass

    deep: Any = type("Deep", (type("Made", (Mixin, cls), {}),), {})
    assert inspect.signature(deep) == inspect.signature(cls)
    one, two = (c(parameters(), lr=0.01, interval=2, high=0.1) for c in (cls, deep))
    assert all_equal(train(one, 5), train(two, 5))
    plain = cls.__name__.removeprefix("Active")
    with pytest.raises(TypeError, match=rf"Deep brings its own policy: use {plain}\(policy"):
        deep(parameters(), interval=2, policy=None)


def test_a_subclass_with_other_arguments_shows_them():
    class Mine(fa.ActiveAdamW):
        def __init__(self, params: Any, epochs: int) -> None:
            super().__init__(params, interval=epochs)

    assert list(inspect.signature(Mine).parameters) == ["params", "epochs"]
    assert Mine(parameters(), 3).param_groups[0]["policy"]["interval"] == 3


def test_an_optimizer_can_be_built_from_the_groups_of_another_as_in_horovod():
    optimizer = fa.ActiveAdamW(parameters(), lr=0.01, interval=4, high=0.2)
    other = type("Distributed", (fa.ActiveAdamW,), {})(optimizer.param_groups)
    assert other.param_groups[0]["policy"] == optimizer.param_groups[0]["policy"]


# ---- nested steps count once ----


def nested(base: Any) -> Any:
    class Mine(base):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Deeper(Mine):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for cls in (base, Mine):  # torch hooks the step of every class that has been constructed
        cls(parameters(), lr=0.01)
    return Deeper


def test_a_logger_counts_a_step_once_if_step_calls_super():
    writer = Writer()
    optimizer = nested(fa.AdamW)(parameters(), policy=fa.ActiveLR(interval=3))
    logger = fa.log_learning_rates(optimizer, writer)
    train(optimizer, 9)
    assert (logger.steps, writer.steps) == (9, [3, 6, 9])


@pytest.mark.parametrize("base", [torch.optim.SGD, fa.SGD])
def test_aslr_counts_a_step_once_if_step_calls_super(base):
    optimizer = nested(base)(parameters(), lr=0.1)
    aslr = fa.ASLR(optimizer, seed=3)
    plain = base(parameters(), lr=0.1)
    other = fa.ASLR(plain, seed=3)
    assert all_equal(train(optimizer, 4), train(plain, 4))
    assert aslr.state_dict()["n"] == other.state_dict()["n"] == 4
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---- wrappers with param groups of their own, or around several optimizers ----


class Outer(torch.optim.Optimizer):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([{"params": group["params"]} for group in optimizer.param_groups], {"lr": 0.1})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)


class Chained(torch.optim.Optimizer):
    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.chained = list(optimizers)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.chained:
            optimizer.step()


def test_a_controller_refuses_a_wrapper_whose_rates_the_inner_optimizer_does_not_read():
    wrapper = Outer(fa.SGD(parameters(), lr=0.1))
    with pytest.raises(TypeError, match="Outer has param groups of its own, and the SGD inside has others"):
        fa.ASLR(wrapper)
    fa.ASLR(Outer(torch.optim.SGD(parameters(), lr=0.1)))  # of other packages nothing is known


def test_aalr_resets_all_optimizers_that_a_wrapper_holds_in_a_list():
    model = nn.Linear(3, 2)
    wrapper = Chained(fa.AdamW([model.weight], lr=0.1), fa.AdamW([model.bias], lr=0.1))
    controller = fa.AALR(wrapper, model, initial_loss=1.0)
    model(torch.ones(1, 3)).sum().backward()
    wrapper.step()
    controller.step(5.0)
    assert [len(optimizer.state) for optimizer in wrapper.chained] == [0, 0]


def test_a_wrapper_of_itself_and_one_that_keeps_a_name_as_optimizer():
    class Wrapper:
        optimizer: Any

    itself, named = Wrapper(), Wrapper()
    itself.optimizer = itself
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got Wrapper"):
        fa.ASLR(itself)  # type: ignore[arg-type]
    named.optimizer, named.inner = "adamw", fa.AdamW(parameters(), lr=0.1)  # type: ignore[attr-defined]
    assert fa.ASLR(named).optimizer is named.inner  # type: ignore[arg-type, attr-defined]


def test_names_that_subclasses_often_use_do_not_collide():
    class Counting:
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._step, self._backend, self._current = 0, "", None

        def step(self, closure: Any = None) -> Any:
            self._step += 1
            result = super().step(closure)  # type: ignore[misc]
            self._update()
            return result

        def _update(self) -> None:
            self._current = self._step

    params = parameters()
    optimizer = type("Mine", (Counting, fa.AdamW), {})(params)
    train(optimizer, 2)
    assert optimizer._current == 2
