"""How long a step takes next to what people use today: ``python -m bench.run``. Ratios are of one process.

Optimizers take turns, step by step, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_adaptive as fa

from .machine import describe
from .rivals import ForeachActiveAdamW

#: name → (number of tensors, elements of each)
SHAPES = {"10 x 5M": (10, 5_000_000), "2000 x 1000": (2000, 1000)}
INTERVAL = 5
OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], Any]] = {
    "torch AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "AdamW": lambda p: fa.AdamW(p, lr=1e-3, backend="native"),
    "ActiveAdamW": lambda p: fa.ActiveAdamW(p, lr=1e-3, interval=INTERVAL, backend="native"),
    "ActiveAdamW, foreach": lambda p: ForeachActiveAdamW(p, interval=INTERVAL),
}
#: The ratios that are printed, with the goal for each list of shapes.
RATIOS = {
    ("AdamW", "torch AdamW fused"): {"10 x 5M": 1.03, "2000 x 1000": 0.3},
    ("ActiveAdamW", "AdamW"): {"10 x 5M": 1.45},
    ("ActiveAdamW", "ActiveAdamW, foreach"): {"10 x 5M": 0.25},
}


def measure(shape: tuple[int, int], device: torch.device, samples: int) -> dict[str, list[float]]:
    """Seconds a step of each optimizer, ``samples`` of each, with all gradients there and fresh values in them."""
    count, numel = shape
    contenders = {}
    for name, make in OPTIMIZERS.items():
        params = [torch.randn(numel, device=device).requires_grad_() for _ in range(count)]
        for p in params:
            p.grad = torch.randn_like(p)
        contenders[name] = make(params)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for sample in range(-2 * INTERVAL, samples):  # the first, an interval's end among them, are not counted
        for name, optimizer in contenders.items():
            _wait(device)
            begin = time.perf_counter()
            optimizer.step()
            _wait(device)
            if sample >= 0:
                times[name].append(time.perf_counter() - begin)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(times: dict[str, list[float]], shape: str) -> list[dict[str, Any]]:
    """The medians' ratios that have a goal for this list of shapes."""
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return [
        {"of": of, "to": to, "ratio": medians[of] / medians[to], "goal": goals[shape]}
        for (of, to), goals in RATIOS.items()
        if shape in goals
    ]


def markdown(record: dict[str, Any]) -> str:
    """The table of the README: median milliseconds, and the ratios with their goals."""
    machine, results = record["machine"], record["results"]
    names = list(results[0]["seconds"])
    lines = ["| ms a step | " + " | ".join(r["shapes"] for r in results) + " |", "|---" * (len(results) + 1) + "|"]
    for name in names:
        medians = [f"{statistics.median(r['seconds'][name]) * 1e3:.2f}" for r in results]
        lines.append(f"| {name} | " + " | ".join(medians) + " |")
    for of, to in RATIOS:
        found = [next((x for x in r["ratios"] if (x["of"], x["to"]) == (of, to)), None) for r in results]
        cells = [f"{x['ratio']:.2f} (goal {x['goal']})" if x else "" for x in found]
        lines.append(f"| *{of} / {to}* | " + " | ".join(cells) + " |")
    where = f"{machine['device']}, {machine['threads']} threads, {machine['kernels']} kernels, torch {machine['torch']}"
    return "\n".join([*lines, "", f"Medians of {len(results[0]['seconds'][names[0]])} steps in turn; {where}."])


def write_readme(readme: Path, record: dict[str, Any]) -> None:
    """Puts the table between the markers."""
    head, _, rest = readme.read_text(encoding="utf-8").partition("<!-- run:begin -->\n")
    _, end, tail = rest.partition("<!-- run:end -->")
    if not end:
        raise ValueError(f"{readme} lacks the markers <!-- run:begin --> and <!-- run:end -->")
    readme.write_text(f"{head}<!-- run:begin -->\n{markdown(record)}\n{end}{tail}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU; default: 2")
    parser.add_argument("--samples", type=int, default=40, help="steps of each optimizer; default: 40")
    parser.add_argument("--scale", type=float, default=1.0, help="times the elements of each tensor; default: 1")
    parser.add_argument("--output", type=Path, help="write samples, machine and versions there as JSON")
    parser.add_argument("--report", type=Path, help="show this JSON instead of measuring")
    parser.add_argument("--readme", type=Path, help="with --report: write its table between the markers of this file")
    options = parser.parse_args(arguments)
    if options.report is not None:
        record = json.loads(options.report.read_text())
        print(markdown(record))
        if options.readme is not None:
            write_readme(options.readme, record)
        return 0
    torch.set_num_threads(options.threads)
    device, results = torch.device(options.device), []
    for name, (count, numel) in SHAPES.items():
        times = measure((count, max(1, int(numel * options.scale))), device, options.samples)
        found = ratios(times, name)
        results.append({"shapes": name, "scale": options.scale, "seconds": times, "ratios": found})
        print(name)
        for optimizer, samples in times.items():
            low, median, high = statistics.quantiles(samples, n=5)[0], statistics.median(samples), max(samples)
            print(f"  {optimizer:<22}{median * 1e3:9.3f} ms   p20 {low * 1e3:.3f}   max {high * 1e3:.3f}")
        for r in found:
            print(f"  {r['of']} / {r['to']}: {r['ratio']:.3f} (goal: at most {r['goal']})")
    if options.output is not None:
        record = {"schema": 1, "machine": describe(device, options.threads), "results": results}
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
