"""Makes one file of several results of bench.step.run: ``python -m bench.step.merge 1.json 2.json … merged.json``.

They must be of the same machine and code. Where two have the same contender in the same case, caches and placement of
the threads, the first file's samples are taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .results import Record, load, save

#: What must be equal in the description of the machine.
SAME = ("device", "processor", "torch", "commit")


def merge(records: Sequence[Record]) -> Record:
    """Returns one result with the cases of all, and the machine, settings and training steps of the last that has any.

    Raises:
        ValueError: if the results are of different machines or of different code.
    """
    for record in records[1:]:
        for key in SAME:
            values = [r["machine"].get(key) for r in (records[0], record)]
            if values[0] != values[1]:
                raise ValueError(f"the results differ in {key}: {values[0]}, {values[1]}")
    merged = dict(records[-1])
    merged["growth"] = _first_of([r["growth"] for r in records], _point)
    merged["end_to_end"] = next((r["end_to_end"] for r in reversed(records) if r["end_to_end"]), [])
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        for case in record["cases"]:
            policies = tuple(dict.fromkeys(row["policy"] for row in case["rows"] if row["family"] == "ours"))
            key = (case["backbone"], case["shapes"], case["dtype"], policies)
            cases.setdefault(key, []).append(case)
    merged["cases"] = [same[0] | {"rows": _first_of([case["rows"] for case in same], _row)} for same in cases.values()]
    return merged


def _first_of(lists: Sequence[list[dict[str, Any]]], place: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Returns the entries of all lists, without those whose place an earlier list has entries of."""
    found: list[dict[str, Any]] = []
    for entries in lists:
        taken = {place(entry) for entry in found}
        found += [entry for entry in entries if place(entry) not in taken]
    return found


def _row(row: dict[str, Any]) -> tuple[str, str]:
    return row["cache"], row.get("threads", "")


def _point(point: dict[str, Any]) -> tuple[str, int, str]:
    return point["over"], point["n"], point.get("threads", "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step.merge", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="results.json")
    parser.add_argument("merged", type=Path)
    options = parser.parse_args(argv)
    save(merge([load(path) for path in options.results]), options.merged)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
