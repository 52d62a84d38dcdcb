"""Selects the cases of a product that `make test` runs: enough to meet every pair of values. Others are heavy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import combinations
from typing import Any


def covering(cases: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns positions of cases that have every pair of values that any case has; with one argument, every value.

    Greedy: the next case is the one with the most new pairs, the first of equals.

    Args:
        cases: arguments by name; a dataclass counts as its fields.
    """
    values = [sorted(_values(case).items()) for case in cases]
    missing = [set(combinations(own, min(2, len(own)))) for own in values]
    chosen = []
    while True:
        best = max(range(len(cases)), key=lambda i: len(missing[i]))
        if not missing[best]:
            return chosen
        chosen.append(best)
        met = set(missing[best])
        for pairs in missing:
            pairs -= met


def _values(case: Mapping[str, Any]) -> dict[str, str | Hashable]:
    values = {}
    for name, value in case.items():
        if is_dataclass(value) and not isinstance(value, type):
            values |= {f"{name}.{f.name}": repr(getattr(value, f.name)) for f in fields(value)}
        else:
            values[name] = repr(value)
    return values
