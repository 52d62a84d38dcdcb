"""What ``bench/gpu_check.sh`` runs: commands with a limit each, their output kept, their outcome in one JSON.

Tests and sanitizers run side by side, since they keep the host busy and not the GPU; what is timed runs alone.
Needs nothing beyond torch, triton, numpy and pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any
from xml.etree import ElementTree

import torch

from ..machine import describe

NO_GPU = "no GPU: torch finds none here, so nothing was checked"
# A warning that only this machine's versions give must not hide what a kernel does.
PYTEST = (sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "default", "-p", "no:cacheprovider", "-m", "gpu")
#: The files that are collected.
NATIVE, TRITON, GRAPHS = "tests/gpu/test_parity.py", "tests/gpu/test_triton.py", "tests/gpu/test_graphs.py"
#: Where a few others are.
OTHERS = (
    "tests/backends/test_null_step.py",
    "tests/engine/test_first_momentum.py",
    "tests/engine/test_state.py",
    "tests/optimizers/test_bad_input.py",
    "tests/schedules/test_snapshots.py",
)
HUGE, WAITS = "two_to_the_31", "does_not_wait"
#: A few cases of each kernel: the sanitizers slow everything down a hundredfold.
SANITIZED = "test_counters_on_the_device and decoupled and not amsgrad and not rectify and (AdamW or SGD-nesterov)"


@dataclass(frozen=True)
class Step:
    """One command. ``seconds`` is its limit; past it, it counts as not done."""

    name: str
    command: tuple[str, ...]
    seconds: int


BUILD = Step("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 240)


def together(out: Path) -> list[Step]:
    """Returns the tests and sanitizers, which run side by side."""
    sanitizer, most = installed("compute-sanitizer"), f"not {HUGE} and not {WAITS}"

    def tests(name: str, chosen: str, *files: str, workers: int = 0) -> Step:
        parallel = ("-n", str(workers)) if workers and find_spec("xdist") else ()
        report = ("--junitxml", str(out / f"{name}.xml"))
        return Step(name, (*PYTEST, *parallel, *report, *files, "-k", chosen), 180)

    def sanitized(tool: str) -> Step:
        options = (sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        return Step(tool, (*options, *PYTEST, NATIVE, "-k", SANITIZED), 180)

    return [
        tests("native", most, NATIVE, workers=4),
        tests("triton", most, TRITON, workers=8),
        tests("graphs", most, GRAPHS, workers=2),
        tests("sync", WAITS, NATIVE, TRITON),
        tests("others", most, *OTHERS),
        tests("huge", HUGE, NATIVE, TRITON),
        *(sanitized(tool) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")),
    ]


def alone(out: Path) -> list[Step]:
    """Returns what is timed, in order of worth: a limit on the whole cuts the last."""
    module = (sys.executable, "-m")
    shapes = ("1e8", "10x5M", "resnet50", "2000x1000")
    limits = ("--rivals", "torch", "--parts", "cases", "--seconds", "2", "--output", str(out / "run.json"))
    timing = (*module, "bench.step.run", "--device", "cuda", "--shapes", *shapes, *limits)
    bandwidth = (*module, "bench.gpu.bandwidth")
    counters = (installed("ncu"), "--clock-control", "none", "-k", "regex:update", "--section", "SpeedOfLight")
    counters += ("--section", "MemoryWorkloadAnalysis", "--section", "Occupancy", "--section", "WarpStateStats")
    return [
        Step("timing", timing, 90),
        Step("bandwidth", (*bandwidth, "--backend", "native", "triton", "--output", str(out / "bandwidth.json")), 60),
        Step("counters", (*counters, *bandwidth, "--backend", "native", "--samples", "1"), 60),
    ]


def installed(tool: str) -> str:
    return shutil.which(tool) or f"/usr/local/cuda/bin/{tool}"


def run(step: Step, out: Path, left: float) -> dict[str, Any]:
    """Runs one step and says how it ended: ``passed``, ``failed``, ``timed out`` or ``not run``."""
    limit, begin = min(step.seconds, left), time.monotonic()
    log = out / f"{step.name}.log"
    if limit < 5:
        return {"outcome": "not run", "why": "no time was left"}
    with log.open("w", encoding="utf-8") as file:
        try:
            process = subprocess.Popen(step.command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            return {"outcome": "not run", "why": str(error)}
        code = wait(process, limit)
        outcome = "timed out" if code is None else "passed" if code == 0 else "failed"
    text = log.read_text(encoding="utf-8", errors="replace")
    found = {"outcome": outcome, "code": code, "seconds": round(time.monotonic() - begin, 1), "end": text[-1500:]}
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", text[-300:])}
    return found | ({"counts": counts} if counts else {})


def outcomes_of(report: Path) -> dict[str, dict[str, int]]:
    """Returns the numbers of cases by test and outcome, from a report that pytest wrote as JUnit XML.

    A test is named as by pytest, with its backend if that is its first argument:
    ``tests/gpu/test_graphs.py::test_replays_keep_masters[native]``.
    """
    found: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.get("name") is None:  # pytest was interrupted
            continue
        name, _, arguments = case.get("name", "").partition("[")
        backend = arguments.partition("-")[0]
        name += f"[{backend}]" if backend in ("native", "triton") else ""
        outcome = next((o for o in ("failure", "error", "skipped") if case.find(o) is not None), "passed")
        own = found.setdefault(f"{case.get('classname', '').replace('.', '/')}.py::{name}", {})
        own[outcome] = own.get(outcome, 0) + 1
    return found


def wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """Returns the exit status; None past the limit, where pytest is first asked for what it has so far."""
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_check.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu_check"))
    parser.add_argument("--minutes", type=float, default=7.8, help="limit on the whole (default: %(default)s)")
    parser.add_argument("--built", action="store_true", help="the library is there; build nothing")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu_check: {NO_GPU}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    device, end = torch.device("cuda"), time.monotonic() + 60 * options.minutes
    set_for_builds()
    record: dict[str, Any] = {"schema": 1, "machine": describe(device, torch.get_num_threads()), "steps": {}}
    lock = Lock()

    def save() -> None:
        (options.out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n")

    def take(step: Step) -> dict[str, Any]:
        found = run(step, options.out, end - time.monotonic())
        line = f"{step.name:<12}{found['outcome']:<12}{found.get('seconds', '')} {found.get('counts', '')}"
        with lock:
            print(line, flush=True)
            record["steps"][step.name] = found
            save()
        return found

    save()
    if not options.built and (built := take(BUILD))["outcome"] != "passed":
        print(built.get("end", built.get("why")))
        return 1
    side_by_side = together(options.out)
    with ThreadPoolExecutor(len(side_by_side)) as pool:
        list(pool.map(take, side_by_side))
    reports = sorted(options.out.glob("*.xml"))
    record["tests"] = {test: found for report in reports for test, found in outcomes_of(report).items()}
    save()
    for step in alone(options.out):
        take(step)
    return 0 if all(found["outcome"] == "passed" for found in record["steps"].values()) else 1


def set_for_builds() -> None:
    """Has builds made for this GPU alone, and fail where they would leave a part out."""
    major, minor = torch.cuda.get_device_capability()
    os.environ |= {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "FUSED_ADAPTIVE_REQUIRE_EXT": "1"}


if __name__ == "__main__":
    raise SystemExit(main())
