"""Faults patched into the CUDA kernels are found by the comparison with the float64 reference."""

from __future__ import annotations

import pytest
import torch

from . import build
from .pairs import ACTIVE, Pair, set_gradients

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

TAIL = "e < chunk.count; e += kThreads"
MUTANTS = {
    "none": [],
    "wrong tail": [("cuda/multi_tensor.cuh", TAIL, TAIL.replace("count;", "count - 1;"))],
    "wrong last block": [("cuda/device.cuh", "== launch.blocks - 1;", "== 0;")],
    "stale phase": [("rules/intervals.h", "if (ends_at(rule, *n.active_step + 1)) return restart_active(n);", "")],
    "tickets that are not put back": [
        (
            "cuda/device.cuh",
            "atomicInc(turns.tickets, static_cast<unsigned>(turns.count - 1))",
            "atomicAdd(turns.tickets, 1u)",
        )
    ],
    "a first ticket for a chunk that is taken": [
        ("cuda/device.cuh", "int64_t{gridDim.x} + drawn", "int64_t{gridDim.x} - 1 + drawn")
    ],
    "powers of any count": [
        ("cuda/device.cuh", "near && step.powers[x.group].t == t;", "near && step.powers[x.group].t >= 0;")
    ],
}
LIGHT = list(MUTANTS)[:2]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.heavy] * (n not in LIGHT)) for n in MUTANTS])
def test_mutants_are_found(name):
    library = build.library(MUTANTS[name], small=True)
    pair = Pair("AdamWPlain", ACTIVE, True, torch.float32, library=library)
    for step in range(5):
        set_gradients(pair.params, step, missing=0.3 * (step > 0))
        pair.step()
    assert (pair.worst <= 1.0) == (name == "none")
