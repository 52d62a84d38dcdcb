"""ASLR's random numbers: known answers, uniformity, independence, and the cost of drawing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_adaptive.core.philox import philox4x32, uniform
from fused_adaptive.core.random_rates import RandomRates

GOLDEN = Path(__file__).parents[1] / "golden"


def test_philox_known_answers():
    """Uses the vectors of Random123, the authors' library."""
    words = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((words,) * 4, (words,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        c0, c1, c2, c3 = map(torch.tensor, counter)
        assert tuple(x.item() for x in philox4x32((c0, c1, c2, c3), key)) == expected


def test_golden_draws():
    for d in json.loads((GOLDEN / "aslr_draws.json").read_text()):
        draw = RandomRates(d["seed"], d["width"] / d["center"], d["step"])
        index = torch.tensor([5, d["tensor"], 9])
        assert draw.factors(index)[1].item() == d["factor"], "exact, and whatever else is drawn with it"


def draws(seed: int, tensors: int, steps: int) -> numpy.ndarray:
    index = torch.arange(tensors)
    return numpy.stack([uniform(seed, torch.tensor(n), index).numpy() for n in range(steps)])


def kolmogorov_smirnov(sample: numpy.ndarray) -> float:
    """Returns √n times the largest distance to the uniform distribution; above 1.63 one time in a hundred."""
    ordered, n = numpy.sort(sample.ravel()), sample.size
    ranks = numpy.arange(n)
    return math.sqrt(n) * max((ordered - ranks / n).max(), ((ranks + 1) / n - ordered).max())


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3])
def test_draws_are_uniform_and_independent(seed):
    u = draws(seed, tensors=150, steps=400)
    assert u.min() >= 0
    assert u.max() < 1
    assert kolmogorov_smirnov(u) < 1.63
    assert numpy.mean([kolmogorov_smirnov(u[:, i]) for i in range(150)]) < 0.95, "each tensor; the mean is 0.87"
    assert numpy.mean([kolmogorov_smirnov(u[n]) for n in range(400)]) < 0.95, "each step"
    centered = (u - 0.5) * math.sqrt(12)
    others = draws(seed + 1, tensors=150, steps=400) - 0.5
    for a, b in (
        (centered[:, :-1], centered[:, 1:]),  # neighbouring tensors
        (centered[:-1], centered[1:]),  # consecutive steps
        (centered[:-1, :-1], centered[1:, 1:]),
        (centered, others * math.sqrt(12)),  # neighbouring seeds
    ):
        assert abs((a * b).mean()) * math.sqrt(a.size) < 3
        cells = numpy.histogram2d(a.ravel(), b.ravel(), bins=8, range=[[-math.sqrt(3), math.sqrt(3)]] * 2)[0]
        chi_square = ((cells - a.size / 64) ** 2).sum() / (a.size / 64)
        assert chi_square < 105, "63 degrees of freedom: one time in a thousand"


def test_drawing_needs_no_launch_per_tensor():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for tensors in (1, 1000):
        with Count() as mode:
            RandomRates(0, 1.0).factors(torch.arange(tensors))
        counts.append(mode.calls)
    assert counts[0] == counts[1]
