"""``master`` changed by hand on a running optimizer: state follows, and the weight starts at the parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_adaptive as fa

from ..common.cases import BACKENDS

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_change = pytest.mark.parametrize(
    ("before", "after"),
    [("split", "none"), ("split", "stochastic"), ("stochastic", "none"), ("none", "split"), ("none", "stochastic")],
)


def model_of(values: torch.Tensor) -> nn.ParameterDict:
    return nn.ParameterDict({"weight": nn.Parameter(values.clone())})


def weights() -> torch.Tensor:
    return torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()


def step(optimizer: fa.AdaptiveOptimizer, number: int) -> None:
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number + 1)).to(p.dtype)
    optimizer.step()


@every_backend
@every_change
def test_training_goes_on_as_that_of_a_new_optimizer(before, after, backend):
    """SGD without momentum has no state but the master's, so a new optimizer at the same weights is equal."""
    model = model_of(weights())
    optimizer = fa.SGD(model.parameters(), lr=1e-3, master=before, backend=backend)
    for i in range(4):
        step(optimizer, i)
    optimizer.param_groups[0]["master"] = after
    exported = fa.export_fp32(model, optimizer)["weight"]
    assert torch.equal(exported, model["weight"].detach().float())
    other = model_of(model["weight"].detach())
    new = fa.SGD(other.parameters(), lr=1e-3, master=after, backend=backend)
    for i in range(4, 8):
        step(optimizer, i)
        step(new, i)
    assert torch.equal(model["weight"], other["weight"])
    assert optimizer.state[model["weight"]].keys() == new.state[other["weight"]].keys()


@every_backend
def test_a_master_that_is_set_again_does_not_take_up_its_old_remainder(backend):
    model = model_of(weights())
    optimizer = fa.SGD(model.parameters(), lr=1e-3, master="split", backend=backend)
    for i, master in enumerate(["split", "none", "split"]):
        optimizer.param_groups[0]["master"] = master
        step(optimizer, i)
        if master == "none":
            start = model["weight"].detach().clone()
    other = model_of(start)
    new = fa.SGD(other.parameters(), lr=1e-3, master="split", backend=backend)
    step(new, 2)
    assert torch.equal(fa.export_fp32(model, optimizer)["weight"], fa.export_fp32(other, new)["weight"])


@every_backend
@every_change
def test_a_checkpoint_before_the_next_step_loads(before, after, backend):
    model = model_of(weights())
    optimizer = fa.AdamW(model.parameters(), master=before, backend=backend)
    step(optimizer, 0)
    optimizer.param_groups[0]["master"] = after
    saved, copied = copy.deepcopy(optimizer.state_dict()), model_of(model["weight"].detach())
    other = fa.AdamW(copied.parameters(), master=after, backend=backend)
    other.load_state_dict(saved)
    step(optimizer, 1)
    step(other, 1)
    assert torch.equal(model["weight"], copied["weight"])


@pytest.mark.parametrize("policy", [None, fa.ActiveLR(interval=3, high=0.1)])
def test_weights_that_are_imported_before_the_first_step_are_saved_and_loaded(policy):
    model = model_of(weights())
    optimizer = fa.AdamW(model.parameters(), master="split", policy=policy)
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    fa.import_fp32(model, optimizer, {"weight": exact})
    loaded = model_of(model["weight"].detach())
    other = fa.AdamW(loaded.parameters(), master="split", policy=policy)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(fa.export_fp32(loaded, other)["weight"], exact)
    step(optimizer, 0)
    step(other, 0)
    assert torch.equal(fa.export_fp32(loaded, other)["weight"], fa.export_fp32(model, optimizer)["weight"])


@every_backend
@pytest.mark.parametrize(("dtype", "master"), [("bfloat16", "Split"), ("bfloat16", True), ("float16", "split")])
def test_a_master_that_does_not_exist_is_refused(dtype, master, backend):
    model = model_of(weights().to(getattr(torch, dtype)))
    optimizer = fa.AdamW(model.parameters(), backend=backend)
    step(optimizer, 0)
    before = model["weight"].detach().clone()
    optimizer.param_groups[0]["master"] = master
    with pytest.raises(ValueError, match=r"master must be one of|is for bfloat16 parameters"):
        step(optimizer, 1)
    assert torch.equal(model["weight"], before)
