"""The designs of the CUDA kernels against each other: ``python -m bench.gpu.designs``, in one process, step by step.

The step of each design takes turns with the null step of the same design, so that it is seen whether a design makes
memory faster or the step. What is believed of each, and what decides, stands in ``bench/NOTES.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_adaptive.backends import native

from ..machine import describe
from ..step.algorithms import Algorithm
from ..step.ceilings import null_contenders
from ..step.measure import Sampling, run_case
from ..step.rivals import Contender, Steps, contenders
from ..step.sets import Case
from ..step.shapes import parse
from ..step.stats import ratio_interval, summarize

#: Read where a plan is made, and by each null step.
VARIABLE = "FUSED_ADAPTIVE_CUDA_DESIGN"
#: What is compared with the first: that without a word.
ORDERS = ("", "chunks=interleaved", "chunks=ticket")
SET_UP, BLOCKS = "set_up=device", "blocks=2"
F32, BF16 = torch.float32, torch.bfloat16
#: In order of worth: where time runs out, the last are left out.
CASES: tuple[tuple[Case, tuple[str, ...]], ...] = (
    (Case("AdamW", ("fixed", "active"), "10x5M", F32), (*ORDERS, SET_UP)),
    (Case("AdamW", ("fixed", "active"), "10x5M", BF16), (*ORDERS, BLOCKS)),
    (Case("AdamW", ("fixed", "active"), "resnet50", F32), (*ORDERS, SET_UP)),
    (Case("AdamW", ("fixed", "active"), "10000x64", F32), (*ORDERS, SET_UP)),
    (Case("AdamW", ("fixed", "active"), "gpt2", BF16), (*ORDERS, BLOCKS)),
    (Case("AdamW", ("fixed", "active"), "gpt2", F32), (*ORDERS, SET_UP)),
    (Case("AdamW", ("hypergradient",), "resnet50", F32), (*ORDERS, SET_UP)),
    (Case("AdamW", ("fixed",), "misaligned", F32), ORDERS),
    (Case("AdamW", ("fixed", "active"), "1e8", F32), ORDERS),
)


@contextmanager
def chosen(design: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = design
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


class Designed:
    """Steps under a design."""

    def __init__(self, design: str, build: Callable[[Sequence[Tensor]], Steps], params: Sequence[Tensor]) -> None:
        self.design = design
        with chosen(design):
            self.steps = build(params)

    def step(self) -> None:
        with chosen(self.design):
            self.steps.step()


def contenders_of(case: Case, designs: Sequence[str], device: torch.device) -> list[Contender]:
    """Each step and its null step under each design; a null step has no set-up."""
    algorithms = [Algorithm(case.backbone, policy) for policy in case.policies]
    ours = contenders(case.backbone, case.policies, ["native"], ("ours",), case.dtype, device, 1)
    nulls = [c for c in null_contenders(algorithms, device) if c.name == "null, native"]

    def under(contender: Contender, design: str) -> Contender:
        build = partial(Designed, design, contender.build)
        name = f"{contender.name}, {design or 'as it is'}"
        return Contender(name, contender.family, contender.algorithm, build, contender.extra_bytes, contender.most)

    found = [under(c, design) for design in designs for c in ours]
    return found + [under(c, design) for design in designs if design != SET_UP for c in nulls]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a row: its time, and that by the time of the first design, with its 95 % interval."""
    lines = []
    for row in rows:
        kind = row["name"].rpartition(", ")[0]
        first = next(r for r in rows if r["name"] == f"{kind}, as it is" and _same(r, row))
        head = f"{row['name']:<34}{row['policy']:<15}{row['cache']:<8}"
        if not row["seconds"] or not first["seconds"]:
            lines.append(f"{head}{row['why_not'] or first['why_not']}")
            continue
        low, ratio, high = ratio_interval(row["seconds"], first["seconds"])
        lines.append(f"{head}{1e3 * summarize(row['seconds']).median:9.4f} ms  {ratio:.3f} ({low:.3f} to {high:.3f})")
    return lines


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (a["policy"], a["cache"]) == (b["policy"], b["cache"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.designs", description=__doc__)
    parser.add_argument("--samples", type=int, default=100, help="of each contender, at most; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=15, help="of samples for a case; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no case after that")
    parser.add_argument("--output", type=Path, default=Path("build/gpu_bench/designs.json"))
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 0
    device, end = torch.device("cuda"), time.monotonic() + 60 * options.minutes
    if reason := native.why_not([device]):
        print(reason)
        return 1
    sampling = Sampling(options.samples, 20, options.samples, options.seconds, profile=False)
    record: dict[str, Any] = {"schema": 1, "machine": describe(device, torch.get_num_threads()), "cases": []}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for case, designs in CASES:
        head = {"backbone": case.backbone, "shapes": case.shapes, "dtype": str(case.dtype).removeprefix("torch.")}
        if time.monotonic() > end:
            record["cases"].append({**head, "why_not": "no time was left", "rows": []})
            continue
        shapes = parse(case.shapes)
        rows = run_case(contenders_of(case, designs, device), shapes, case.dtype, device, sampling)
        record["cases"].append({**head, "why_not": "", "rows": rows})
        options.output.write_text(json.dumps(record) + "\n")
        print(f"{case.backbone}, {case.shapes}, {head['dtype']}", *table(rows), sep="\n", flush=True)
    options.output.write_text(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
