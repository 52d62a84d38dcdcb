"""Steps under ``FakeTensorMode``: shapes and dtypes of the state, for memory estimators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fused_adaptive as fa

from ..common.cases import CASES, Case


def shapes(optimizer: Any) -> list[dict[str, Any]]:
    states = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    return [{name: (tuple(t.shape), t.dtype, t.device) for name, t in state.items()} for state in states]


def trained(case: Case, **options: Any) -> Any:
    model = nn.Linear(3, 2)
    optimizer = case.build(model.named_parameters(), **options)
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.end_interval()
    return optimizer


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_step_on_fake_tensors_creates_the_state_of_a_real_step(case):
    with FakeTensorMode():
        fake = trained(case, max_grad_norm=1.0)
    real = trained(case, max_grad_norm=1.0)
    assert shapes(fake) == shapes(real)
    assert all(isinstance(t, FakeTensor) for state in fake.state.values() for t in state.values())


def test_a_real_parameter_in_a_fake_step_is_named():
    with FakeTensorMode():
        optimizer = fa.AdamW(nn.Linear(3, 2).parameters())
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer.add_param_group({"params": [p]})
    with pytest.raises(RuntimeError, match=r"parameter 2 has numbers.*FakeTensorMode"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]
