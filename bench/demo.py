"""Trains a small MLP on MNIST digits with torch's optimizers and with ours, over several
initial learning rates, and shows which of them mind a bad one."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch

import fused_adaptive as fa
from fused_adaptive import backends

from . import demo_report, demo_runs
from .demo_report import Results
from .demo_runs import METHODS, Digits, Job
from .machine import commit, processor

LRS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
EPOCHS = 20
QUICK_LRS = (1e-5, 1e-3)
QUICK_EPOCHS = 3
INTERRUPTED = 130

EXAMPLES = """\
examples:
  python -m bench.demo                                       everything: 40 runs, some minutes on two cores
  python -m bench.demo --quick                               an impression of it
  python -m bench.demo --methods torch-sgd trainable-sgd --lrs 1e-4 1e-2 1
  python -m bench.demo --report build/demo/demo.json         table and plot of an earlier run, no training
  python -m bench.demo --readme README.md --report bench/results/demo.json

methods:
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.readme:
            return _write_readme(args.readme, args.report)
        _require("rich", "matplotlib", *([] if args.report else ["mlxtend"]))
        with _default_backend(args.backend):
            results = demo_report.load(args.report) if args.report else _measure(args)
        _show(results, args)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError) as error:
        print(f"bench.demo: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _default_backend(name: str) -> Iterator[None]:
    """By the environment, which the processes that train inherit."""
    before = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    os.environ[backends.ENVIRONMENT_VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[backends.ENVIRONMENT_VARIABLE]
        if before is not None:
            os.environ[backends.ENVIRONMENT_VARIABLE] = before


def _parser() -> argparse.ArgumentParser:
    methods = "\n".join(f"  {method.key:<22}{method.label}" for method in METHODS.values())
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo",
        description=__doc__,
        epilog=EXAMPLES + methods,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quick = f"{QUICK_EPOCHS} epochs at {' and '.join(map(demo_report.rate_name, QUICK_LRS))}, unless told otherwise"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (default 0)")
    parser.add_argument("--epochs", type=_positive(int), metavar="N", help=f"default {EPOCHS}")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="default all, see below")
    rates = " ".join(map(demo_report.rate_name, LRS))
    parser.add_argument("--lrs", nargs="+", type=_positive(float), metavar="LR", help=f"default {rates}")
    parser.add_argument("--samples", type=_positive(int), metavar="N", help="use N of the 5000 digits (default all)")
    workers = "processes of one thread each (default: as many as cores; 4 with a GPU); changes no result"
    parser.add_argument("--workers", type=_positive(int), metavar="N", help=workers)
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    backend = "reference (default: it has torch's bits, as the demo shows) or native (faster)"
    parser.add_argument("--backend", default="reference", help=backend)
    out = "where demo.json and demo.png go (default build/demo)"
    parser.add_argument("--out", type=Path, default=Path("build/demo"), metavar="DIR", help=out)
    report = "show these results instead of training; writes demo.png alone"
    parser.add_argument("--report", type=Path, metavar="JSON", help=report)
    readme = "with --report: only rewrite the table between the demo markers of FILE"
    parser.add_argument("--readme", type=Path, metavar="FILE", help=readme)
    return parser


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it into its message
    return parse


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'fused_adaptive[demo]', or use `make demo`")


def _write_readme(readme: Path, report: Path | None) -> int:
    if report is None:
        raise ValueError("--readme needs --report JSON, the results to show")
    text = demo_report.rewrite_block(readme.read_text(encoding="utf-8"), demo_report.load(report))
    readme.write_text(text, encoding="utf-8")
    print(f"wrote the table of {report} into {readme}")
    return 0


def _show(results: Results, args: argparse.Namespace) -> None:
    from rich.console import Console

    from .demo_plot import draw

    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if console.is_terminal:
        console.print(demo_report.terminal_table(results))
    else:
        print(demo_report.markdown_table(results))
    print()
    for line in demo_report.findings(results):
        print(line)
    plot = args.out / "demo.png"
    draw(results, plot)
    written = [plot]
    if not args.report:
        written.append(args.out / "demo.json")
        demo_report.save(results, written[-1])
    print(f"\n{len(results['runs'])} runs in {results['seconds']:.0f} s; wrote {' and '.join(map(str, written))}")


# ---- measuring ----


def _measure(args: argparse.Namespace) -> Results:
    from rich.console import Console

    from .demo_pool import display, run_all

    started = time.perf_counter()
    digits = demo_runs.load_digits(args.seed, args.samples)
    jobs = _jobs(args)
    workers = min(args.workers or _default_workers(args.device), len(jobs))
    results = _circumstances(args, jobs, digits, workers)
    with display(Console(), jobs) as shown:
        runs = run_all(jobs, digits, workers, shown)
    return {**results, "seconds": round(time.perf_counter() - started, 1), "runs": runs}


def _jobs(args: argparse.Namespace) -> list[Job]:
    _check_device(args.device)
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else EPOCHS)
    lrs = args.lrs or (QUICK_LRS if args.quick else LRS)
    methods = args.methods or list(METHODS)
    return [
        Job(method, lr, epochs, args.seed, args.device) for method in dict.fromkeys(methods) for lr in sorted(set(lrs))
    ]


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an assertion is what a torch without CUDA answers
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _default_workers(device: str) -> int:
    if device != "cpu":
        return 4
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _circumstances(args: argparse.Namespace, jobs: list[Job], digits: Digits, workers: int) -> Results:
    """Everything besides the runs that one needs to make them again, or to judge them."""
    steps = -(-len(digits.train_labels) // demo_runs.BATCH)
    methods = {job.method: METHODS[job.method] for job in jobs}
    return {
        "schema": demo_report.SCHEMA,
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "fused_adaptive": fa.__version__,
        },
        "commit": commit(),
        "machine": {
            "device": args.device,
            "cpu": processor(),
            "cores": os.cpu_count(),
            "workers": workers,
            "threads_per_worker": 1,
        },
        "config": {
            "backend": fa.backends.select("auto", [torch.device(args.device)]).name,
            "layers": list(demo_runs.LAYERS),
            "train_digits": len(digits.train_labels),
            "test_digits": len(digits.test_labels),
            "batch": demo_runs.BATCH,
            "epochs": jobs[0].epochs,
            "steps_per_epoch": steps,
            "active_interval": steps,
            "trainable_interval": demo_runs.third(steps),
            "adamw": demo_runs.ADAMW,
            "sgd": demo_runs.SGD,
            "lrs": sorted({job.lr for job in jobs}),
            "methods": {key: {"label": method.label, "baseline": method.baseline} for key, method in methods.items()},
        },
    }


if __name__ == "__main__":
    sys.exit(main())
