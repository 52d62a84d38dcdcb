"""A parameter's ``.data`` is replaced between two steps: state follows it, or an error comes before anything moves."""

from __future__ import annotations

import pytest
import torch

import fused_adaptive as fa

from ..common.cases import BACKENDS, parameters, train
from .test_bad_input import snapshot

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
@pytest.mark.parametrize("steps", [0, 2])
def test_data_whose_elements_share_memory(steps, backend):
    first, second = parameters(torch.float32, [(4,), (4,)])
    optimizer = fa.AdamW([first, second], backend=backend)
    train(optimizer, steps)
    second.data = torch.ones(1).expand(4)
    first.grad, second.grad = torch.ones(4), torch.ones(4)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"the data of parameter 1 of shape \(4,\) has elements that share memory"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before))


@every_backend
def test_data_replaced_by_another_shape(backend):
    first, second = parameters(torch.float32, [(4,), (4,)])
    optimizer = fa.ActiveAdamW([first, second], backend=backend, interval=3)
    train(optimizer, 2)
    second.data = torch.ones(5)
    first.grad, second.grad = torch.ones(4), torch.ones(5)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the state '.*' of parameter 1 of shape \(5,\) has shape \(4,\)"):
            optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before))
    second.data, second.grad = torch.ones(4), None
    optimizer.step()
    assert not torch.equal(snapshot(optimizer)[0], before[0])


@every_backend
def test_state_follows_data_of_another_dtype(backend):
    """As after ``model.double()`` on torch versions that swap ``.data``."""
    results = []
    for dtype in (torch.float64, torch.float32):
        params = parameters(dtype, [(4,), (4,)])
        optimizer = fa.ActiveAdamW(params, backend=backend, interval=3)
        train(optimizer, 2)
        params[1].data = params[1].data.double()
        train(optimizer, 6)
        assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float64
        assert optimizer.state[params[0]]["exp_avg"].dtype == dtype
        results.append([p.detach().double() for p in params])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
