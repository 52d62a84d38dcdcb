"""Chooses the default increment and low of ActiveLR on four tasks, from initial rates of 1e-6 to 1e-1.

A sieve with one seed selects the best two increments of each backbone. The grid runs these with two values of low,
three seeds, six rates and two batch sizes. The choice is made by deficits against the plain backbone at its best rate,
in units of half a point of accuracy or 2 % of loss: among the settings whose deficit at their best rate is at most one
unit on every task, it is the one with the smallest deficit at its worst rate.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import fused_adaptive as fa

from ..machine import circumstances
from ..schedules import fetch
from ..step.results import fill, save_runs
from .runner import Run, run_all
from .tasks import TASKS, fit

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "increments.json"
JOURNAL = ROOT / "build" / "experiments" / "increments.jsonl"

RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SIEVE_RATES = (1e-5, 1e-3, 1e-1)
LOWS, SEEDS, BATCHES = (0.9, 0.5), (0, 1, 2), (64, 256)
#: One unit of a deficit: in points of accuracy, and as a share of a loss.
POINTS, SHARE = 0.5, 0.02
#: The deficit of a run that diverges, and the largest deficit in the sieve's means.
DIVERGED, CLIPPED = math.inf, 50.0


@dataclass(frozen=True)
class Family:
    """A backbone: the increments of its sieve, the rates of the plain backbone, its tasks, and its arguments."""

    increments: tuple[float, ...]
    rates: tuple[float, ...]
    tasks: tuple[str, ...]
    arguments: dict[str, Any]


FAMILIES = {
    "AdamW": Family((3e-5, 1e-4, 3e-4, 1e-3, 3e-3), RATES, tuple(TASKS), {"weight_decay": 1e-2}),
    # Plain SGD's best rates are larger. It is not used to train transformers.
    "SGD": Family(
        (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        (*RATES[1:], 1.0),
        ("digits", "fashion", "table"),
        {"momentum": 0.9, "weight_decay": 5e-4},
    ),
}


@dataclass(frozen=True)
class Job:
    """The arguments of a run. ``increment=None``: the backbone without a policy."""

    task: str
    family: str
    increment: float | None
    low: float
    lr: float
    batch: int
    seed: int


def train(job: Job) -> Run:
    task, family = TASKS[job.task], FAMILIES[job.family]

    def optimizer(parameters: list[Tensor], steps: int) -> torch.optim.Optimizer:
        policy = None
        if job.increment is not None:
            policy = fa.ActiveLR(interval=steps, increment=job.increment, low=job.low)
        return getattr(fa, job.family)(parameters, lr=job.lr, policy=policy, **family.arguments)

    began = time.perf_counter()
    model, losses = fit(task, optimizer, seed=job.seed, batch=job.batch, epochs=task.epochs)
    result = task.evaluate(model, task.load()[1])
    return {
        "result": result if math.isfinite(result) and math.isfinite(losses[-1]) else None,
        "train_loss": [float(f"{loss:.4g}") if math.isfinite(loss) else None for loss in losses],
        "seconds": round(time.perf_counter() - began, 1),
    }


# ---- which runs ----


def baselines(family: str, batches: Sequence[int], seeds: Sequence[int]) -> list[Job]:
    rates = FAMILIES[family].rates
    return [
        Job(task, family, None, 0.9, lr, batch, seed)
        for task in FAMILIES[family].tasks
        for batch in batches
        for lr in rates
        for seed in seeds
    ]


def candidates(
    family: str,
    settings: Sequence[tuple[float, float]],
    rates: Sequence[float],
    batches: Sequence[int],
    seeds: Sequence[int],
) -> list[Job]:
    return [
        Job(task, family, increment, low, lr, batch, seed)
        for task in FAMILIES[family].tasks
        for increment, low in settings
        for batch in batches
        for lr in rates
        for seed in seeds
    ]


# ---- deficits ----

Setting = tuple[float, float]
Deficits = dict[Setting, dict[tuple[str, int], dict[float, float]]]


def deficits(runs: Sequence[Run], family: str) -> Deficits:
    """Returns the deficits in units, as means over the seeds: by setting, by task and batch size, by rate."""
    means: dict[tuple[Any, ...], list[float | None]] = {}
    for run in runs:
        if run["family"] == family:
            key = (run["increment"], run["low"], run["task"], run["batch"], run["lr"])
            means.setdefault(key, []).append(run["result"])
    plain: dict[tuple[str, int], list[float]] = {}
    for (increment, _, task, batch, _), results in means.items():
        if increment is None and None not in results:
            plain.setdefault((task, batch), []).append(fmean(results))  # pyright: ignore[reportArgumentType]
    best = {key: (max if TASKS[key[0]].accurate else min)(results) for key, results in plain.items()}
    lost: Deficits = {}
    for (increment, low, task, batch, lr), results in means.items():
        if increment is not None:
            rates = lost.setdefault((increment, low), {}).setdefault((task, batch), {})
            rates[lr] = _units(task, results, best[task, batch])
    return lost


def _units(task: str, results: list[float | None], best: float) -> float:
    if None in results:
        return DIVERGED
    mean = fmean(results)  # pyright: ignore[reportArgumentType]
    return (best - mean) / POINTS if TASKS[task].accurate else (mean / best - 1) / SHARE


def best_of_the_sieve(lost: Deficits) -> list[float]:
    """Returns the two increments with the smallest deficits at their worst rates, in the mean over the tasks."""

    def mean(setting: Setting) -> float:
        return fmean(min(CLIPPED, max(rates.values())) for rates in lost[setting].values())

    return [increment for increment, _ in sorted(lost, key=mean)[:2]]


def summary(lost: Deficits) -> list[dict[str, Any]]:
    """Returns each setting's deficits at its best and worst rates: by task and batch size, and the largest of all."""
    rows = []
    for (increment, low), cells in sorted(lost.items()):
        at_best = {key: min(rates.values()) for key, rates in cells.items()}
        at_worst = {key: max(rates.values()) for key, rates in cells.items()}
        rows.append(
            {
                "increment": increment,
                "low": low,
                "best": max(at_best.values()),
                "worst": max(at_worst.values()),
                "mean_worst": fmean(min(CLIPPED, x) for x in at_worst.values()),
                "tasks": {
                    f"{task}, batch {batch}": [at_best[task, batch], at_worst[task, batch]] for task, batch in cells
                },
            }
        )
    return rows


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the row with the smallest worst deficit among those with a best deficit of at most one unit, or None."""
    return min((row for row in rows if row["best"] <= 1), key=lambda row: row["worst"], default=None)


# ---- the program ----


def measure(families: Sequence[str], workers: int | None) -> dict[str, Any]:
    fetch.fetch()
    began = time.perf_counter()
    runs: list[Run] = []
    for family in families:
        increments = [(increment, 0.9) for increment in FAMILIES[family].increments]
        jobs = baselines(family, BATCHES[:1], SEEDS[:1])
        jobs += candidates(family, increments, SIEVE_RATES, BATCHES[:1], SEEDS[:1])
        sieve = run_all(jobs, train, JOURNAL, workers=workers, describe=_describe)
        two = best_of_the_sieve(deficits(sieve, family))
        settings = [(increment, low) for increment in two for low in LOWS]
        jobs = baselines(family, BATCHES, SEEDS) + candidates(family, settings, RATES, BATCHES, SEEDS)
        grid = run_all(jobs, train, JOURNAL, workers=workers, describe=_describe)
        runs += [{"stage": stage, **run} for stage, part in (("sieve", sieve), ("grid", grid)) for run in part]
    return {
        "schema": 1,
        **circumstances(),
        "seconds_of_last_call": round(time.perf_counter() - began),
        "core_seconds": round(sum(run["seconds"] for run in runs)),
        "runs": runs,
    }


def _describe(run: Run) -> str:
    policy = "plain" if run["increment"] is None else f"increment {run['increment']:g} low {run['low']:g}"
    result = "diverged" if run["result"] is None else f"{run['result']:.4g}"
    return (
        f"{run['task']:<8} {run['family']:<6} {policy:<24} lr {run['lr']:<6g} batch {run['batch']:<4} "
        f"seed {run['seed']}  {result:>8}  {run['seconds']:.1f} s"
    )


def table(results: dict[str, Any]) -> str:
    """Returns the table of the grid in Markdown."""
    lines: list[str] = []
    for family in FAMILIES:
        grid = [run for run in results["runs"] if run["stage"] == "grid" and run["family"] == family]
        if not grid:
            continue
        rows = summary(deficits(grid, family))
        names = list(rows[0]["tasks"])
        lines += [f"| {family}: increment, low | {' | '.join(names)} | largest |", f"|---|{'---:|' * (len(names) + 1)}"]
        choice = chosen(rows)
        for row in rows:
            mark = "**" if row is choice else ""
            cells = [f"{best:.1f} … {worst:.1f}" for best, worst in row["tasks"].values()]
            largest = f"{mark}{row['best']:.1f} … {row['worst']:.1f}{mark}"
            lines.append(f"| {row['increment']:g}, {row['low']:g} | {' | '.join(cells)} | {largest} |")
        lines.append("")
    return "\n".join(lines[:-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.increments", description=__doc__)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--workers", type=int, metavar="N", help="processes of one thread each; default the cores")
    parser.add_argument("--report", action="store_true", help="show the committed results, no training")
    parser.add_argument("--document", type=Path, metavar="MD", help="put the table into this file, between its marks")
    args = parser.parse_args(argv)
    try:
        if args.report:
            results = json.loads(RESULTS.read_text(encoding="utf-8"))
        else:
            results = measure(args.families, args.workers)
            save_runs(results, RESULTS)
    except KeyboardInterrupt:
        print("\ninterrupted: finished runs are kept; the same command goes on", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ImportError) as error:
        print(f"bench.experiments.increments: {error}", file=sys.stderr)
        return 1
    print(table(results))
    if args.document:
        fill(args.document, "increments", table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
