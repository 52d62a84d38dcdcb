"""The two calls of ``bench/gpu_check.sh``: commands with a limit each, their output kept, their outcome in one JSON.

What runs here needs nothing beyond torch, triton, numpy and pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..machine import describe

NO_GPU = "no GPU: torch finds none here, so nothing was checked"
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu")
#: The files that are collected.
NATIVE, TRITON, GRAPHS = "tests/gpu/test_parity.py", "tests/gpu/test_triton.py", "tests/gpu/test_graphs.py"
#: Where a few others are.
OTHERS = tuple(f"tests/test_{name}.py" for name in ("null_step", "state", "bad_input", "controllers_snapshots"))
HUGE, WAITS = "two_to_the_31", "does_not_wait"
#: A few cases of each kernel: the sanitizers slow everything down a hundredfold.
SANITIZED = "test_counters_on_the_device and decoupled and not amsgrad and not rectify and (AdamW or SGD-nesterov)"


@dataclass(frozen=True)
class Step:
    """One command. ``seconds`` is its limit; past it, it counts as not done."""

    name: str
    command: tuple[str, ...]
    seconds: int


def steps(part: int, out: Path) -> list[Step]:
    """What a call runs, in order of worth: a limit on the whole cuts the last ones. Each begins on a bare machine."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    workers = ("-n", "8") if find_spec("xdist") else ()
    lists = ("--shapes", "10x5M", "2000x1000", "--rivals", "torch", "composition", "--parts", "cases", "--seconds", "3")
    timing = (sys.executable, "-m", "bench.step.run", "--device", "cuda", *lists, "--output", str(out / "run.json"))

    bandwidth = (sys.executable, "-m", "bench.gpu.bandwidth", "--output", str(out / "bandwidth.json"))

    def junit(name: str) -> tuple[str, str]:
        return "--junitxml", str(out / f"{name}.xml")

    def tests(name: str, seconds: int, chosen: str, *files: str, parallel: bool = True) -> Step:
        return Step(name, (*PYTEST, *(workers if parallel else ()), *junit(name), *files, "-k", chosen), seconds)

    def sanitized(tool: str, seconds: int) -> Step:
        options = (sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        return Step(tool, (*options, *PYTEST, NATIVE, "-k", SANITIZED), seconds)

    build = Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 240)
    if part == 1:
        most = f"not {HUGE} and not {WAITS}"
        return [
            build,
            tests("native", 150, most, NATIVE),
            tests("triton", 150, most, TRITON),
            tests("graphs", 120, most, GRAPHS),
            tests("sync", 60, WAITS, NATIVE, TRITON, parallel=False),
            tests("others", 60, most, *OTHERS, parallel=False),
            Step("timing", timing, 90),
            Step("bandwidth", bandwidth, 60),
        ]
    return [
        build,
        sanitized("memcheck", 120),
        sanitized("racecheck", 120),
        sanitized("synccheck", 60),
        tests("huge", 90, HUGE, NATIVE, TRITON, parallel=False),  # most of the memory each
    ]


def run(step: Step, out: Path, left: float) -> dict[str, Any]:
    """Runs one step and says how it ended: ``passed``, ``failed``, ``timed out`` or ``not run``."""
    limit, begin = min(step.seconds, left), time.monotonic()
    log = out / f"{step.name}.log"
    if limit < 5:
        return {"outcome": "not run", "why": "no time was left"}
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(step.command, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
            outcome = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, outcome = None, "timed out"
        except OSError as error:
            return {"outcome": "not run", "why": str(error)}
    text = log.read_text(encoding="utf-8", errors="replace")
    found = {"outcome": outcome, "code": code, "seconds": round(time.monotonic() - begin, 1), "end": text[-1500:]}
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text[-300:])}
    return found | ({"counts": counts} if counts else {})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", type=int, choices=(1, 2), help="1: build and tests; 2: sanitizers, huge tensors")
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"))
    parser.add_argument("--minutes", type=float, default=7.8, help="limit on the whole (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu_check: {NO_GPU}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    device, end = torch.device("cuda"), time.monotonic() + 60 * options.minutes
    major, minor = torch.cuda.get_device_capability()
    os.environ |= {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "FUSED_ADAPTIVE_REQUIRE_EXT": "1"}
    record: dict[str, Any] = {"schema": 1, "machine": describe(device, torch.get_num_threads()), "steps": {}}
    path = options.out / f"gpu_check_{options.part}.json"

    def save() -> None:
        path.write_text(json.dumps(record, indent=1) + "\n")

    save()
    for step in steps(options.part, options.out):
        found = record["steps"][step.name] = run(step, options.out, end - time.monotonic())
        print(f"{step.name:<12}{found['outcome']:<12}{found.get('seconds', '')} {found.get('counts', '')}", flush=True)
        save()
        if step.name == "build" and found["outcome"] != "passed":
            print(found.get("end", found.get("why")))
            break
    return 0 if all(found["outcome"] == "passed" for found in record["steps"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
