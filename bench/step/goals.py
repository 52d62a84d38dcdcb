"""The performance goals, and whether results reach them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .growth import fits
from .results import Record, by_threads, find, of_null, with_threads
from .stats import ratio_interval

LARGE = "10 x 5M"


@dataclass(frozen=True)
class Goal:
    """A measured number and its limit.

    Args:
        what: a description.
        limit: the largest value that reaches the goal; the smallest if ``least``.
        value: computes the number from results and the name of our backend: a number, a ratio with its interval, or
            None if it was not measured.
        least: whether ``limit`` is a lower limit. Default False.
        gpu_only: whether the goal applies to GPUs only. Default False.
    """

    what: str
    limit: float
    value: Callable[[Record, str], tuple[float, float, float] | float | None]
    least: bool = False
    gpu_only: bool = False


def case_of(record: Record, shapes: str, backbone: str = "AdamW", dtype: str = "float32") -> dict[str, Any] | None:
    key = (backbone, shapes, dtype)
    found = [c for c in record["cases"] if (c["backbone"], c["shapes"], c["dtype"]) == key and c["rows"]]
    return next((c for c in found if "fixed" in {row["policy"] for row in c["rows"]}), None)


def _samples(record: Record, shapes: str, name: str, policy: str = "") -> list[float]:
    case = case_of(record, shapes)
    return find(case, case["rows"][0]["cache"], name, policy) if case else []


def _ratio(shapes: str, policy: str, name: str, of_policy: str) -> Callable[[Record, str], Any]:
    """Returns a function that computes the ratio of our time under ``policy`` to another row's.

    The other row is ``name`` under ``of_policy``; ``name="ours"`` stands for our own backend.
    """

    def value(record: Record, backend: str) -> tuple[float, float, float] | None:
        ours = _samples(record, shapes, f"ours, {backend}", policy)
        other = _samples(record, shapes, f"ours, {backend}" if name == "ours" else name, of_policy)
        return ratio_interval(ours, other) if ours and other else None

    return value


def _share_of_copy(shapes: Sequence[str], policy: str, dtype: str) -> Callable[[Record, str], Any]:
    def value(record: Record, backend: str) -> float | None:
        found = []
        for name in shapes:
            case = case_of(record, name, dtype=dtype)
            rows = {(r["name"], r["policy"]): r for r in case["rows"] if r["seconds"]} if case else {}
            ours, copy = rows.get((f"ours, {backend}", policy)), rows.get(("copy", ""))
            if ours and copy:
                rates = [r["bytes"] / statistics.median(r["seconds"]) for r in (ours, copy)]
                found.append(rates[0] / rates[1])
        return min(found, default=None)

    return value


def _share_of_null(shapes: str, policy: str) -> Callable[[Record, str], Any]:
    def value(record: Record, backend: str) -> tuple[float, float, float] | None:
        case = case_of(record, shapes)
        rows = case["rows"] if case else []
        row = next((r for r in rows if (r["name"], r["policy"]) == (f"ours, {backend}", policy)), None)
        ours, null = of_null(case, row) if case and row else ([], [])
        return ratio_interval(null, ours) if ours and null else None

    return value


def _host(n: int) -> Callable[[Record, str], float | None]:
    """Returns a function that computes the ratio of our host time to torch fused's for ``n`` tensors of 64 elements."""

    def value(record: Record, backend: str) -> float | None:
        points = {
            (p["name"], p["algorithm"]): statistics.median(p["seconds"])
            for p in record["growth"]
            if (p["over"], p["n"]) == ("tensors", n) and not p["why_not"]
        }
        ours, torchs = points.get((f"ours, {backend}", "AdamW")), points.get(("torch fused", "AdamW"))
        return ours / torchs if ours and torchs else None

    return value


def _fit(over: str, key: str, scale: float) -> Callable[[Record, str], Any]:
    def value(record: Record, backend: str) -> float | None:
        our_fits = [f for f in fits(record["growth"]) if (f["over"], f["name"]) == (over, f"ours, {backend}")]
        return max((f[key] * scale for f in our_fits if f[key] is not None), default=None)

    return value


def _launches(record: Record, backend: str) -> float | None:
    case = case_of(record, "ResNet-50")
    rows = [r for r in case["rows"] if r["name"] == f"ours, {backend}" and r["launches"]] if case else []
    return max((r["launches"] for r in rows), default=None)


