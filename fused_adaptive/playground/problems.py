"""What is minimized: functions of one vector, for a batch of vectors at once. Float64, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Range = tuple[float, float]


@dataclass(frozen=True)
class Start:
    """A number that decides where a run starts: what it is, its bounds, and the default."""

    label: str
    bounds: Range
    default: float


@dataclass(frozen=True)
class Problem:
    """A loss to minimize.

    Attributes:
        loss: from vectors ``(..., n)`` to losses ``(...)``.
        starts: one or two numbers, and ``initial`` makes the first vector of them.
        minima: where the loss is least, to mark in the plot.
        window: bounds of what is shown, one pair a coordinate; None where vectors have too many.
    """

    title: str
    formula: str
    loss: Callable[[Tensor], Tensor]
    starts: tuple[Start, ...]
    initial: Callable[..., Tensor]
    minima: tuple[tuple[float, ...], ...] = ()
    window: tuple[Range, ...] | None = None


def point(*coordinates: float) -> Tensor:
    return torch.tensor(coordinates, dtype=torch.float64)


# ---- surfaces ----

WEIGHT = 2.0
INPUTS = torch.linspace(-1.5, 1.5, 16, dtype=torch.float64)


def mean_squared_error(p: Tensor) -> Tensor:
    """Of ``w·x`` against ``2·x``: a parabola."""
    return ((p * INPUTS - WEIGHT * INPUTS) ** 2).mean(-1)


def saddle(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return x**2 + (1 - y**2) ** 2


def rosenbrock(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(p: Tensor) -> Tensor:
    x, y = p.unbind(-1)
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


# ---- a small net ----

HIDDEN = 12


@cache
def moons() -> tuple[Tensor, Tensor]:
    """Two interleaved half circles, 100 points each with some noise, and which one each point belongs to."""
    generator = torch.Generator().manual_seed(0)
    angle = math.pi * torch.rand(100, generator=generator, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    points = torch.cat([upper, lower])
    points += 0.12 * torch.randn(points.shape, generator=generator, dtype=torch.float64)
    return points, torch.arange(2, dtype=torch.float64).repeat_interleave(100)


def logits(p: Tensor, points: Tensor) -> Tensor:
    """Of nets with one hidden layer of tanh: from ``(..., n)`` and ``(m, 2)`` to ``(..., m)``."""
    first, bias, second, offset = p.split([2 * HIDDEN, HIDDEN, HIDDEN, 1], -1)
    hidden = torch.tanh(points @ first.unflatten(-1, (2, HIDDEN)) + bias.unsqueeze(-2))
    return (hidden * second.unsqueeze(-2)).sum(-1) + offset


def cross_entropy(p: Tensor) -> Tensor:
    points, labels = moons()
    outputs = logits(p, points)
    return torch.nn.functional.binary_cross_entropy_with_logits(
        outputs, labels.expand_as(outputs), reduction="none"
    ).mean(-1)


def initial_net(scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(4 * HIDDEN + 1, generator=generator, dtype=torch.float64)


PROBLEMS = {
    "saddle": Problem(
        "Saddle",
        "f(x, y) = x² + (1 − y²)²",
        saddle,
        (Start("Initial x", (-2, 2), 1.5), Start("Initial y", (-1.5, 1.5), 0.01)),
        point,
        ((0, -1), (0, 1)),
        ((-2.2, 2.2), (-1.8, 1.8)),
    ),
    "mse": Problem(
        "MSE of one weight",
        "f(w) = mean of (w·x − 2·x)²",
        mean_squared_error,
        (Start("Initial weight", (-6, 10), -4),),
        point,
        ((WEIGHT,),),
        ((-7, 11),),
    ),
    "rosenbrock": Problem(
        "Rosenbrock",
        "f(x, y) = (1 − x)² + 100·(y − x²)²",
        rosenbrock,
        (Start("Initial x", (-2, 2), -1.2), Start("Initial y", (-1, 3), 1)),
        point,
        ((1, 1),),
        ((-2.2, 2.2), (-1.2, 3.2)),
    ),
    "beale": Problem(
        "Beale",
        "f(x, y) = (1.5 − x + xy)² + (2.25 − x + xy²)² + (2.625 − x + xy³)²",
        beale,
        (Start("Initial x", (-4, 4), 1), Start("Initial y", (-4, 4), 1.5)),
        point,
        ((3, 0.5),),
        ((-4.5, 4.5), (-4.5, 4.5)),
    ),
    "net": Problem(
        "Small net",
        "2 inputs, 12 tanh units, 1 output: cross entropy on 200 points",
        cross_entropy,
        (Start("Scale of the initial weights", (0.01, 3), 0.5),),
        initial_net,
    ),
}
