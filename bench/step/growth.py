"""Cost against the number of tensors, which is the host's, and of elements, which is the memory's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .measure import Plan, run_case
from .profiling import update_clock
from .rivals import Contender, contenders
from .shapes import ShapeList, parse
from .stats import fit_line

ELEMENTS_OF_EACH = 64
TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000)
ELEMENTS = ("1e4", "1e5", "1e6", "1e7", "1e8", "3e8", "1e9")
#: Above, contenders come one after the other: only the slope is of interest, and memory is short.
TOGETHER = 1e8
#: The slope over elements is taken from here on, where memory is what counts.
MEMORY_BOUND = 1e6


def measure_growth(
    device: torch.device,
    backends: Sequence[str],
    plan: Plan,
    tensors: Sequence[int] = TENSORS,
    elements: Sequence[str] = ELEMENTS,
    in_time: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Points of both curves for ours and ``torch.optim``: fused, and foreach where the host counts.

    Returns:
        ``{"over": "tensors" | "elements", "n", "name", "algorithm", "why_not", "seconds", "host"}`` each. Over tensors
        the seconds are those until the step returns, and ``host`` what is the host's of them: on a GPU all, on a CPU
        those of our native steps outside of updates. Over elements the seconds are a step's.
    """
    found = []
    lists = [("tensors", count, ShapeList(str(count), [(ELEMENTS_OF_EACH,)] * count)) for count in tensors]
    lists += [("elements", int(float(size)), parse(size)) for size in elements]
    for over, n, shapes in lists:
        if not in_time():
            found.append({"over": over, "n": n, "name": "", "algorithm": "", "why_not": "no time was left"})
            continue
        taking_part = _contenders(over, backends, device, len(shapes.shapes))
        groups = [taking_part] if n <= TOGETHER else [[c] for c in taking_part]
        for group in groups:
            with update_clock.running():
                rows = run_case(group, shapes, torch.float32, device, plan, caches=False)
            for row in rows:
                seconds = row["host" if over == "tensors" and device.type == "cuda" else "seconds"]
                host = row["host"] if over == "tensors" else []
                keep = {key: row[key] for key in ("name", "algorithm", "why_not")}
                found.append({"over": over, "n": n, **keep, "seconds": seconds, "host": host})
        say(f"{n} {over}")
    return found


def _contenders(over: str, backends: Sequence[str], device: torch.device, tensors: int) -> list[Contender]:
    wanted = ("fixed", "active")
    every = contenders("AdamW", wanted, backends, ("ours", "torch"), torch.float32, device, tensors)
    names = ["torch fused"] + ["torch foreach"] * (over == "tensors")
    return [c for c in every if c.family == "ours" or c.name in names]


def fits(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each curve: the slope, and over elements the exponent, 1 where time grows as the elements do.

    Returns:
        ``{"over", "name", "algorithm", "slope", "host_slope", "intercept", "exponent"}``; seconds a tensor or an
        element. ``host_slope``: what is the host's of a slope over tensors, None where that was not measured.
    """
    curves, of_host = _curves(points, "seconds"), _curves(points, "host")
    found = []
    for (over, name, algorithm), curve in curves.items():
        used = [(n, t) for n, t in curve if over == "tensors" or n >= MEMORY_BOUND]
        if len(used) < 2:
            continue
        intercept, slope = fit_line([n for n, _ in used], [t for _, t in used])
        own = of_host.get((over, name, algorithm), [])
        host_slope = fit_line([n for n, _ in own], [t for _, t in own])[1] if len(own) == len(curve) else None
        exponent = None
        if over == "elements":
            # Weights of fit_line are relative; of logarithms the plain fit is.
            logs = [(math.log(n), math.log(t)) for n, t in used]
            exponent = statistics.linear_regression([x for x, _ in logs], [y for _, y in logs]).slope
        found.append(
            {"over": over, "name": name, "algorithm": algorithm, "slope": slope}
            | {"host_slope": host_slope, "intercept": intercept, "exponent": exponent}
        )
    return found


def _curves(points: Sequence[dict[str, Any]], key: str) -> dict[tuple[str, str, str], list[tuple[float, float]]]:
    """The medians of one of their lists of samples, by what they are of."""
    curves: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for point in points:
        if point["why_not"] == "" and point.get(key):
            of = (point["over"], point["name"], point["algorithm"])
            curves.setdefault(of, []).append((point["n"], statistics.median(point[key])))
    return curves
