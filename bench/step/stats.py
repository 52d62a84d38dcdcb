"""Statistics of samples: median, p20 and p80, noise, bootstrap intervals and fitted lines."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: A row is too noisy to compare if p80 − p20 is more than this share of the median.
NOISY = 0.15


@dataclass(frozen=True)
class Summary:
    """The median of samples and the percentiles around it."""

    median: float
    p20: float
    p80: float

    @property
    def variation(self) -> float:
        """(p80 − p20) / median."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0

    @property
    def is_noisy(self) -> bool:
        return self.variation > NOISY


def summarize(samples: Sequence[float]) -> Summary:
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Summary(statistics.median(samples), fifths[0], fifths[3])


def ratio_interval(of: Sequence[float], to: Sequence[float], draws: int = 400) -> tuple[float, float, float]:
    """Returns the medians' ratio with its bootstrap 95 % interval, as (low, ratio, high). The seed is fixed."""
    generator = random.Random(0)
    ratios = sorted(
        statistics.median(generator.choices(of, k=len(of))) / statistics.median(generator.choices(to, k=len(to)))
        for _ in range(draws)
    )
    ratio = statistics.median(of) / statistics.median(to)
    return ratios[int(0.025 * draws)], ratio, ratios[int(0.975 * draws)]


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns intercept and slope of the line with the least squared errors relative to ``y``."""
    weights = [1 / (value * value) for value in y]
    total = sum(weights)
    mean_x = sum(w * a for w, a in zip(weights, x, strict=True)) / total
    mean_y = sum(w * b for w, b in zip(weights, y, strict=True)) / total
    products = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True))
    slope = products / sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    return mean_y - slope * mean_x, slope
