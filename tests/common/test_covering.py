"""Selection of the cases that `make test` runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from .covering import covering


@dataclass(frozen=True)
class Point:
    x: int
    y: int


def test_few_cases_meet_every_pair():
    cases = [{"point": Point(x, y), "dtype": d, "flag": f} for x, y, d, f in product(range(6), range(5), "abc", (0, 1))]
    chosen = [cases[i] for i in covering(cases)]
    assert len(chosen) < 40 < len(cases)

    def flat(case):
        return case["point"].x, case["point"].y, case["dtype"], case["flag"]

    for i in range(4):
        for j in range(i):
            assert {(flat(c)[i], flat(c)[j]) for c in chosen} == {(flat(c)[i], flat(c)[j]) for c in cases}


def test_pairs_that_no_case_has_are_not_required():
    assert covering([{"a": 1, "b": 1}, {"a": 2, "b": 2}]) == [0, 1]


def test_values_of_one_argument_are_all_kept():
    assert covering([{"a": 1}, {"a": 2}]) == [0, 1]
