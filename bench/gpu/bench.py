"""The runs of ``bench/gpu_bench.sh``: build for this GPU, then half of the set, in time."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .check import BUILD, Step, run, set_for_builds

NO_GPU = "no GPU: torch finds none here, so nothing was measured"
#: What is kept back for a case that is under way when the time is up.
RESERVE = 45


def command(part: str, seconds: float, output: Path) -> tuple[str, ...]:
    """The call of ``bench.step.run`` that begins no case after ``seconds``."""
    limits = ("--seconds", "4", "--minutes", f"{seconds / 60:.2f}")
    chosen = ("--device", "cuda", "--part", part)
    return sys.executable, "-m", "bench.step.run", *chosen, *limits, "--output", str(output)


def measure(part: str, out: Path, minutes: float, is_built: bool) -> int:
    if not torch.cuda.is_available():
        print(f"gpu_bench: {NO_GPU}")
        return 0
    end = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    set_for_builds()
    if not is_built:
        built = run(BUILD, out, end - time.monotonic())
        print(f"build: {built['outcome']} in {built.get('seconds', 0)} s", flush=True)
        if built["outcome"] != "passed":
            print(built.get("end", built.get("why")))
            return 1
    left, path = end - time.monotonic(), out / f"run_gpu_{part}.json"  # bench.step.run writes it from its start on
    measured = run(Step(f"bench_{part}", command(part, left - RESERVE, path), 600), out, left)
    print(f"bench: {measured['outcome']}\n{measured.get('end', '')}")
    return 0 if path.exists() and measured["outcome"] in ("passed", "timed out") else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_bench.sh", description=__doc__)
    parser.add_argument("part", choices=("1", "2"))
    parser.add_argument("--out", type=Path, default=Path("build/gpu_bench"))
    parser.add_argument("--minutes", type=float, default=7.8, help="limit on the whole (default: %(default)s)")
    parser.add_argument("--built", action="store_true", help="the library is there; build nothing")
    options = parser.parse_args(argv)
    return measure(options.part, options.out, options.minutes, options.built)


if __name__ == "__main__":
    raise SystemExit(main())
