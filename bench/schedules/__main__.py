"""Trains ResNet-20 on Fashion-MNIST with AALR, ASLR and common schedules, without tuning any of them.

Finished runs are saved in build/controllers at once, so that the same command resumes an interrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console

import fused_adaptive as fa

from ..experiments.runner import run_all
from ..machine import processor
from ..step.results import fill, save_runs
from . import data, fetch, report
from .runs import METHODS, Job, Run, train

ROOT = Path(__file__).resolve().parents[2]
#: A first rate at which training with SGD diverges.
DIVERGENT_LR = 10.0


@dataclass(frozen=True)
class Scale:
    """How much is trained.

    Args:
        images: the number of training images; None: all.
        test: the number of test images; None: all.
        epochs: the number of epochs of a run.
        seeds: the number of seeds.
        side: the side of the images in pixels; 28 in the data sets.
        channels: the channels of ResNet-20's first stage.
        patience: AALR's patience in epochs. AALR's default, 10, is meant for the 200 epochs of the paper.
        batch_sizes: the batch sizes of AALR.
        other_batch_sizes: the batch sizes of the other methods.
        divergent: epochs and AALR's patience of the run that starts at a divergent rate. It has more epochs, since AALR
            needs some to find a better rate.
    """

    images: int | None
    test: int | None
    epochs: int
    seeds: int
    side: int = 28
    channels: int = 16
    patience: int = 10
    batch_sizes: tuple[int, ...] = (32, 128, 512)
    other_batch_sizes: tuple[int, ...] = (128,)
    divergent: tuple[int, int] = (30, 10)


SCALES = {
    "smoke": Scale(
        images=256, test=200, epochs=2, seeds=1, side=14, channels=4, patience=1, batch_sizes=(128,), divergent=(2, 1)
    ),
    "cpu": Scale(images=10_000, test=None, epochs=10, seeds=2, side=14, patience=3),
    "gpu": Scale(images=None, test=None, epochs=200, seeds=3, other_batch_sizes=(32, 128, 512), divergent=(200, 10)),
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        results = json.loads(args.report.read_text(encoding="utf-8")) if args.report else _measure(args)
        report.show(results, Console())
        if results["runs"]:
            report.plot(results, args.output.with_suffix(".png"))
        if args.document:
            fill(args.document, "runs", report.markdown(results))
    except KeyboardInterrupt:
        print("\ninterrupted: finished runs are kept; the same command goes on", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"bench.schedules: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.schedules", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scale", choices=SCALES, default="smoke", help="default smoke: seconds; cpu: hours; gpu: all data")
    add("--data", choices=data.NAMES, default=data.NAMES[0])
    add("--data-directory", type=Path, metavar="DIR", help="of Fashion-MNIST; default build/data/fashion-mnist")
    add("--images", type=int, metavar="N", help="training images, in place of the scale's")
    add("--epochs", type=int, metavar="N", help="in place of the scale's")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS))
    add("--workers", type=int, metavar="N", help="processes of one thread each; default the cores, 1 with a GPU")
    add("--device", help="default cpu; cuda for --scale gpu")
    output = ROOT / "build" / "controllers" / "controllers.json"
    add("--output", type=Path, default=output, help="JSON; the plot goes beside it. Default build/controllers/")
    add("--report", type=Path, metavar="JSON", help="table and plot of earlier results, no training")
    add("--document", type=Path, metavar="MD", help="puts the table into this file, between its marks")
    return parser


def jobs_of(scale: Scale, data: str, images: int, methods: Sequence[str]) -> list[Job]:
    """Returns the jobs of all runs, in the order of the seeds."""

    def job(method: str, size: int, seed: int, lr: float) -> Job:
        return Job(method, size, seed, lr, scale.epochs, images, data, scale.side, scale.channels, scale.patience)

    jobs = []
    if "aalr" in methods:
        epochs, patience = scale.divergent
        short = job("aalr", 128, 0, DIVERGENT_LR)
        jobs += dict.fromkeys([replace(short, epochs=epochs, patience=patience), short])
    for seed in range(scale.seeds):
        for method in methods:
            sizes = scale.batch_sizes if method == "aalr" else scale.other_batch_sizes
            jobs += [job(method, size, seed, METHODS[method].lr) for size in sizes]
    return jobs


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: value for name in ("images", "epochs") if (value := getattr(args, name)) is not None}
    scale = replace(SCALES[args.scale], **given)
    device = args.device or ("cuda" if args.scale == "gpu" else "cpu")
    if args.data == "fashion-mnist" and args.data_directory is None:
        fetch.fetch()
    splits = data.load(args.data, scale.images, scale.test, scale.side, device, args.data_directory)
    jobs = jobs_of(scale, args.data, len(splits.train), args.methods)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    workers = args.workers or (1 if device != "cpu" else os.cpu_count() or 1)
    one = partial(_train, test=scale.test, device=device, directory=args.data_directory)
    journal = ROOT / "build" / "controllers" / "runs.jsonl"
    runs = run_all(jobs, one, journal, workers=workers, describe=_describe)
    runs.sort(key=lambda r: (r["seed"], list(METHODS).index(r["method"]), r["lr"], r["batch_size"]))
    results = {
        "schema": 1,
        "config": {"scale": args.scale, "data": args.data, "device": device, "workers": workers, **asdict(scale)},
        "paper_scale": _departures(scale),
        "machine": _machine(device),
        "runs": runs,
    }
    save_runs(results, args.output)
    return results


def _departures(scale: Scale) -> str:
    """Returns a sentence on how these runs differ from the paper's."""
    images = scale.images or "all"
    return (
        f"{images} training images of {scale.side}×{scale.side} pixels and {scale.epochs} epochs with AALR's patience "
        f"{scale.patience}; the paper trains on all 60000 of 28×28 for over 200 epochs with patience 10"
    )


def _machine(device: str) -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "fused_adaptive": fa.__version__,
    }


def _describe(run: Run) -> str:
    accuracy = f"{run['test_accuracy']:.2f} %" if not run["diverged"] else "diverged"
    label = f"{run['method']} lr {run['lr']:g} batch {run['batch_size']} seed {run['seed']}"
    return f"{label:<44}{accuracy:>10}{run['seconds']:>9.1f} s"


# ---- functions that run in the workers ----


def _train(job: Job, test: int | None, device: str, directory: Path | None) -> Run:
    return train(job, _splits(job.data, job.images, test, job.side, device, directory))


_splits = cache(data.load)


if __name__ == "__main__":
    sys.exit(main())
