"""Tests ActiveLR's defaults where they might do harm: over 200 intervals, and in fine-tuning.

Long runs: the MLP on digits from three initial rates, to see whether the learning rates grow without bound.
Fine-tuning: the same MLP, trained with AdamW before, learns 300 digits rotated by 30 degrees at lr 1e-5, with the
default increment, with the settings that the constructor's warning advises, and with plain AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fused_adaptive as fa

from ..machine import circumstances
from ..step.results import fill, save_runs
from .increments import ROOT, SEEDS
from .runner import Run, run_all
from .tasks import TASKS, Data, fit

RESULTS = ROOT / "bench" / "results" / "defaults.json"
JOURNAL = ROOT / "build" / "experiments" / "defaults.jsonl"

INTERVALS, BATCH = 200, 64
LONG_RATES = {"ActiveAdamW": (1e-5, 1e-3, 1e-1), "ActiveSGD": (1e-5, 1e-3, 1e-1)}
#: Fine-tuning: the number of rotated digits, their angle in degrees, the rate and the epochs.
NEW, TURN, FINE_LR, FINE_EPOCHS = 300, 30.0, 1e-5, 20


@dataclass(frozen=True)
class Long:
    optimizer: str
    lr: float


@dataclass(frozen=True)
class FineTuning:
    """``method``: a key of :data:`FINE_METHODS`."""

    method: str
    seed: int


FINE_METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "default": {"policy": {}},
    "high=0.1": {"policy": {"high": 0.1}},
    "increment=1e-6": {"policy": {"increment": 1e-6}},
}


def train(job: Long | FineTuning) -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ActiveLR: lr=", UserWarning)  # these runs test what the warning advises
        return _long(job) if isinstance(job, Long) else _fine_tuning(job)


def _long(job: Long) -> Run:
    rates: list[list[float]] = []

    def optimizer(parameters: list[Tensor], steps: int) -> torch.optim.Optimizer:
        arguments = {"momentum": 0.9} if job.optimizer == "ActiveSGD" else {}
        return getattr(fa, job.optimizer)(parameters, lr=job.lr, interval=steps, **arguments)

    def after_epoch(epoch: int, made: torch.optim.Optimizer) -> None:
        if epoch % 10 == 0:
            assert isinstance(made, fa.AdaptiveOptimizer)
            found = made.learning_rates()[0]
            rates.append([float(f"{found[key]:.3g}") for key in ("min", "mean", "max")])

    task = TASKS["digits"]
    model, losses = fit(task, optimizer, seed=0, batch=BATCH, epochs=INTERVALS, after_epoch=after_epoch)
    result = task.evaluate(model, task.load()[1])
    return {"rates": rates, "train_loss": losses[-1], "result": result if math.isfinite(result) else None}


@cache
def _trained(seed: int) -> dict[str, Tensor]:
    task = TASKS["digits"]
    model, _ = fit(task, lambda p, _: fa.AdamW(p, lr=1e-3), seed=seed, batch=BATCH, epochs=task.epochs)
    return model.state_dict()


@cache
def turned() -> tuple[Data, Data]:
    """Returns the rotated test digits: the ones to learn and the held-out ones."""
    images, labels = TASKS["digits"].load()[1]
    angle = torch.tensor(TURN / 180 * math.pi)
    row = [[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]]
    grid = functional.affine_grid(torch.tensor(row).expand(len(labels), 2, 3), [len(labels), 1, 28, 28], False)
    background = images.min()
    square = images.view(-1, 1, 28, 28) - background
    rotated = (functional.grid_sample(square, grid, align_corners=False) + background).flatten(1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rotated, labels = rotated[order], labels[order]
    return (rotated[:NEW], labels[:NEW]), (rotated[NEW:], labels[NEW:])


def _fine_tuning(job: FineTuning) -> Run:
    task = TASKS["digits"]
    arguments = FINE_METHODS[job.method]

    def optimizer(parameters: list[Tensor], steps: int) -> torch.optim.Optimizer:
        policy = fa.ActiveLR(interval=steps, **arguments["policy"]) if arguments else None
        return fa.AdamW(parameters, lr=FINE_LR, policy=policy)

    new, held_out = turned()
    model: nn.Module = task.build()
    model.load_state_dict(_trained(job.seed))
    before = {"new": task.evaluate(model, held_out), "old": task.evaluate(model, task.load()[1])}
    fit(task, optimizer, seed=job.seed, batch=BATCH, epochs=FINE_EPOCHS, model=model, data=new)
    after = {"new": task.evaluate(model, held_out), "old": task.evaluate(model, task.load()[1])}
    return {"before": before, "after": after}


def summary(results: dict[str, Any]) -> str:
    """Returns the tables in Markdown."""
    lines = [
        f"| optimizer, initial lr | accuracy %, {INTERVALS} intervals | mean rate at 10, 100, 200 | largest rate |",
        "|---|---:|---:|---:|",
    ]
    for run in results["runs"]:
        if "optimizer" in run:
            means = ", ".join(f"{run['rates'][i][1]:g}" for i in (0, 9, -1))
            largest = max(rates[2] for rates in run["rates"])
            accuracy = "diverged" if run["result"] is None else f"{run['result']:.1f}"
            lines.append(f"| {run['optimizer']}, {run['lr']:g} | {accuracy} | {means} | {largest:g} |")
    lines += ["", f"| fine-tuning at lr {FINE_LR:g} | new digits % | old digits % |", "|---|---:|---:|"]
    for method in FINE_METHODS:
        runs = [run for run in results["runs"] if run.get("method") == method]
        new, old = (fmean(run["after"][key] for run in runs) for key in ("new", "old"))
        lines.append(f"| {method} | {new:.1f} | {old:.1f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.defaults", description=__doc__)
    parser.add_argument("--workers", type=int, metavar="N", help="processes of one thread each; default the cores")
    parser.add_argument("--report", action="store_true", help="show the committed results, no training")
    parser.add_argument("--document", type=Path, metavar="MD", help="put the tables into this file, between its marks")
    args = parser.parse_args(argv)
    if not args.report:
        jobs: list[Long | FineTuning] = [Long(name, lr) for name, lrs in LONG_RATES.items() for lr in lrs]
        jobs += [FineTuning(method, seed) for method in FINE_METHODS for seed in SEEDS]
        results = {
            "schema": 1,
            **circumstances(),
            "runs": run_all(jobs, train, JOURNAL, workers=args.workers),
        }
        save_runs(results, RESULTS)
    tables = summary(json.loads(RESULTS.read_text(encoding="utf-8")))
    print(tables)
    if args.document:
        fill(args.document, "defaults", tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
