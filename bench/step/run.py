"""Measures the steps of our optimizers against the memory bandwidth and against other implementations: ``make bench``.

Optimizers take turns, step by step, in one process, so that other load on the machine affects all of them equally.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fused_adaptive as fa

from ..machine import describe
from . import report, results
from .algorithms import BACKBONES, POLICIES, Algorithm
from .ceilings import bandwidth_contenders, null_contenders
from .end_to_end import measure_end_to_end
from .growth import ELEMENTS, ELEMENTS_OF_EACH, TENSORS, measure_growth
from .measure import Sampling, run_case
from .rivals import FAMILIES, contenders
from .sets import Case, default_set, quick_set
from .shapes import LISTS, parse

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("cases", "growth", "end-to-end")


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step.run", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="under a minute: does everything work here?")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    add("--threads", type=int, help="of the CPU; default: torch's")
    group = parser.add_argument_group("what to measure", "With none of these, a set chosen for the documentation.")
    add = group.add_argument
    add("--shapes", nargs="+", metavar="LIST", help=f"{', '.join(LISTS)}; a size as 1e7; 20x1e4. Default: 10x5M")
    add("--backbones", nargs="+", choices=list(BACKBONES), help="default: AdamW")
    add("--policies", nargs="+", choices=POLICIES, help="default: fixed active")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="of the parameters; default: float32")
    add("--rivals", nargs="*", choices=[f for f in FAMILIES if f != "ours"], help="default: all")
    add("--backends", nargs="+", choices=fa.backends.NAMES, help="ours; default: all but the reference")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--part", type=int, choices=(1, 2), help="one half of the set, for machines that are lent for minutes")
    group = parser.add_argument_group("how long")
    add = group.add_argument
    add("--samples", type=int, help="of each contender, at most; default: 100, on a CPU 50")
    add("--seconds", type=float, help="of samples for a case; default: 15")
    add("--most", type=float, default=1e9, help="elements, of the curves of growth; default: %(default)g")
    add("--minutes", type=float, default=1e9, help="begin no case after that")
    parser.add_argument("--output", type=Path, default=Path("build/bench/run.json"), help="default: %(default)s")
    return parser.parse_args(argv)


def cases_of(options: argparse.Namespace, device: torch.device) -> list[Case]:
    chosen = (options.shapes, options.backbones, options.policies, options.dtypes, options.rivals)
    if all(choice is None for choice in chosen):
        every = quick_set() if options.quick else default_set(device.type)
        return [case for case in every if options.part in (None, case.part)]
    families = FAMILIES if options.rivals is None else ("ours", *options.rivals)
    return [
        Case(backbone, options.policies or ("fixed", "active"), shapes, DTYPES[dtype], families)
        for backbone in options.backbones or ("AdamW",)
        for shapes in options.shapes or ("10x5M",)
        for dtype in options.dtypes or ("float32",)
    ]


def measure_case(
    case: Case, backends: Sequence[str], device: torch.device, sampling: Sampling, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures one case."""
    begin, shapes = time.monotonic(), parse(case.shapes)
    algorithms = [a for a in (Algorithm(case.backbone, p) for p in case.policies) if not a.why_not()]
    ours = contenders(case.backbone, case.policies, backends, case.families, case.dtype, device, len(shapes.shapes))
    # Memory goes to the first contenders: our optimizers, torch's fused optimizer and the ceilings.
    first = [c for c in ours if c.family == "ours" or c.name == "torch fused"]
    taking_part = [
        *first,
        *bandwidth_contenders(device),
        *null_contenders(algorithms, device),
        *(c for c in ours if c not in first),
    ]
    rows = run_case(taking_part, shapes, case.dtype, device, sampling, say)
    return {
        **head_of(case),
        "took": round(time.monotonic() - begin, 1),
        "load": round(os.getloadavg()[0], 2),
        "why_not": "",
        "rows": rows,
    }


def head_of(case: Case) -> dict[str, Any]:
    shapes = parse(case.shapes)
    return {
        "backbone": case.backbone,
        "shapes": shapes.name,
        "tensors": len(shapes.shapes),
        "numel": shapes.numel,
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments_of(argv)
    begin = time.monotonic()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.threads:
        torch.set_num_threads(options.threads)
    # By default, a function that reaches the limit runs uncompiled without an error.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    backends = options.backends or [n for n in fa.backends.NAMES if n != "reference"]
    samples = options.samples or (100 if device.type == "cuda" else 15 if options.quick else 50)
    seconds = options.seconds or (2.0 if options.quick else 15.0)
    sampling = Sampling(samples, seconds=seconds) if device.type == "cpu" else Sampling(samples, 20, samples, seconds)
    record: dict[str, Any] = {
        "schema": results.SCHEMA,
        "machine": describe(device, torch.get_num_threads()),
        "settings": {"samples": sampling.samples, "seconds": sampling.seconds, "quick": options.quick},
        "cases": [],
        "growth": [],
        "end_to_end": [],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results.save(record, options.output)  # saved after every part, so that an interrupted run leaves results

    def in_time(share: float = 1.0) -> bool:
        return time.monotonic() - begin < share * 60 * options.minutes

    # Cases leave a part of the time for growth and end to end, which come after them.
    share_of_cases = 0.7 if options.part != 1 and len(options.parts) > 1 else 1.0

    def say(text: str) -> None:
        print(f"  {time.monotonic() - begin:6.0f} s  {text}", flush=True)

    brief = Sampling(options.samples or (15 if options.quick else 100), 3, 3, sampling.seconds / 5, profile=False)
    most = min(options.most, 1e7) if options.quick else options.most
    tensors = [n for n in TENSORS if n * ELEMENTS_OF_EACH <= most and (n <= 1000 or not options.quick)]
    elements = [size for size in ELEMENTS if float(size) <= most]
    grows = "growth" in options.parts and options.part in (None, 2)
    if grows:  # over tensors before the cases, which leave a fragmented heap
        record["growth"] += measure_growth(device, backends, brief, tensors, [], in_time, say)
        results.save(record, options.output)
    for case in cases_of(options, device) if "cases" in options.parts else ():
        print(f"{case.backbone} ({', '.join(case.policies)}), {case.shapes}, {case.dtype}", flush=True)
        if not in_time(share_of_cases):
            record["cases"].append({**head_of(case), "why_not": "no time was left", "rows": []})
            continue
        record["cases"].append(measure_case(case, backends, device, sampling, say))
        results.save(record, options.output)
        print("\n".join(results.describe_case(record["cases"][-1], device.type)), flush=True)
    if grows:
        record["growth"] += measure_growth(device, backends, brief, [], elements, in_time, say)
        results.save(record, options.output)
        print("\n".join(results.describe_growth(record)), flush=True)
    if "end-to-end" in options.parts and options.part in (None, 2) and in_time():
        record["end_to_end"] = measure_end_to_end(device, 5 if options.quick else 40, say)
        print("\n".join(results.describe_end_to_end(record)), flush=True)
    record["took"] = round(time.monotonic() - begin, 1)
    results.save(record, options.output)
    print(f"{options.output}, after {record['took']:.0f} s")
    return report.main([str(options.output)])


if __name__ == "__main__":
    raise SystemExit(main())
