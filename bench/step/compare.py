"""Has a step become slower? ``python -m bench.step.compare old.json new.json`` compares two results by their ratios.

Times of two runs are not comparable, their ratios to what ran beside them are: to torch's fused optimizer, and by the
byte to the null step of the same streams. A ratio has moved where the bootstrap intervals of both runs do not meet and
the medians are further apart than ``--tolerance``. The exit status is 1 if one has become worse.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .results import Record, caches_of, find, load, of_null
from .stats import ratio_interval


@dataclass(frozen=True)
class Ratio:
    """Ours by something else, with its interval."""

    low: float
    value: float
    high: float


Key = tuple[str, ...]


def ratios(record: Record) -> dict[Key, Ratio]:
    """Every ratio of ours in these results, by backbone, shapes, dtype, cache, backend, policy and what it is to."""
    found = {}
    for case in record["cases"]:
        for cache in caches_of(case):
            for row in case["rows"]:
                if row["family"] != "ours" or row["cache"] != cache or not row["seconds"]:
                    continue
                key = (case["backbone"], case["shapes"], case["dtype"], cache, row["name"], row["policy"])
                if other := find(case, cache, "torch fused"):
                    found[(*key, "torch fused")] = Ratio(*ratio_interval(row["seconds"], other))
                ours, null = of_null(case, row)
                if ours and null:
                    found[(*key, "null")] = Ratio(*ratio_interval(ours, null))
    return found


def compare(old: Record, new: Record, tolerance: float) -> tuple[list[str], list[str], list[str]]:
    """Sentences on what has become worse, what better, and what only one of them has."""
    before, after = ratios(old), ratios(new)
    worse, better = [], []
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        change = b.value / a.value - 1
        apart = b.low > a.high or b.high < a.low
        if apart and abs(change) > tolerance:
            said = f"{', '.join(key[:-1])} / {key[-1]}: {a.value:.3f} -> {b.value:.3f} ({change:+.1%})"
            (worse if change > 0 else better).append(said)
    lacking = [
        f"{', '.join(key)}: only in the {'old' if key in before else 'new'}" for key in before.keys() ^ after.keys()
    ]
    return sorted(worse), sorted(better), sorted(lacking)


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
    worse, better, lacking = compare(old, new, options.tolerance)
    for title, sentences in (("worse", worse), ("better", better), ("not compared", lacking)):
        print(f"{title}: {len(sentences)}", *(f"  {sentence}" for sentence in sentences), sep="\n")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
