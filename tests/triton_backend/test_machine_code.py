"""Machine code of Triton's kernels, compiled ahead of time: registers, spills and the width of memory accesses.

All variants are compiled for sm_90. Other targets compile every 21st update, which includes each backbone, mode, decay
and dtype, and every second other kernel: four complete sets would take as long as all other tests of Triton. Results
are cached in build/ until the sources change.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .aot.variants import TARGETS
from .interpreter import MISSING, ROOT

pytestmark = pytest.mark.skipif(MISSING != "", reason=MISSING)

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
every_target = pytest.mark.parametrize("target", [pytest.param(t, marks=pytest.mark.heavy) for t in TARGETS])


@cache
def figures(target: str, every: int) -> dict[str, dict[str, Any]]:
    """Returns figures of all kernels, and of each ``every``-th update; a separate process compiles them."""
    folder = ROOT / "build" / "triton_machine_code"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with open(folder / f"lock-{target}", "w") as lock:  # tests run in parallel
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "tests.triton_backend.aot.variants", target, str(every), str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(Path(done.stdout.strip()).read_text())


def chosen(target: str) -> dict[str, dict[str, Any]]:
    return figures(target, 1 if target == "sm_90" else 21)


def check(found: dict[str, dict[str, Any]]) -> None:
    """Checks all kernels, and the main loops of updates."""
    assert {name: f for name, f in found.items() if f["spills"]} == {}
    assert {name: f for name, f in found.items() if f.get("contracted") or f.get("approximate")} == {}
    for name, f in found.items():
        if not name.startswith("update"):
            continue
        _, dtype, rest = name.split()
        update, *modes = rest.split("+")
        states = 0 if update == "sgd_plain" else 1 if "sgd" in update else 3 if "amsgrad" in update else 2
        words = 2 if "16" in dtype else 1  # 16-byte accesses of state for 16 bytes of parameters
        float_arrays = states + 2 * ("gain" in modes) + ("mean" in modes)
        stored = states + ("gain" in modes) + ("mean" in modes) + ("direction" in modes)
        loads, stores = 2 + words * float_arrays, 1 + words * stored
        # There are more if a loop has two versions, one without the sum. On AMD, tables are read with wide loads too.
        assert f["wide_loads"] >= loads, name
        assert f["wide_stores"] >= stores, name


@every_target
def test_no_spills_no_contraction_and_16_bytes_at_a_time(target):
    found = chosen(target)
    updates = [name.split() for name in found if name.startswith("update")]
    assert len(found) > len(updates) > (230 if target == "sm_90" else 12)
    assert len({dtype for _, dtype, _ in updates}) == 4
    assert len({rest.split("+")[0] for *_, rest in updates}) == 8
    assert len({rest.partition("+")[2] for *_, rest in updates} - {"direction", "direction+coupled"}) == 8
    check(found)


@pytest.mark.parametrize("target", [pytest.param(t, marks=pytest.mark.heavy) for t in NVIDIA])
def test_registers(target):
    """64 allow four programs of 256 threads on a multiprocessor. Eight arrays use up to 72, for three programs."""
    for name, f in chosen(target).items():
        if name.startswith("update float32"):
            eight = "amsgrad" in name and "+mean+gain" in name
            assert f["registers"] <= (80 if eight else 64), name
        if name.startswith("update"):
            assert f["registers"] <= (168 if "float64" in name else 128), name


def test_some_kernels_on_one_target():
    found = figures("sm_90", 60)
    assert any("update float32" in name for name in found)
    assert any("update bfloat16" in name for name in found)
    check(found)


def test_narrow_accesses_and_spills_are_noticed():
    found = figures("sm_90", 60)
    name = next(name for name in found if name.startswith("update float32"))
    for wrong in ({"wide_loads": 0}, {"spills": 8}, {"approximate": 1}):
        with pytest.raises(AssertionError):
            check({**found, name: {**found[name], **wrong}})
