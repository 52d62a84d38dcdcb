"""Compares two results of bench.step.run: ``python -m bench.step.compare old.json new.json``.

Times of two runs are not comparable, so this compares ratios within each run: to torch's fused optimizer, and per byte
to the null step of the same streams. A ratio has changed if the bootstrap intervals of both runs do not overlap and
the values differ by more than ``--tolerance``. The exit status is 1 if a ratio has become worse.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .results import Record, by_threads, caches_of, find, load, of_null, with_threads
from .stats import ratio_interval


@dataclass(frozen=True)
class Ratio:
    """The ratio of our time to another, with its bootstrap interval."""

    low: float
    value: float
    high: float


Key = tuple[str, ...]


def ratios(record: Record) -> dict[Key, Ratio]:
    """Returns all ratios of a result.

    The keys are backbone, shapes, dtype, caches, placement of the threads, backend, policy and denominator.
    """
    found = {}
    for threads, part in by_threads(record).items():
        for case in part["cases"]:
            for cache in caches_of(case):
                key = (case["backbone"], case["shapes"], case["dtype"], with_threads(cache, threads))
                found |= {(*key, *of): ratio for of, ratio in _ratios_of(case, cache)}
    return found


def _ratios_of(case: dict[str, Any], cache: str) -> Iterator[tuple[Key, Ratio]]:
    for row in case["rows"]:
        if row["family"] != "ours" or row["cache"] != cache or not row["seconds"]:
            continue
        key = (row["name"], row["policy"])
        if other := find(case, cache, "torch fused"):
            yield (*key, "torch fused"), Ratio(*ratio_interval(row["seconds"], other))
        ours, null = of_null(case, row)
        if ours and null:
            yield (*key, "null"), Ratio(*ratio_interval(ours, null))


def compare(old: Record, new: Record, tolerance: float) -> tuple[list[str], list[str], list[str]]:
    """Returns lines on the ratios that have become worse, on those that have become better, and on unmatched ones."""
    before, after = ratios(old), ratios(new)
    worse, better = [], []
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        change = b.value / a.value - 1
        disjoint = b.low > a.high or b.high < a.low
        if disjoint and abs(change) > tolerance:
            line = f"{', '.join(key[:-1])} / {key[-1]}: {a.value:.3f} -> {b.value:.3f} ({change:+.1%})"
            (worse if change > 0 else better).append(line)
    unmatched = [
        f"{', '.join(key)}: only in the {'old' if key in before else 'new'}" for key in before.keys() ^ after.keys()
    ]
    return sorted(worse), sorted(better), sorted(unmatched)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="change that is no change; default: 0.05")
    options = parser.parse_args(argv)
    old, new = load(options.old), load(options.new)
    if (
        old["machine"]["device"] != new["machine"]["device"]
        or old["machine"]["processor"] != new["machine"]["processor"]
    ):
        print("These are of different machines: what has moved may be theirs.")
    worse, better, unmatched = compare(old, new, options.tolerance)
    for title, lines in (("worse", worse), ("better", better), ("not compared", unmatched)):
        print(f"{title}: {len(lines)}", *(f"  {line}" for line in lines), sep="\n")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
