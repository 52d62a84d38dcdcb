"""Runs the papers' experiments. Finished runs are kept: the same command goes on where it was interrupted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..schedules import fetch
from . import catalogue, report
from .experiment import SCALES
from .measure import collect, load, measure, path_of

EXAMPLES = """\
examples:
  python -m bench.papers --list
  python -m bench.papers rules surfaces --scale cpu
  python -m bench.papers all --scale smoke
  python -m bench.papers all --report                 plots and docs/experiments.md from the results, no training
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    names = list(catalogue.EXPERIMENTS) if "all" in args.names else args.names
    if unknown := [name for name in names if name not in catalogue.EXPERIMENTS]:
        print(f"bench.papers: there is no {unknown[0]!r}; --list shows what there is", file=sys.stderr)
        return 2
    if args.list or not names:
        print(report.overview("gpu" if args.scale == "gpu" else "cpu"))
        return 0
    try:
        for name in names:
            if args.report:
                collect(catalogue.EXPERIMENTS[name], name, args.scale)
            else:
                _measure(name, args)
            _show(name, args.scale)
    except KeyboardInterrupt:
        print("\ninterrupted: finished runs are kept; the same command goes on", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"bench.papers: {error}", file=sys.stderr)
        return 1
    if args.scale == "cpu":
        report.fill()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.papers",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="see --list; or all")
    add("--list", action="store_true", help="the experiments, how many of their runs are there, the verdicts")
    scales = "; ".join(f"{name}: {what}" for name, what in SCALES.items())
    add("--scale", choices=SCALES, default="smoke", help=f"{scales}. Default smoke")
    add("--workers", type=int, metavar="N", help="processes of one thread each; default the cores, 1 with a GPU")
    add(
        "--report",
        action="store_true",
        help="no runs: results, plots and docs/experiments.md of those that are finished",
    )
    return parser


def _measure(name: str, args: argparse.Namespace) -> None:
    print(f"{name}: {catalogue.EXPERIMENTS[name].title}")
    if args.scale != "smoke":
        fetch.fetch()
    measure(catalogue.EXPERIMENTS[name], name, args.scale, args.workers or (1 if args.scale == "gpu" else None))


def _show(name: str, scale: str) -> None:
    experiment, results = catalogue.EXPERIMENTS[name], load(path_of(name, scale))
    report.draw(name, scale)
    if results is not None and results["runs"]:
        print(experiment.table(results["runs"]))
        found = report.verdict_of(experiment, results, scale)
        print(report.conclusion(experiment, found, len(results["runs"]), results["planned"]))


if __name__ == "__main__":
    sys.exit(main())
