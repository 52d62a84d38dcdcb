"""Runs of the experiments: saved as they finish, resumed, and stopped with the call."""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from bench.experiments import increments, runner
from bench.experiments.runner import run_all


@dataclass(frozen=True)
class Job:
    number: int
    folder: str


def square(job: Job) -> dict[str, Any]:
    """Writes a file at each call."""
    with (Path(job.folder) / "calls").open("a", encoding="utf-8") as file:
        file.write(f"{job.number}\n")
    if job.number < 0:
        raise ValueError("no square")
    return {"square": job.number**2}


def calls(folder: Path) -> list[int]:
    path = folder / "calls"
    numbers = sorted(map(int, path.read_text(encoding="utf-8").split())) if path.exists() else []
    path.unlink(missing_ok=True)
    return numbers


def jobs(folder: Path, *numbers: int) -> list[Job]:
    return [Job(number, str(folder)) for number in numbers]


def test_runs_are_in_the_order_of_the_jobs_and_are_not_repeated(tmp_path: Path) -> None:
    journal = tmp_path / "runs.jsonl"
    made = run_all(jobs(tmp_path, 3, 1, 2), square, journal, workers=2)
    assert made == [{"number": n, "folder": str(tmp_path), "square": n * n} for n in (3, 1, 2)]
    assert calls(tmp_path) == [1, 2, 3]
    again = run_all(jobs(tmp_path, 1, 4, 3), square, journal, workers=2)
    assert [run["square"] for run in again] == [1, 16, 9]
    assert calls(tmp_path) == [4]


def test_a_truncated_line_is_run_again(tmp_path: Path) -> None:
    journal = tmp_path / "runs.jsonl"
    run_all(jobs(tmp_path, 1, 2), square, journal, workers=1)
    text = journal.read_text(encoding="utf-8")
    journal.write_text(text[:-10], encoding="utf-8")
    calls(tmp_path)
    for _ in range(2):
        assert [run["square"] for run in run_all(jobs(tmp_path, 1, 2), square, journal, workers=1)] == [1, 4]
    assert calls(tmp_path) == [2]


def test_runs_of_other_code_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "runs.jsonl"
    run_all(jobs(tmp_path, 1), square, journal, workers=1)
    monkeypatch.setattr(runner, "_code", lambda: "changed")
    run_all(jobs(tmp_path, 1), square, journal, workers=1)
    assert calls(tmp_path) == [1, 1]


def test_a_failure_ends_the_processes_and_keeps_finished_runs(tmp_path: Path) -> None:
    journal = tmp_path / "runs.jsonl"
    with pytest.raises(ValueError, match="no square"):
        run_all(jobs(tmp_path, 1, -1, *range(2, 50)), square, journal, workers=1)
    assert not multiprocessing.active_children()
    entries = [json.loads(line) for line in journal.read_text(encoding="utf-8").split("\n") if line]
    assert entries[0]["run"] == {"square": 1}


# ---- evaluation ----


def made_up(**results: list[float | None]) -> list[dict[str, Any]]:
    """Returns runs on digits at two rates, by increment; ``plain`` is the run of the backbone."""
    return [
        {
            "family": "AdamW",
            "task": "digits",
            "increment": None if name == "plain" else float(name.removeprefix("a")),
            "low": 0.9,
            "lr": lr,
            "batch": 64,
            "seed": seed,
            "result": result,
        }
        for name, pair in results.items()
        for lr, result in zip((1e-5, 1e-3), pair, strict=True)
        for seed in (0, 1)
    ]


def test_the_choice_has_the_best_worst_case_among_those_good_at_their_best() -> None:
    # The best plain result is 94. At their best, 1 loses 2 points, 2 and 3 lose 0.5. 3 has the better worst case.
    lost = increments.deficits(made_up(plain=[50.0, 94.0], a1=[92.0, 92.0], a2=[80.0, 93.5], a3=[93.5, 91.0]), "AdamW")
    assert lost[3.0, 0.9] == {("digits", 64): {1e-5: 1.0, 1e-3: 6.0}}
    rows = increments.summary(lost)
    choice = increments.chosen(rows)
    assert choice is not None
    assert (choice["increment"], choice["best"], choice["worst"]) == (3.0, 1.0, 6.0)
    assert increments.best_of_the_sieve(lost) == [1.0, 3.0]


def test_a_divergence_is_the_worst_result() -> None:
    lost = increments.deficits(made_up(plain=[None, 94.0], a1=[94.0, None]), "AdamW")
    (row,) = increments.summary(lost)
    assert row["worst"] == math.inf
    assert row["best"] == 0


def test_nothing_is_chosen_if_all_lose_too_much() -> None:
    lost = increments.deficits(made_up(plain=[50.0, 94.0], a1=[93.0, 93.0]), "AdamW")
    assert increments.chosen(increments.summary(lost)) is None
