"""The plots of the benchmarks: roofline, bandwidth against size, and time against the number of tensors."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .growth import fits
from .results import Record, by_threads, caches_of, find, with_threads

# Okabe and Ito's colours, which remain distinct under colour-blindness. Each line also has its own marker.
STYLES: dict[str, dict[str, Any]] = {
    "AdamW, ours, native": {"color": "#0072B2", "marker": "o"},
    "AdamW, ours, triton": {"color": "#56B4E9", "marker": "h"},
    "AdamW + active, ours, native": {"color": "#E69F00", "marker": "s"},
    "AdamW + active, ours, triton": {"color": "#F0E442", "marker": "p"},
    "AdamW, torch fused": {"color": "#000000", "marker": "^"},
    "AdamW, torch foreach": {"color": "#777777", "marker": "v"},
    "AdamW + active, foreach composition": {"color": "#D55E00", "marker": "D"},
    "AdamW + active, torch.compile of it": {"color": "#CC79A7", "marker": "X"},
    "AdamW, null, native": {"color": "#009E73", "marker": "+"},
    "AdamW + active, null, native": {"color": "#009E73", "marker": "x"},
}


def draw(key: str, record: Record, device: str, path: Path) -> None:
    """Writes one of the plots as a PNG, on a CPU of the placement of the threads that most rows have.

    Args:
        key: ``"roofline"``, ``"sizes"`` or ``"tensors"``.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log")
    threads, record = next(iter(by_threads(record).items()))
    {"roofline": _roofline, "sizes": _sizes, "tensors": _tensors}[key](ax, record)
    ax.grid(alpha=0.3)
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="small")
    else:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center")
    cpu = with_threads(f"CPU, {record['machine']['threads']} threads", threads)
    where = record["machine"]["device"] if device == "cuda" else cpu
    ax.set_title(f"{ax.get_title()} ({where})", fontsize=10)
    figure.savefig(path, dpi=110)


def _points(record: Record, caches: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], float]]:
    """Yields (label, case, row, median seconds) of the AdamW cases in float32."""
    for case in record["cases"]:
        if (case["backbone"], case["dtype"]) != ("AdamW", "float32"):
            continue
        for row in case["rows"]:
            label = f"{row['algorithm']}, {row['name']}"
            if row["seconds"] and row["cache"] in caches and label in STYLES:
                yield label, case, row, statistics.median(row["seconds"])


def _copy_rate(record: Record) -> float | None:
    rates = []
    for case in record["cases"]:
        for cache in caches_of(case):
            seconds = find(case, cache, "copy")
            copied = next(row["bytes"] for row in case["rows"] if row["name"] == "copy") if seconds else 0
            rates += [copied / statistics.median(seconds)] if seconds else []
    return statistics.median(rates) if rates else None


def _roofline(ax: Axes, record: Record) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for label, _, row, median in _points(record, ("large", "cold", "as it comes")):
        curves.setdefault(label, []).append((row["bytes"], median * 1e3))
    for label, points in curves.items():
        ax.plot(*zip(*points, strict=True), linestyle="", label=label, **STYLES[label])
    rate, everything = _copy_rate(record), [b for points in curves.values() for b, _ in points]
    if rate and everything:
        ends = (min(everything), max(everything))
        ax.plot(ends, [b / rate * 1e3 for b in ends], "k:", label=f"copy, {rate / 1e9:.3g} GB/s")
    ax.set(yscale="log", xlabel="bytes that a step cannot avoid", ylabel="ms", title="Roofline")


def _sizes(ax: Axes, record: Record) -> None:
    for cache, line in (("cold", "-"), ("warm", "--")):
        curves: dict[str, list[tuple[float, float]]] = {}
        for label, case, row, median in _points(record, ("large", cache)):
            if case["tensors"] == 1:
                curves.setdefault(label, []).append((case["numel"], row["bytes"] / median / 1e9))
        for label, points in curves.items():
            style = {**STYLES[label], "linestyle": line, "label": label if cache == "cold" else None}
            ax.plot(*zip(*sorted(points), strict=True), **style)
    if rate := _copy_rate(record):
        ax.axhline(rate / 1e9, color="k", linestyle=":", label="copy")
    ax.set(xlabel="elements of one tensor", ylabel="GB/s", title="Bandwidth; dashed: in the caches")


def _tensors(ax: Axes, record: Record) -> None:
    slopes = {f"{f['algorithm']}, {f['name']}": f["slope"] for f in fits(record["growth"]) if f["over"] == "tensors"}
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in record["growth"]:
        if point["over"] == "tensors" and point.get("seconds"):
            label = f"{point['algorithm']}, {point['name']}"
            curves.setdefault(label, []).append((point["n"], statistics.median(point["seconds"]) * 1e3))
    for label, points in curves.items():
        text = f"{label}: {slopes[label] * 1e6:.2f} µs a tensor" if label in slopes else label
        ax.plot(*zip(*sorted(points), strict=True), label=text, **STYLES.get(label, {"marker": "."}))
    ax.set(yscale="log", xlabel="tensors of 64 elements", ylabel="ms on the host", title="A step of many tensors")
