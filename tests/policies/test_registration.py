"""Policies from other packages run on the reference, and no backend ignores them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive import backends, policies
from fused_adaptive.core.state import COUNTER, GAIN, StateSpec
from fused_adaptive.core.view import ParamView
from fused_adaptive.policies.base import ScalarPolicy

from ..common.cases import KERNELS, parameters, train


@dataclass(frozen=True)
class Doubling(ScalarPolicy):
    """Doubles the gain every ``interval`` steps."""

    counter: ClassVar[str | None] = "doubling_step"

    interval: int | None = 2
    granularity: str = "global"

    def state_spec(self, backbone: Any, group: Any) -> dict[str, StateSpec]:
        return {"gain": GAIN, "doubling_step": COUNTER}

    def after_update(self, views: Sequence[ParamView], ending: bool) -> None:
        super().after_update(views, ending)
        if ending:
            self.end_interval(views)

    def end_interval(self, views: Sequence[ParamView]) -> None:
        for view in views:
            view.state["gain"].mul_(2)
            view.state["doubling_step"].zero_()


@dataclass(frozen=True)
class Halved(fa.ActiveLR):
    """A subclass of ActiveLR whose gain has another meaning."""

    def gain(self, state: Any) -> Any:
        return super().gain(state) / 2


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "_BY_NAME", dict(policies._BY_NAME))
    monkeypatch.setattr(backends, "_TOLD", set())
    policies.register(Doubling)
    policies.register(Halved)


def gains(optimizer: fa.AdaptiveOptimizer) -> set[float]:
    return {state["gain"].item() for state in optimizer.state.values()}


def test_a_registered_policy_runs_on_the_reference_and_is_saved():
    optimizer = fa.AdamW(parameters(), policy=Doubling(), backend="reference")
    train(optimizer, 3)
    assert gains(optimizer) == {2.0}
    assert optimizer.param_groups[0]["policy"] == {"name": "Doubling", "interval": 2, "granularity": "global"}
    other = fa.AdamW(parameters(), backend="reference")
    other.load_state_dict(optimizer.state_dict())
    train(other, 1, start=3)
    assert gains(other) == {4.0}


@pytest.mark.skipif(not KERNELS, reason="no backend with kernels runs here")
@pytest.mark.parametrize("policy", [Doubling(), Halved(interval=2)], ids=lambda p: type(p).__name__)
def test_auto_selects_the_reference_for_a_registered_policy_and_warns_once(policy):
    name = type(policy).__name__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer, _ = (fa.AdamW(parameters(), policy=policy) for _ in range(2))
    (message,) = [str(warning.message) for warning in caught]
    assert f"has no kernels for {name}" in message
    assert "takes 'reference'" in message
    train(optimizer, 3)
    assert optimizer._step_backend.name == "reference"
    expected = fa.AdamW(parameters(), policy=policy, backend="reference")
    train(expected, 3)
    pairs = zip(optimizer.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_backend_that_is_selected_by_name_refuses_a_registered_policy(backend):
    with pytest.raises(RuntimeError, match=f"backend '{backend}' .*no kernels for Doubling: use backend='reference'"):
        fa.AdamW(parameters(), policy=Doubling(), backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_backend_that_is_selected_by_name_refuses_a_registered_policy_set_by_hand(backend):
    optimizer = fa.AdamW(parameters(), backend=backend)
    train(optimizer, 1)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.param_groups[0]["policy"] = Doubling()
    with pytest.raises(RuntimeError, match="no kernels for Doubling"):
        train(optimizer, 1, start=1)
    assert all(torch.equal(p, q) for p, q in zip(optimizer.param_groups[0]["params"], before, strict=True))


@pytest.mark.skipif(not KERNELS, reason="no backend with kernels runs here")
def test_auto_selects_kernels_again_when_the_registered_policy_is_removed():
    optimizer = fa.AdamW(parameters())
    fast = optimizer._step_backend.name
    optimizer.param_groups[0]["policy"] = Doubling()
    with pytest.warns(UserWarning, match="no kernels for Doubling"):
        train(optimizer, 1)
    assert optimizer._step_backend.name == "reference"
    optimizer.param_groups[0]["policy"] = fa.FixedLR()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, 1, start=1)
    assert optimizer._step_backend.name == fast
