"""The update kernel: one launch moves every tensor of a bucket. A skeleton; a backbone's math is an argument of it.

A program takes one chunk of one tensor. What the chunk has to do stands in tables that ``prepare`` has filled, so that
a kernel reads numbers and flags and decides nothing. Also here: ActiveLR's interval end, inside and outside of a step.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .fields import *
from .math import is_finite, narrow, widen


@triton.jit
def address_of(row, FIELD: tl.constexpr, STORED: tl.constexpr, base):
    """Of a tensor's array, from element ``base`` on."""
    return tl.load(row + FIELD) + base * (STORED.primitive_bitwidth // 8)


@triton.jit
def scalar(row, FIELD: tl.constexpr, TYPE: tl.constexpr):
    """A number that all elements of a tensor share: computed in float64, rounded once."""
    return tl.load(row + FIELD).to(TYPE)


@triton.jit
def pointer(address, STORED: tl.constexpr, WIDE: tl.constexpr):
    """WIDE: the compiler may take it for a multiple of 16. (It listens only where the pointer is made.)"""
    at = address.to(tl.pointer_type(STORED))
    if WIDE:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def read(address, start, count, STORED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ONCE: tl.constexpr = 0):
    """``BLOCK`` neighbours from ``start`` on. ONCE: nobody reads them again, so they need not stay in the caches."""
    policy: tl.constexpr = "evict_first" if ONCE else ""
    offsets = start + tl.arange(0, BLOCK)
    at = pointer(address, STORED, WIDE) + offsets
    if WIDE:
        values = tl.load(at, eviction_policy=policy)
    else:
        values = tl.load(at, mask=offsets < count, other=0, eviction_policy=policy)
    return values


@triton.jit
def read_if(wanted, address, start, count, STORED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """As ``read``; if not wanted, zeros without an access."""
    offsets = start + tl.arange(0, BLOCK)
    at = pointer(address, STORED, WIDE) + offsets
    if WIDE:
        values = tl.load(at, mask=wanted, other=0)
    else:
        values = tl.load(at, mask=offsets < tl.where(wanted, count, start), other=0)
    return values


@triton.jit
def write(address, start, count, values, STORED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    offsets = start + tl.arange(0, BLOCK)
    at = pointer(address, STORED, WIDE) + offsets
    if WIDE:
        tl.store(at, values)
    else:
        tl.store(at, values, mask=offsets < count)


@triton.jit
def step_block(
    arrays,
    start,
    count,
    rate,
    r,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    ADDS_MEAN: tl.constexpr,
    SCALES: tl.constexpr,
    STORES: tl.constexpr,
    COUPLED: tl.constexpr,
    STORED: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One step of ``BLOCK`` elements: all loads, then the arithmetic, then all stores."""
    p_at, g_at, s0_at, s1_at, s2_at, mean_at, gain_at, sum_at, direction_at = arrays
    grad_factor, alpha, weight_decay, shrink, keeps, adds = rate
    p = widen(read(p_at, start, count, STORED, BLOCK, WIDE), TYPE)
    g = widen(read(g_at, start, count, STORED, BLOCK, WIDE, ONCE=1), TYPE)
    s0, s1, s2 = p, p, p
    if STATES > 0:
        s0 = read(s0_at, start, count, TYPE, BLOCK, WIDE)
    if STATES > 1:
        s1 = read(s1_at, start, count, TYPE, BLOCK, WIDE)
    if STATES > 2:
        s2 = read(s2_at, start, count, TYPE, BLOCK, WIDE)
    if SCALES:
        gain = read(gain_at, start, count, TYPE, BLOCK, WIDE)
        grad_sum = read_if(keeps, sum_at, start, count, TYPE, BLOCK, WIDE)
    if ADDS_MEAN:
        mean_sum = read_if(adds, mean_at, start, count, TYPE, BLOCK, WIDE)

    g = g * grad_factor
    if ADDS_MEAN:
        mean_sum = mean_sum + g
    if SCALES:
        grad_sum = grad_sum + g
    if COUPLED:
        u, s0, s1, s2 = UPDATE(g + weight_decay * p, s0, s1, s2, r)
    else:
        u, s0, s1, s2 = UPDATE(g, s0, s1, s2, r)
    if SCALES:
        own = gain * alpha
        if not COUPLED:
            own_shrink = own * weight_decay
            p = p - p * tl.where(own_shrink < 1, own_shrink, 1.0)
        p = p - own * u
    else:
        if not COUPLED:
            p = p - p * shrink
        p = p - alpha * u

    write(p_at, start, count, narrow(p, STORED), STORED, BLOCK, WIDE)
    if STATES > 0:
        write(s0_at, start, count, s0, TYPE, BLOCK, WIDE)
    if STATES > 1:
        write(s1_at, start, count, s1, TYPE, BLOCK, WIDE)
    if STATES > 2:
        write(s2_at, start, count, s2, TYPE, BLOCK, WIDE)
    if SCALES:
        write(sum_at, start, count, grad_sum, TYPE, BLOCK, WIDE)
    if ADDS_MEAN:
        if adds:
            write(mean_at, start, count, mean_sum, TYPE, BLOCK, WIDE)
    if STORES:
        write(direction_at, start, count, u, TYPE, BLOCK, WIDE)


@triton.jit
def end_chunk(row, shared, flag, base, count, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """ActiveLR's interval end [ActiveLR, Algorithm 1].

    Signs are compared, never the product of two sums, which underflows. Where the sum is not finite the gain shrinks,
    and the next sign is 0. Gains that hold stay where one of the signs is 0; all do where the last step had no rate.
    Rare, so without wide accesses.
    """
    adjusts, holds = (flag & ADJUSTS) != 0, (flag & HOLDS_ZERO) != 0
    gain_at = address_of(row, ELEMENT_GAIN, TYPE, base)
    sum_at = address_of(row, GRAD_SUM, TYPE, base)
    sign_at = address_of(row, SIGN_PREV, tl.int8, base)
    high, low = scalar(shared, S_HIGH, TYPE), scalar(shared, S_LOW, TYPE)
    lowest, highest = scalar(shared, S_LOWEST, TYPE), scalar(shared, S_HIGHEST, TYPE)
    for start in range(0, count, BLOCK):
        gain = read(gain_at, start, count, TYPE, BLOCK, WIDE=False)
        grad_sum = read(sum_at, start, count, TYPE, BLOCK, WIDE=False)
        sign_prev = read(sign_at, start, count, tl.int8, BLOCK, WIDE=False).to(tl.int32)
        finite = is_finite(grad_sum)
        sign = tl.where(finite, (grad_sum > 0).to(tl.int32) - (grad_sum < 0).to(tl.int32), 0)
        product = sign * sign_prev
        adjusted = tl.where(product > 0, gain + high, gain * low)
        adjusted = tl.where(adjusted < lowest, lowest, adjusted)
        adjusted = tl.where(adjusted > highest, highest, adjusted)
        stays = finite & holds
        adjusted = tl.where(stays & (product == 0), gain, adjusted)
        sign = tl.where(stays & (sign == 0), sign_prev, sign)
        if adjusts:
            write(gain_at, start, count, adjusted, TYPE, BLOCK, WIDE=False)
            write(sign_at, start, count, sign.to(tl.int8), tl.int8, BLOCK, WIDE=False)
        write(sum_at, start, count, tl.zeros([BLOCK], TYPE), TYPE, BLOCK, WIDE=False)


@triton.jit
def update(
    chunks,
    tensors,
    scalars,
    flags,
    grads,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    ADDS_MEAN: tl.constexpr,
    SCALES: tl.constexpr,
    STORES: tl.constexpr,
    COUPLED: tl.constexpr,
    STORED: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One step of one chunk.

    Args:
        chunks, tensors, scalars, flags: the tables of ``fields``.
        grads: addresses, int64, a tensor; 0 where it has none.
        UPDATE, STATES: the backbone, from ``math``, and how many arrays of state it has.
        ADDS_MEAN: the gradients are summed for TrainableLR.
        SCALES: each element has a gain, ActiveLR's.
        STORES: the direction is kept, for Hypergradient.
        COUPLED: decay goes into the gradient.
        STORED, TYPE: how parameters and gradients are stored, and what is computed in, which the state is stored in.
        BLOCK, TAIL: elements at a time; of what is left, or not aligned.
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_FIELDS
    tensor, base, count = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int32)
    flag = tl.load(flags + tensor)
    row, shared = tensors + tensor * TENSOR_FIELDS, scalars + tensor * SCALAR_FIELDS
    if (flag & STEPS) != 0:
        arrays = (
            address_of(row, PARAM, STORED, base),
            tl.load(grads + tensor) + base * (STORED.primitive_bitwidth // 8),
            address_of(row, STATE0, TYPE, base),
            address_of(row, STATE1, TYPE, base),
            address_of(row, STATE2, TYPE, base),
            address_of(row, MEAN_SUM, TYPE, base),
            address_of(row, ELEMENT_GAIN, TYPE, base),
            address_of(row, GRAD_SUM, TYPE, base),
            address_of(row, PREVIOUS, TYPE, base),
        )
        gain = tl.load(tl.load(row + GAIN).to(tl.pointer_type(tl.float64)))
        alpha = tl.load(shared + S_LR) * (tl.load(shared + S_DRAW) * gain)
        shrink = alpha * tl.load(shared + S_WEIGHT_DECAY)
        if (flag & ADAPTIVE) != 0:  # torch's does not
            shrink = tl.where(shrink > 1, 1.0, shrink)
        rate = (
            scalar(shared, S_GRAD_FACTOR, TYPE),
            alpha.to(TYPE),
            scalar(shared, S_WEIGHT_DECAY, TYPE),
            shrink.to(TYPE),
            (flag & FRESH) == 0,
            (flag & ADDS) != 0,
        )
        r = (
            scalar(shared, S_DECAY1, TYPE),
            scalar(shared, S_WEIGHT1, TYPE),
            scalar(shared, S_DECAY2, TYPE),
            scalar(shared, S_WEIGHT2, TYPE),
            scalar(shared, S_NUMERATOR, TYPE),
            scalar(shared, S_SCALE, TYPE),
            scalar(shared, S_EPS, TYPE),
            (flag & DIVIDES) != 0,
            (flag & USES_MAX) != 0,
            (flag & FIRST) != 0,
        )
        wide = tl.where((flag & WIDE) != 0, count // BLOCK * BLOCK, 0)
        for start in range(0, wide, BLOCK):
            step_block(
                arrays, start, count, rate, r,
                UPDATE, STATES, ADDS_MEAN, SCALES, STORES, COUPLED, STORED, TYPE, BLOCK, WIDE=True,
            )  # fmt: skip
        for start in range(wide, count, TAIL):
            step_block(
                arrays, start, count, rate, r,
                UPDATE, STATES, ADDS_MEAN, SCALES, STORES, COUPLED, STORED, TYPE, TAIL, WIDE=False,
            )  # fmt: skip
    if SCALES:
        if (flag & ENDS) != 0:
            tl.debug_barrier()  # other threads may have written what this one reads next
            end_chunk(row, shared, flag, base, count, TYPE, TAIL)


@triton.jit
def end_active(chunks, tensors, scalars, flags, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """ActiveLR's interval end outside of a step, for every tensor that has moved in it."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_FIELDS
    tensor, base, count = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int32)
    flag = tl.load(flags + tensor)
    if (flag & ENDS) != 0:
        row, shared = tensors + tensor * TENSOR_FIELDS, scalars + tensor * SCALAR_FIELDS
        end_chunk(row, shared, flag, base, count, TYPE, BLOCK)
