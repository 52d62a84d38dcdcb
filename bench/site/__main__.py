"""Draws the plots of the site: ``python -m bench.site`` writes ``docs/assets/plots/*.svg`` in about a minute.

The trainings run with the reference backend in float64, one thread, and fixed seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from .plots import PLOTS, draw

FOLDER = Path(__file__).parents[2] / "docs" / "assets" / "plots"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.site", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PLOTS)}; default: all")
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write to")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - PLOTS.keys():
        parser.error(f"no plots of these names: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in options.names or PLOTS:
        print(draw(name, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
