"""Mistakes in the Triton backend, which the tests of kernel_cases.py must notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from fused_adaptive.backends.triton import kernels, plan, prepare, reduce
from fused_adaptive.backends.triton import math as kernel_math
from fused_adaptive.backends.triton import tables as triton_tables

corrections = kernel_math.corrections  # kernels use global names without a module


def wrong_tail(monkeypatch):
    """Skips the last elements of a tensor [pytorch #191763]."""
    chunks_of = triton_tables.chunks_of

    def cut(*arguments: Any) -> list[tuple[int, int, int]]:
        return [(m, base, max(count // 4 * 4, 1)) for m, base, count in chunks_of(*arguments)]

    monkeypatch.setattr(triton_tables, "chunks_of", cut)


def stale_phase(monkeypatch):
    """Does not upload changed counts of the host, so that the device continues with its own."""
    rows = plan.HostCounts.rows
    monkeypatch.setattr(plan.HostCounts, "rows", lambda self, *arguments: rows(self, *arguments) * 0)


def wrong_backbone(monkeypatch):
    """Uses AdaBelief's update for AdamW."""
    right = triton_tables.STRUCTURES["AdamWPlain"]
    monkeypatch.setitem(triton_tables.STRUCTURES, "AdamWPlain", replace(right, update=kernel_math.belief))


def wrong_bias(monkeypatch):
    """Uses the second moment's bias correction of the next step."""

    @triton.jit
    def late(power1, power2, beta2, t, rectifies, at_five):
        return corrections(power1, power2 * beta2, beta2, t + 1.0, rectifies, at_five)

    monkeypatch.setattr(prepare, "corrections", late)


def truncated(monkeypatch):
    """Truncates to bfloat16 instead of rounding, as Triton's interpreter does."""

    @triton.jit
    def narrow(x, STORED: tl.constexpr):
        tl.static_assert(tl.float32 != STORED)
        return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)

    monkeypatch.setattr(kernels, "narrow", narrow)


def wrong_sum(monkeypatch):
    """Sums half of the lanes of an inner product."""

    @triton.jit
    def half(lanes):
        return tl.sum(tl.where(tl.arange(0, 1024) < 512, lanes, 0.0), axis=0)

    monkeypatch.setattr(reduce, "ordered_sum", half)
