"""Trains a small MLP on MNIST digits with plain and adaptive optimizers, over six decades of the initial learning
rate and over batch sizes, and shows which of them still train at a bad rate."""

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

from ..machine import commit, processor
from . import report, runs
from .report import Results
from .runs import BASELINES, METHODS, SWAP, Job

LRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SWAP_LRS = (1e-3, 1e-2)
EPOCHS, BATCH = 20, 128
#: A bad and a good rate of each family.
BATCH_LRS = {"SGD": (1e-5, 1e-1), "AdamW": (1e-5, 1e-3)}
BATCHES, BATCH_EPOCHS = (32, 128, 512, 1024), 10
BATCH_METHODS = ("sgd", "active-sgd", "adamw", "active-adamw")
QUICK_LRS, QUICK_EPOCHS, QUICK_BATCHES = (1e-5, 1e-3), 3, (128, 512)
INTERRUPTED = 130

EXAMPLES = """\
examples:
  python -m bench.demo                                       everything, some minutes on two cores
  python -m bench.demo --quick                               an impression of it
  python -m bench.demo --methods sgd active-sgd --lrs 1e-4 1e-2 1
  python -m bench.demo --report build/demo/demo.json         tables and plots of an earlier run, no training
  python -m bench.demo --readme docs/quickstart.md --report bench/results/demo.json

methods:
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.readme:
            return _write_readme(args.readme, args.report)
        _require("rich", "matplotlib", *([] if args.report else ["mlxtend"]))
        with _default_backend(args.backend):
            results = report.load(args.report) if args.report else _measure(args)
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
    """Sets the default backend in the environment, which the training processes inherit."""
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
    add = parser.add_argument
    quick = f"{QUICK_EPOCHS} epochs at {' and '.join(map(report.rate_name, QUICK_LRS))}, unless told otherwise"
    add("--quick", action="store_true", help=quick)
    add("--seed", type=int, default=0, help="of the split, the weights and the batches (default 0)")
    epochs = f"of all runs; default {EPOCHS}, and {BATCH_EPOCHS} for the batch sizes"
    add("--epochs", type=_positive(int), metavar="N", help=epochs)
    add("--methods", nargs="+", choices=list(METHODS), metavar="METHOD", help="default all, see below")
    add("--lrs", nargs="+", type=_positive(float), metavar="LR", help="default 1e-6 … 1e-1")
    batches = f"of the second table; default {' '.join(map(str, BATCHES))}"
    add("--batches", nargs="*", type=_positive(int), metavar="N", help=batches)
    add("--samples", type=_positive(int), metavar="N", help="use N of the 5000 digits (default all)")
    workers = "processes of one thread each (default: as many as cores; 4 with a GPU); changes no result"
    add("--workers", type=_positive(int), metavar="N", help=workers)
    add("--device", default="cpu", help="a torch device (default cpu)")
    add("--backend", default="auto", help="of our optimizers (default auto: the fastest that there is)")
    out = "where demo.json and the plots go (default build/demo)"
    add("--out", type=Path, default=Path("build/demo"), metavar="DIR", help=out)
    add("--report", type=Path, metavar="JSON", help="show these results instead of training; writes the plots alone")
    readme = "with --report: only rewrite the table between the demo markers of FILE"
    add("--readme", type=Path, metavar="FILE", help=readme)
    return parser


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse prints it in its error message
    return parse


def _require(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'fused_adaptive[demo]', or use `make demo`")


def _write_readme(readme: Path, results: Path | None) -> int:
    if results is None:
        raise ValueError("--readme needs --report JSON, the results to show")
    text = report.rewrite_block(readme.read_text(encoding="utf-8"), report.load(results))
    readme.write_text(text, encoding="utf-8")
    print(f"wrote the table of {results} into {readme}")
    return 0


def _show(results: Results, args: argparse.Namespace) -> None:
    from rich.console import Console

    from .plot import draw

    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    for title, table in report.tables(results):
        if console.is_terminal:
            console.print(report.terminal(title, table))
        else:
            print(f"{title}\n\n{report.markdown(table)}\n")
    for line in report.findings(results):
        print(line)
    written = draw(results, args.out / "demo.png", args.out / "demo_batches.png")
    if not args.report:
        written.append(args.out / "demo.json")
        report.save(results, written[-1])
    names = ", ".join(map(str, written))
    print(f"\n{len(results['runs'])} runs in {results['seconds']:.0f} s; wrote {names}")


# ---- measuring ----


def _measure(args: argparse.Namespace) -> Results:
    from ..experiments.runner import run_all

    _check_device(args.device)
    started = time.perf_counter()
    workers = args.workers or (None if args.device == "cpu" else 4)
    config = _grids(args)
    jobs = [Job(*key, args.seed, args.samples, args.device) for key in _keys(config)]
    finished = run_all(jobs, runs.train, workers=workers, describe=_line)
    circumstances = _circumstances(args, config)
    return {**circumstances, "seconds": round(time.perf_counter() - started, 1), "runs": finished}


def _line(run: Results) -> str:
    name = {**METHODS, **SWAP}[run["method"]].label
    outcome = "diverged" if run["diverged"] else f"{run['accuracy']:.1f} %"
    rate = report.rate_name(run["lr"])
    return f"{name:<20} lr {rate:<5} batch {run['batch']:<5}{outcome:>9}  {run['seconds']:.1f} s"


def _grids(args: argparse.Namespace) -> Results:
    """Returns the configuration of the runs: the initial rates, the swap and the batch sizes."""
    methods = list(dict.fromkeys(args.methods or METHODS))
    epochs = args.epochs or (QUICK_EPOCHS if args.quick else EPOCHS)
    batches = (QUICK_BATCHES if args.quick else BATCHES) if args.batches is None else args.batches
    batch_methods = [key for key in methods if key in BATCH_METHODS and batches]
    lrs = sorted(set(args.lrs or (QUICK_LRS if args.quick else LRS)))
    return {
        "rates": {"methods": methods, "lrs": lrs, "epochs": epochs, "batch": BATCH},
        "swap": {"lrs": list(SWAP_LRS if "adamw" in methods else ()), "epochs": epochs, "batch": BATCH},
        "batches": {
            "lrs": {key: list(BATCH_LRS[METHODS[key].family]) for key in batch_methods},
            "batches": list(batches),
            "epochs": args.epochs or (QUICK_EPOCHS if args.quick else BATCH_EPOCHS),
        },
    }


def _keys(config: Results) -> list[tuple[str, float, int, int]]:
    """Returns method, rate, batch size and epochs of each run, without duplicates."""
    rates, swap, batches = config["rates"], config["swap"], config["batches"]
    keys = [(key, lr, rates["batch"], rates["epochs"]) for key in rates["methods"] for lr in rates["lrs"]]
    keys += [(key, lr, swap["batch"], swap["epochs"]) for key in SWAP for lr in swap["lrs"]]
    for key, lrs in batches["lrs"].items():
        keys += [(key, lr, batch, batches["epochs"]) for lr in lrs for batch in batches["batches"]]
    return list(dict.fromkeys(keys))


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA raises AssertionError
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _circumstances(args: argparse.Namespace, grids: Results) -> Results:
    """Returns the information besides the runs that is needed to reproduce them."""
    train, test = runs.load_digits(args.seed, args.samples)
    steps = -(-len(train[1]) // BATCH)
    methods = {
        key: {"label": method.label, "family": method.family, "baseline": BASELINES.get(method.family)}
        for key, method in {**METHODS, **SWAP}.items()
    }
    return {
        "schema": report.SCHEMA,
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "fused_adaptive": fa.__version__,
        },
        "commit": commit(),
        "machine": {"device": args.device, "cpu": processor(), "cores": os.cpu_count(), "threads_per_worker": 1},
        "config": {
            "backend": fa.backends.select(args.backend, [torch.device(args.device)]).name,
            "layers": list(runs.LAYERS),
            "train_digits": len(train[1]),
            "test_digits": len(test[1]),
            "active_interval": steps,
            "trainable_interval": runs.third(steps),
            "adamw": runs.ADAMW,
            "sgd": runs.SGD,
            "methods": methods,
            **grids,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
