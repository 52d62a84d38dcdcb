"""Gradient release: unsupported options and models are refused with a reason before anything has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

import fused_adaptive as fa

from ..common.cases import CASES
from .test_release import Model, every_backend, is_per_tensor


@pytest.mark.parametrize("case", [c for c in CASES[::2] if not is_per_tensor(c.policy)], ids=str)
def test_policies_that_need_all_gradients_first_are_refused(case):
    model = Model()
    optimizer = case.build(model.parameters())
    with pytest.raises(ValueError, match="granularity='tensor'"):
        fa.release_gradients(model, optimizer)
    model.backward(0, missing=0)
    assert all(p.grad is not None for p in model.weights)
    assert optimizer._release is None


def test_the_naive_variant_is_refused():
    model = Model()
    with pytest.raises(ValueError, match="naive"):
        fa.release_gradients(model, fa.SGD(model.parameters(), policy=fa.TrainableLR(naive=True, eta=0.1)))


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 1.0), ("skip_nonfinite", True)])
def test_options_that_need_all_gradients_before_the_step_are_refused(name, value):
    model = Model()
    optimizer = fa.AdamW(model.parameters())
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match="max_grad_norm and skip_nonfinite"):
        fa.release_gradients(model, optimizer)
    assert optimizer._release is None


@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 1.0), ("skip_nonfinite", True)])
def test_options_that_are_set_later_are_refused_before_anything_moves(name, value):
    model = Model()
    optimizer = fa.AdamW(model.parameters())
    fa.release_gradients(model, optimizer)
    model.backward(0, missing=0)
    optimizer.step()
    before = [p.detach().clone() for p in model.weights]
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match="max_grad_norm and skip_nonfinite"):
        model.backward(1, missing=0)
    assert all(map(torch.equal, model.weights, before))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_is_refused(fused, unscale):
    model = Model()
    optimizer = fa.AdamW(model.parameters(), fused=fused)
    handle = fa.release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    model.backward(0)
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    optimizer.step()
    handle.remove()
    assert optimizer._step_supports_amp_scaling == fused


def test_other_optimizers_and_models_are_refused():
    model = Model()
    with pytest.raises(TypeError, match="register_post_accumulate_grad_hook"):
        fa.release_gradients(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"parameter 0 .*is not the model's"):
        fa.release_gradients(Model(), fa.AdamW(model.parameters()))
    optimizer = fa.AdamW(model.parameters())
    fa.release_gradients(model, optimizer)
    with pytest.raises(ValueError, match="already"):
        fa.release_gradients(model, optimizer)


def test_distributed_models_are_refused(monkeypatch):
    model = Model()
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        fa.release_gradients(wrapped, fa.AdamW(model.parameters()))
    from torch.distributed import tensor

    monkeypatch.setattr(tensor, "DTensor", nn.Parameter)
    with pytest.raises(ValueError, match="is a DTensor"):
        fa.release_gradients(model, fa.AdamW(model.parameters()))


def test_draws_of_aslr_are_refused():
    model = Model()
    optimizer = fa.AdamW(model.parameters(), lr=0.1)
    fa.release_gradients(model, optimizer)
    fa.ASLR(optimizer)
    with pytest.raises(RuntimeError, match="jitter=False"):
        model.backward(0, missing=0)


@every_backend
def test_an_unusable_gradient_is_named_and_changes_nothing(backend):
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = fa.AdamW(embedding.named_parameters(), backend=backend)
    fa.release_gradients(embedding, optimizer)
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"\(weight\) of shape \(5, 3\) is sparse"):
        embedding(torch.tensor([1, 2])).sum().backward()
    assert torch.equal(before, embedding.weight)


IN_BACKWARD = [
    ({"policy": fa.Hypergradient(1e-3)}, "use granularity='tensor'"),
    ({"policy": fa.TrainableLR(interval=2)}, "use granularity='tensor'"),
    ({"policy": fa.TrainableLR(naive=True, eta=0.1)}, "naive=True"),
    ({"max_grad_norm": 1.0}, "max_grad_norm and skip_nonfinite"),
    ({"skip_nonfinite": True}, "max_grad_norm and skip_nonfinite"),
    ({"policy": fa.Hypergradient(1e-3, granularity="tensor")}, ""),
    ({"policy": fa.ActiveLR(interval=2, high=0.1)}, ""),
]


@pytest.mark.parametrize(("arguments", "message"), IN_BACKWARD)
def test_torchs_optimizer_in_backward_accepts_what_release_accepts(arguments, message):
    """Otherwise a global gain would become one gain per tensor without an error."""
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    _apply_optimizer_in_backward(fa.SGD, model.parameters(), {"lr": 0.1, **arguments})
    if not message:
        model(torch.ones(1, 3)).sum().backward()
        assert not torch.equal(model.weight, before)
        return
    with pytest.raises(ValueError, match=f"_apply_optimizer_in_backward builds one optimizer.*{message}"):
        model(torch.ones(1, 3)).sum().backward()
    assert torch.equal(model.weight, before)
