"""How near a step comes to the bandwidth of a copy: ``python -m bench.gpu.bandwidth``. On a GPU.

Bytes are those that the algorithm has to move, each input once and each output once; the copy is measured in the same
process, between the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fused_adaptive as fa

from ..machine import describe
from ..step.measure import device_seconds

GOAL = 0.90
INTERVAL = 5
#: name → (optimizer, bytes a float32 parameter moves, of which those of the parameter and its gradient: 12)
OPTIMIZERS: dict[str, tuple[Callable[..., Any], int]] = {
    "SGD momentum": (lambda p, **k: fa.SGD(p, lr=1e-3, momentum=0.9, **k), 20),
    "AdamW": (lambda p, **k: fa.AdamW(p, lr=1e-3, **k), 28),
    "ActiveAdamW": (lambda p, **k: fa.ActiveAdamW(p, lr=1e-3, interval=INTERVAL, **k), 40),
}


def measure(name: str, backend: str, dtype: torch.dtype, numel: int, samples: int) -> dict[str, Any]:
    """Times of a step and of a copy in turn; GB/s of both, by their medians."""
    make, bytes_a_parameter = OPTIMIZERS[name]
    bytes_a_parameter -= 3 * (4 - dtype.itemsize)  # parameter read and written, gradient read
    p = torch.randn(numel, device="cuda").to(dtype).requires_grad_()
    p.grad = torch.randn_like(p)
    optimizer = make([p], backend=backend)
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    steps, copies = [], []
    for sample in range(-2 * INTERVAL, samples):  # the first compile, and pass an interval's end
        step, copy = (1e3 * device_seconds(run) for run in (optimizer.step, partial(target.copy_, source)))
        if sample >= 0:
            steps.append(step)
            copies.append(copy)
    speed = numel * bytes_a_parameter / statistics.median(steps) / 1e6
    copy_speed = 2 * source.numel() / statistics.median(copies) / 1e6
    return {
        "optimizer": name,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "numel": numel,
        "step_ms": steps,
        "copy_ms": copies,
        "GB/s": speed,
        "of_copy": speed / copy_speed,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=100_000_000, help="parameters; default: 100 M")
    parser.add_argument("--samples", type=int, default=100, help="steps; default: 100")
    parser.add_argument("--backend", nargs="*", default=["triton"], help="default: triton")
    parser.add_argument("--output", type=Path, help="write samples, machine and versions there as JSON")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        return 0
    results = []
    for backend in options.backend:
        for name in OPTIMIZERS:
            for dtype in (torch.float32, torch.bfloat16):
                found = measure(name, backend, dtype, options.numel, options.samples)
                results.append(found)
                print(
                    f"{backend:<10}{name:<14}{found['dtype']:<10}{statistics.median(found['step_ms']):8.3f} ms "
                    f"{found['GB/s']:8.0f} GB/s {found['of_copy']:6.2f} of a copy (goal {GOAL})"
                )
    if options.output is not None:
        machine = describe(torch.device("cuda"), torch.get_num_threads())
        options.output.write_text(json.dumps({"schema": 1, "machine": machine, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
