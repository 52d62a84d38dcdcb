"""Update kernel, and ActiveLR's interval end inside and outside of a step.

One launch of the update kernel updates every tensor of a bucket; the math of the backbone is an argument. A program
takes one chunk of one tensor. ``prepare`` has written the scalars and flags of each tensor, so kernels only read them.
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
    """Returns the address of element ``base`` of an array of the tensor."""
    return tl.load(row + FIELD) + base * (STORED.primitive_bitwidth // 8)


@triton.jit
def scalar(row, FIELD: tl.constexpr, TYPE: tl.constexpr):
    """Returns a number that all elements of a tensor share. It is computed in float64 and rounded once."""
    return tl.load(row + FIELD).to(TYPE)


@triton.jit
def pointer(address, STORED: tl.constexpr, WIDE: tl.constexpr):
    """Returns a pointer. WIDE: it is a multiple of 16. The compiler must know this where the pointer is created."""
    at = address.to(tl.pointer_type(STORED))
    if WIDE:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def read(address, start, count, STORED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, ONCE: tl.constexpr = 0):
    """Reads ``BLOCK`` adjacent elements from ``start`` on. ONCE: they are not read again; caches need not keep them."""
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
    """Same as ``read``; if not wanted, returns zeros without an access."""
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
    """Takes one step of ``BLOCK`` elements: all loads, then the arithmetic, then all stores."""
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
    """Ends ActiveLR's interval for one chunk [ActiveLR, Algorithm 1].

    Signs are compared, since the product of two sums could underflow. If the sum is not finite, the gain shrinks and
    the stored sign is 0. With HOLDS_ZERO, the gain stays if one of the signs is 0. Without ADJUSTS, all gains stay,
    since the last step had no rate. Interval ends are rare, so accesses are not wide.
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
    """Takes one step of one chunk.

    Args:
        chunks, tensors, scalars, flags: tables of ``fields``.
        grads: address of each tensor's gradient, int64; 0: no gradient.
        UPDATE: update of the backbone, from ``math``.
        STATES: number of state arrays of the backbone.
        ADDS_MEAN: whether gradients are summed for TrainableLR.
        SCALES: whether elements have gains, for ActiveLR.
        STORES: whether the direction is stored, for Hypergradient.
        COUPLED: whether decay is added to the gradient.
        STORED: storage type of parameters and gradients.
        TYPE: type of the arithmetic and of the state.
        BLOCK: elements at a time with wide accesses.
        TAIL: elements at a time for the end of a chunk and for arrays that are not aligned.
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
        alpha = tl.load(shared + S_LR) * (tl.load(shared + S_RATE_FACTOR) * gain)
        shrink = alpha * tl.load(shared + S_WEIGHT_DECAY)
        if (flag & ADAPTIVE) != 0:  # without an adapting policy the decay is not clamped, as in torch
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
            scalar(shared, S_GRAD_NUMERATOR, TYPE),
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
            tl.debug_barrier()  # end_chunk may read what other threads have written
            end_chunk(row, shared, flag, base, count, TYPE, TAIL)


@triton.jit
def end_active(chunks, tensors, scalars, flags, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Ends ActiveLR's interval outside of a step, for every tensor with applied steps in it."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_FIELDS
    tensor, base, count = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int32)
    flag = tl.load(flags + tensor)
    if (flag & ENDS) != 0:
        row, shared = tensors + tensor * TENSOR_FIELDS, scalars + tensor * SCALAR_FIELDS
        end_chunk(row, shared, flag, base, count, TYPE, BLOCK)
