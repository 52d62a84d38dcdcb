"""Frameworks that put one param group after the other in the place of ``param_groups``, as DeepSpeed's ZeRO does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa

from ..common.cases import BACKENDS, Gradients, parameters, state_of

SPANS: dict[str, dict[str, Any]] = {
    "a global gain": {"policy": fa.Hypergradient(1e-4)},
    "clipping": {"max_grad_norm": 0.5},
    "skipping": {"skip_nonfinite": True},
}
ALIKE: dict[str, dict[str, Any]] = {
    "fixed": {},
    "active": {"policy": fa.ActiveLR(interval=2, high=0.1)},
    "a gain a tensor": {"policy": fa.TrainableLR(interval=2, source="gradient", granularity="tensor")},
}


def run(arguments: dict[str, Any], backend: str, apart: bool) -> list[Tensor]:
    params = parameters(torch.float32)
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.1}]
    optimizer = fa.AdamW(groups, lr=0.01, backend=backend, **arguments)
    whole = optimizer.param_groups
    for step in range(7):
        Gradients().set(params, step)
        for part in [[group] for group in whole] if apart else [whole]:
            optimizer.param_groups = part
            optimizer.step()
        optimizer.param_groups = whole
    return [*params, *state_of(optimizer).values()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", ALIKE.values(), ids=ALIKE)
def test_groups_may_be_stepped_one_after_the_other(arguments, backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(torch.equal, run(arguments, backend, True), run(arguments, backend, False)))


@pytest.mark.parametrize("arguments", SPANS.values(), ids=SPANS)
def test_what_spans_groups_warns_if_they_are_stepped_apart(arguments):
    with pytest.warns(UserWarning, match="none of the parameters of the last one.*into one group"):
        run(arguments, "reference", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(arguments, "reference", False)


def test_groups_that_take_the_place_of_others_do_not_warn():
    """A training that goes on with other parameters, which are added as torch documents it."""
    params = parameters()
    optimizer = fa.AdamW(params[:3], policy=fa.Hypergradient(1e-4))
    Gradients().set(params, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.param_groups.clear()
        optimizer.add_param_group({"params": params[3:]})
        optimizer.step()
