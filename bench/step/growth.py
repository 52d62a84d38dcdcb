"""The time of a step against the number of tensors, which is host time, and of elements, which is memory time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .measure import Sampling, run_case
from .profiling import update_clock
from .rivals import Contender, contenders
from .shapes import ShapeList, parse
from .stats import fit_line

ELEMENTS_OF_EACH = 64
TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000)
ELEMENTS = ("1e4", "1e5", "1e6", "1e7", "1e8", "3e8", "1e9")
#: With more elements than this, contenders are measured one after the other, since memory is short.
TOGETHER = 1e8
#: The slope over elements is fitted from this number on, where memory limits the speed.
MEMORY_BOUND = 1e6


def measure_growth(
    device: torch.device,
    backends: Sequence[str],
    sampling: Sampling,
    tensors: Sequence[int] = TENSORS,
    elements: Sequence[str] = ELEMENTS,
    in_time: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measures the points of both curves, for our optimizers and torch's: fused, and over tensors also foreach.

    Returns:
        A dict ``{"over": "tensors" | "elements", "n", "threads", "name", "algorithm", "why_not", "seconds", "host"}``
        for each point and placement of the threads. Over tensors, ``seconds`` are the times until the step returns, and
        ``host`` the host's part of them: all of it on a GPU, and on a CPU the time of our native steps outside of
        updates. Over elements, ``seconds`` are the times of a step.
    """
    found = []
    lists = [("tensors", count, ShapeList(str(count), [(ELEMENTS_OF_EACH,)] * count)) for count in tensors]
    lists += [("elements", int(float(size)), parse(size)) for size in elements]
    for over, n, shapes in lists:
        if not in_time():
            nothing = {"threads": "", "name": "", "algorithm": "", "why_not": "no time was left"}
            found.append({"over": over, "n": n, **nothing})
            continue
        taking_part = _contenders(over, backends, device, len(shapes.shapes))
        groups = [taking_part] if n <= TOGETHER else [[c] for c in taking_part]
        for group in groups:
            with update_clock.running():
                rows = run_case(group, shapes, torch.float32, device, sampling, caches=False)
            for row in rows:
                seconds = row["host" if over == "tensors" and device.type == "cuda" else "seconds"]
                host = row["host"] if over == "tensors" else []
                keep = {key: row[key] for key in ("threads", "name", "algorithm", "why_not")}
                found.append({"over": over, "n": n, **keep, "seconds": seconds, "host": host})
        say(f"{n} {over}")
    return found


def _contenders(over: str, backends: Sequence[str], device: torch.device, tensors: int) -> list[Contender]:
    policies = ("fixed", "active")
    every = contenders("AdamW", policies, backends, ("ours", "torch"), torch.float32, device, tensors)
    names = ["torch fused"] + ["torch foreach"] * (over == "tensors")
    return [c for c in every if c.family == "ours" or c.name in names]


def fits(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fits the slope of each curve, and over elements the exponent, which is 1 if time is proportional to elements.

    Returns:
        A dict ``{"over", "name", "algorithm", "slope", "host_slope", "intercept", "exponent"}`` for each curve.
        ``slope`` is in seconds per tensor or element. ``host_slope`` is the host's part of a slope over tensors, None
        if it was not measured.
    """
    curves, host_curves = _curves(points, "seconds"), _curves(points, "host")
    found = []
    for (over, name, algorithm), curve in curves.items():
        used = [(n, t) for n, t in curve if over == "tensors" or n >= MEMORY_BOUND]
        if len(used) < 2:
            continue
        intercept, slope = fit_line([n for n, _ in used], [t for _, t in used])
        host_curve = host_curves.get((over, name, algorithm), [])
        host_slope = (
            fit_line([n for n, _ in host_curve], [t for _, t in host_curve])[1]
            if len(host_curve) == len(curve)
            else None
        )
        exponent = None
        if over == "elements":
            # An unweighted fit of logarithms minimizes relative errors, as the weights of fit_line do.
            logs = [(math.log(n), math.log(t)) for n, t in used]
            exponent = statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope
        found.append(
            {"over": over, "name": name, "algorithm": algorithm, "slope": slope}
            | {"host_slope": host_slope, "intercept": intercept, "exponent": exponent}
        )
    return found


def _curves(points: Sequence[dict[str, Any]], key: str) -> dict[tuple[str, str, str], list[tuple[float, float]]]:
    """Returns the points ``(n, median of point[key])`` of each curve, by (over, name, algorithm)."""
    curves: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for point in points:
        if point["why_not"] == "" and point.get(key):
            of = (point["over"], point["name"], point["algorithm"])
            curves.setdefault(of, []).append((point["n"], statistics.median(point[key])))
    return curves
