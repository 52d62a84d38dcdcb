"""Models and comparisons for the tests of controllers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fused_adaptive.schedules import snapshots


@pytest.fixture(autouse=True)
def one_thread():
    """Uses one thread: models of this size are not faster with more, and threads wait on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """Has BatchNorm's buffers, and a buffer that ``state_dict`` leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.layers(x)


class StepsInGroup(torch.optim.Optimizer):
    """Counts its steps in a tensor of the param group, as torch-optimi does."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            group["step"] = torch.tensor(0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                p.sub_(p.grad * group["lr"] / group["step"])


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> float:
    """Takes a few steps of regression; returns the mean loss."""
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(steps):
        x = torch.randn(16, 4, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in snapshots.tensors_of(model).items()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
