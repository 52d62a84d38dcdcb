"""The Triton backend's compiled kernels on the CPU: tests/ptx/test_triton.py runs this, with triton_driver.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.backends.triton import fields
from fused_adaptive.backends.triton import tables as triton_tables
from fused_adaptive.backends.triton.uploads import Uploader

from ..common.cases import Case, Gradients
from ..triton_backend.aot.variants import Variant, variants
from ..triton_backend.kernel_cases import PAIRS, differing, params_of, worst
from . import load
from . import triton_driver as driver

#: Orders of threads and blocks; see tests/cuda_emulation/emulation.cpp. Three more have the threads reversed.
ORDERS = 3
#: One block and a tail of each size, more tensors than a warp has threads, an empty one, and a misaligned one.
SIZES = [(4099,), (), (0,), (3, 5), *[(7,)] * 40, (2051,)]


def parameters(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator).to(dtype) for s in SIZES]
    made[-1] = torch.randn(SIZES[-1][0] + 1, generator=generator).to(dtype)[1:]
    return [p.requires_grad_() for p in made]


def runs(policy: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[str]:
    """Returns values that differ from native's after a few steps and an interval end by hand."""
    optimizers = []
    for backend in ("triton", "native"):
        optimizer = Case("AdamW", policy, True).build(parameters(dtype), backend=backend, **options)
        params = params_of(optimizer)
        for step in range(4):
            Gradients(missing=0.15).set(params, step)
            optimizer.step()
        optimizer.end_interval()
        optimizers.append(optimizer)
    return differing(*optimizers)


SOME = ["fixed", "active", "tlr-gradient-tensor", "tlr-preconditioned-global", "hypergradient-tensor"]


@pytest.mark.parametrize("policy", SOME)
def test_some(policy):
    for order in range(2 * ORDERS):
        load.take_turns(order)
        assert runs(policy, capturable=order % 2 == 1) == [], order


@pytest.mark.parametrize(
    "turn",
    range(len(PAIRS)),
    ids=[f"{c.optimizer}-{c.policy}" for c in PAIRS],
)
def test_matrix(turn):
    """Runs the cases of the parity suite in every dtype: within rounding of float64, and bit-equal to native."""
    for order in (turn % ORDERS, turn % ORDERS + ORDERS):
        load.take_turns(order)
        assert worst(PAIRS[turn]) <= 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_intervals_ended_by_hand(dtype):
    for order in range(2 * ORDERS):
        load.take_turns(order)
        assert runs("active", dtype) == [], order


def test_rates_drawn_by_hand():
    results = []
    for backend in ("triton", "native"):
        optimizer = Case("AdamW", "active", True).build(parameters(torch.float32), backend=backend)
        search = fa.ASLR(optimizer, seed=3)
        for step in range(3):
            Gradients(missing=0.15).set(params_of(optimizer), step)
            optimizer.step()
        results.append(optimizer)
        del search
    assert differing(*results) == []


# ---- every variant ----


def is_met(variant: Variant) -> bool:
    """Returns whether this kernel was launched with these compile-time arguments."""
    constants = {(name, driver.plain(value)) for name, value in variant.constants.items()}
    return any(name == variant.kernel.__name__ and constants <= own for name, own in driver.launched)


SHARED = r"end_active|prepare|finish"
#: Names of the variants that each part of the matrix runs.
PARTS = {
    "momentum": rf"update \w+ sgd|measure|slope \w+ (stored|momentum)|{SHARED}",
    "moments": rf"update \w+ n?adam|measure \w+ (?!displacement)|slope \w+ quotient|{SHARED}",
    "variances": rf"update \w+ belief|measure \w+ (?!displacement)|slope \w+ quotient|{SHARED}",
}


@pytest.mark.parametrize("part", PARTS)
def test_every_variant_of(part):
    """Runs after the cases of that part, in the same process."""
    own = [v for v in variants(driver.WARP_SIZE, is_cuda=True) if re.match(PARTS[part], v.name)]
    assert len(own) > 60
    assert [v.name for v in own if not is_met(v)] == []


def test_every_variant_is_of_a_part():
    names = [v.name for v in variants(driver.WARP_SIZE, is_cuda=True)]
    assert [n for n in names if not any(re.match(part, n) for part in PARTS.values())] == []


# ---- mistakes that must be noticed ----

FAR = 2**31 + 2**20


@pytest.fixture
def far(monkeypatch):
    """Puts addresses of arrays FAR elements of 4 bytes below the memory, and chunks at FAR."""
    chunks_of, rows_of, send = triton_tables.chunks_of, triton_tables.Tables._rows, Uploader.send
    arrays = range(fields.START.value + 1)

    def far_rows(self, *arguments: Any) -> list[list[int]]:
        rows = rows_of(self, *arguments)
        return [[v - 4 * FAR * (i in arrays and v != 0) for i, v in enumerate(row)] for row in rows]

    monkeypatch.setattr(
        triton_tables, "chunks_of", lambda *a: [(m, base + FAR, count) for m, base, count in chunks_of(*a)]
    )
    monkeypatch.setattr(triton_tables.Tables, "_rows", far_rows)
    monkeypatch.setattr(
        Uploader, "send", lambda self, pointers, *rest: send(self, [p - 4 * FAR * (p != 0) for p in pointers], *rest)
    )


def without_barriers(name: str, ptx: str) -> str:
    return re.sub(r"bar\.sync\s+0;", "", ptx) if name == "measure" else ptx


def with_short_offsets(name: str, ptx: str) -> str:
    """Makes offsets from the beginning of an array 32 bits wide."""
    short = r"{ .reg .b32 %short; cvt.u32.u64 %short, \2; shl.b32 %short, %short, 2; cvt.u64.u32 \1, %short; }"
    return re.sub(r"shl\.b64\s+(%rd\d+), (%rd\d+), 2;", short, ptx) if name == "update" else ptx


def always_wide(monkeypatch):
    """Treats the addresses of every tensor as multiples of 16."""
    rows_of = triton_tables.Tables._rows

    def rows(self, *arguments: Any) -> list[list[int]]:
        made = rows_of(self, *arguments)
        for row in made:
            row[fields.TRAITS.value] |= fields.ALIGNED.value
        return made

    monkeypatch.setattr(triton_tables.Tables, "_rows", rows)


def found(policy: str) -> list[str]:
    """Returns errors, in all orders."""
    seen = []
    for order in range(2 * ORDERS):
        load.take_turns(order)
        try:
            seen += runs(policy)
        except RuntimeError as error:
            seen.append(str(error))
    return seen


def changed(monkeypatch, change: Callable[[str, str], str]) -> None:
    monkeypatch.setattr(driver, "change", change)


def test_a_missing_barrier_is_noticed(monkeypatch):
    assert found("tlr-gradient-tensor") == []
    changed(monkeypatch, without_barriers)
    assert found("tlr-gradient-tensor") != []


def test_a_wrong_alignment_is_noticed(monkeypatch):
    assert found("fixed") == []
    always_wide(monkeypatch)
    assert any(re.search(r"misaligned address in `ld\.global\S*\.v4", text) for text in found("fixed"))


@pytest.mark.usefixtures("far")
def test_an_offset_of_32_bits_is_noticed(monkeypatch):
    assert found("fixed") == []
    changed(monkeypatch, with_short_offsets)
    assert any("illegal memory access" in text for text in found("fixed"))