BIG = ("GPT-2 124M", "1 x 1e8")
GOALS = [
    Goal("AdamW / torch fused, 10 x 5M", 1.03, _ratio(LARGE, "fixed", "torch fused", "")),
    Goal("AdamW / torch fused, 2000 x 1000", 0.3, _ratio("2000 x 1000", "fixed", "torch fused", "")),
    Goal("AdamW / torch fused, ResNet-50", 1.03, _ratio("ResNet-50", "fixed", "torch fused", "")),
    Goal("ActiveAdamW / AdamW, 10 x 5M", 1.45, _ratio(LARGE, "active", "ours", "fixed")),
    Goal("ActiveAdamW / foreach composition, 10 x 5M", 0.4, _ratio(LARGE, "active", "foreach composition", "active")),
    Goal(
        "ActiveAdamW / the authors' form, 10 x 5M", 0.25, _ratio(LARGE, "active", "as the authors wrote it", "active")
    ),
    Goal("ActiveAdamW / torch.compile of it, 10 x 5M", 1.0, _ratio(LARGE, "active", "torch.compile of it", "active")),
    Goal(
        "AdamW / torch.compile of torch's, 1 x 1e8",
        1.0,
        _ratio("1 x 1e8", "fixed", "torch.compile of torch's", ""),
        gpu_only=True,
    ),
    Goal(
        "ActiveAdamW / torch.compile of it, 1 x 1e8",
        1.0,
        _ratio("1 x 1e8", "active", "torch.compile of it", "active"),
        gpu_only=True,
    ),
    # These need no other optimizer to compare with: no step is faster than the null step of the same streams.
    Goal("AdamW, share of the null step, 10 x 5M", 0.95, _share_of_null(LARGE, "fixed"), True),
    Goal("ActiveAdamW, share of the null step, 10 x 5M", 0.95, _share_of_null(LARGE, "active"), True),
    Goal("share of copy, 100M and more, float32", 0.95, _share_of_copy(BIG, "fixed", "float32"), True, True),
    Goal("share of copy, 100M and more, bfloat16", 0.95, _share_of_copy(BIG, "fixed", "bfloat16"), True, True),
    Goal("share of copy, ResNet-50, float32", 0.85, _share_of_copy(("ResNet-50",), "fixed", "float32"), True, True),
    Goal("launches of a step, ResNet-50", 1, _launches, gpu_only=True),
    Goal("host time / torch fused, 300 tensors", 0.25, _host(300)),
    Goal("host time / torch fused, 10 000 tensors", 0.3, _host(10_000)),
    Goal("time grows as n to the power of, 1e6 … 1e9", 1.05, _fit("elements", "exponent", 1.0)),
]


def verdict(goal: Goal, record: Record | None, backend: str, device: str) -> str:
    """Returns the value and whether it reaches the goal. It is undecided if its interval contains the limit."""
    if goal.gpu_only and device == "cpu":
        return ""
    found = None if record is None else goal.value(record, backend)
    if found is None:
        return "not measured"
    low, value, high = found if isinstance(found, tuple) else (found, found, found)
    reached = [x >= goal.limit if goal.least else x <= goal.limit for x in (low, value, high)]
    outcome = "holds" if all(reached) else "misses" if not any(reached) else "undecided"
    interval = f" ({low:.2f} to {high:.2f})" if isinstance(found, tuple) else ""
    return f"{value:.2f}{interval}, {outcome}"


def goals_table(cpu: Record | None, gpu: Record | None) -> list[list[str]]:
    """Returns the table of goals: a column for each machine and backend, and on a CPU for each placement of threads."""
    columns = [
        (with_threads("CPU", threads), part, "native", "cpu")
        for threads, part in (by_threads(cpu) if cpu else {"": None}).items()
    ]
    columns += [("GPU, C++", gpu, "native", "cuda"), ("GPU, Triton", gpu, "triton", "cuda")]
    body = [["goal", "limit", *(title for title, *_ in columns)]]
    for goal in GOALS:
        limit = f"{'≥' if goal.least else '≤'} {goal.limit:g}"
        body.append([goal.what, limit, *(verdict(goal, r, b, d) for _, r, b, d in columns)])
    return body
