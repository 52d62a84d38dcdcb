"""Tensors whose memory has been freed: refused by name before anything moves, or not needed at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa

from ..common.cases import BACKENDS, all_equal, parameters, train, unmoved

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


@every_backend
@pytest.mark.parametrize("of", ["data", "exp_avg", "step", "grad_sum"])
def test_freed_memory_is_refused_before_anything_moves(of, backend):
    params = parameters(torch.float32, [(3,), (4,)])
    optimizer = fa.ActiveAdamW(params, interval=5, backend=backend)
    train(optimizer, 2)
    freed = params[1].data if of == "data" else optimizer.state[params[1]][of]
    kept = freed.clone()
    free(freed)
    message = f"the memory of '{of}' of parameter 1 has been freed"
    with unmoved(params[:1]), pytest.raises(RuntimeError, match=message):
        optimizer.step()
    freed.untyped_storage().resize_(kept.untyped_storage().nbytes())
    freed.copy_(kept)
    train(optimizer, 1, start=2)


@every_backend
def test_a_gradient_without_memory_is_refused_by_name(backend):
    params = parameters(torch.float32, [(3,), (4,)])
    optimizer = fa.AdamW(params, backend=backend)
    train(optimizer, 2)
    assert params[1].grad is not None
    free(params[1].grad)
    message = r"the gradient of parameter 1 of shape \(4,\) has no memory"
    with unmoved(params), pytest.raises(RuntimeError, match=message):
        optimizer.step()


@every_backend
@pytest.mark.parametrize("how", ["free", "empty"])
@pytest.mark.parametrize("source", ["gradient", "preconditioned"])
def test_trainable_lr_needs_the_memory_of_parameters_only_if_it_measures_their_displacement(source, how, backend):
    params = parameters(torch.float32, [(3,), (4,)])
    optimizer = fa.AdamW(params, policy=fa.TrainableLR(interval=2, source=source), backend=backend)
    train(optimizer, 1)
    params[1].grad = None
    if how == "free":
        free(params[1])
    else:
        params[1].data = torch.empty(0)
    if source == "gradient":
        optimizer.step()
        assert optimizer.state[params[0]]["step"] == 2
    else:
        with pytest.raises(RuntimeError, match="TrainableLR measures what it has moved by"):
            optimizer.step()


@every_backend
@pytest.mark.parametrize("policy", [None, fa.ActiveLR(interval=2, high=0.1)])
@pytest.mark.parametrize("how", ["free", "meta"])
def test_an_idle_parameter_may_be_offloaded_with_its_moments(how, policy, backend):
    params, others = parameters(torch.float32, [(3,), (4,)]), parameters(torch.float32, [(3,), (4,)])
    optimizers = [fa.AdamW(ps, lr=0.1, policy=policy, backend=backend) for ps in (params, others)]
    for optimizer, ps in zip(optimizers, (params, others), strict=True):
        train(optimizer, 2)
        ps[1].grad = None
    state, kept = optimizers[0].state[params[1]], {}
    for name in ("exp_avg", "exp_avg_sq"):
        kept[name] = state[name].clone()
        if how == "free":
            free(state[name])
        else:
            state[name] = state[name].to("meta")
    data = params[1].detach().clone()
    free(params[1])
    for optimizer in optimizers:
        optimizer.step()
    params[1].untyped_storage().resize_(data.untyped_storage().nbytes())
    params[1].data.copy_(data)
    state.update(kept)
    for optimizer in optimizers:
        train(optimizer, 3, start=3)
    assert all_equal(params, others)


@every_backend
def test_state_without_values_is_refused(backend):
    params = parameters(torch.float32, [(3,), (4,)])
    optimizer = fa.AdamW(params, backend=backend)
    train(optimizer, 2)
    optimizer.state[params[1]]["exp_avg"] = torch.empty(4, device="meta")
    message = r"'exp_avg' of parameter 1 .* is on the meta device and has no values"
    with unmoved(params), pytest.raises(RuntimeError, match=message):
        optimizer.step()


def test_a_step_on_the_meta_device_runs():
    param = torch.empty(3, device="meta", requires_grad=True)
    param.grad = torch.empty(3, device="meta")
    optimizer = fa.AdamW([param])
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
