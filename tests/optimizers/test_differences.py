"""The differences from torch that docs/differences.md describes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import fused_adaptive as fa

from ..common.cases import parameters, train


def test_sparse_complex_and_differentiable_are_refused():
    (p,) = parameters(torch.float32, [(4, 3)])
    p.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match="is sparse"):
        fa.SGD([p]).step()
    z = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match=r"optimize torch.view_as_real\(p\)"):
        fa.SGD([z]).step()
    with pytest.raises(ValueError, match="differentiable"):
        fa.AdamW([p], differentiable=True)


def test_a_repeated_parameter_is_an_error_here_and_a_warning_in_torch():
    (p,) = parameters(torch.float32, [(3,)])
    with pytest.raises(ValueError, match="pass each of them once"):
        fa.SGD([p, p])
    with pytest.warns(UserWarning, match="duplicate"):
        torch.optim.SGD([p, p])


def test_state_of_bfloat16_parameters_has_twice_the_bytes_of_torchs():
    def state_bytes(make: Any) -> int:
        params = parameters(torch.bfloat16, [(1000,)])
        optimizer = make(params)
        train(optimizer, 1)
        return sum(v.numel() * v.element_size() for v in optimizer.state[params[0]].values() if v.dim())

    assert (state_bytes(fa.AdamW), state_bytes(torch.optim.AdamW)) == (8000, 4000)


def test_float16_adam_stays_finite_with_gradients_of_zero():
    finite = []
    for cls in (fa.Adam, torch.optim.Adam):
        p = torch.ones(3, dtype=torch.float16, requires_grad=True)
        p.grad = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float16)
        cls([p]).step()
        finite.append(bool(p.isfinite().all()))
    assert finite == [True, False]


def test_a_tensor_lr_with_foreach():
    params = parameters(torch.float32)
    train(fa.AdamW(params, lr=torch.tensor(0.1), foreach=True), 1)
    with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
        torch.optim.AdamW(params, lr=torch.tensor(0.1), foreach=True)


def test_fused_amp_leaves_gradients_scaled():
    (p,) = parameters(torch.float32, [(3,)])
    for cls, expected in ((fa.AdamW, 8.0), (torch.optim.AdamW, 2.0)):
        optimizer: Any = cls([p], fused=True)
        p.grad = torch.full_like(p, 8.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
        assert (p.grad == expected).all()


def test_optimizers_in_backward_count_each_call():
    (p,) = parameters(torch.float32, [(3,)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a private function
        from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

        _apply_optimizer_in_backward(fa.AdamW, [p], {"lr": 0.1, "policy": fa.ActiveLR(interval=2)})
    for _ in range(3):
        p.sum().backward()
    (optimizer,) = p._in_backward_optimizers  # type: ignore[attr-defined]
    assert optimizer.state[p]["step"] == 3
    assert optimizer.state[p]["active_step"] == 1
