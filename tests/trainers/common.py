"""Shared by the tests of trainers: a small model, real data, and the plain loop that a trainer must equal."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..common.cases import all_equal


def needs(module: str) -> pytest.MarkDecorator:
    """Skips a test if a trainer is not installed. Tests import it themselves, since that takes seconds."""
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: pip install 'fused_adaptive[trainers]'")


def digits(batches: int = 5, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """scikit-learn's handwritten digits, 8×8 pixels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, batches * size, size)]


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    batches: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    *,
    clip: float | None,
    epoch: int,
    at_epoch_end: Callable[[], None] = lambda: None,
    accumulate: int = 1,
    order: Iterable[Tensor] | None = None,
) -> list[Tensor]:
    """Trains with an ordinary loop. Results of trainers must equal it, bit for bit.

    Args:
        clip: largest norm of the gradients.
        epoch: batches of an epoch, after which ``at_epoch_end`` is called.
        accumulate: batches of a step; ``loss_of`` divides.
        order: order of parameters in which the norm is summed; default: the model's.
    """
    clipped = list(model.parameters() if order is None else order)
    for i, batch in enumerate(batches):
        loss_of(batch).backward()
        if (i + 1) % accumulate:
            continue
        if clip is not None:
            nn.utils.clip_grad_norm_(clipped, clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (i + 1) % epoch == 0:
            at_epoch_end()
    return values(model)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all_equal(a, b)
