"""Inner products over tensors, and the gains that they change.

Sums are added in the order of ``csrc/rules/gain.h``, which does not depend on the device or the layout of threads:
element ``e`` of a chunk is added to the float64 lane ``e mod 1024``, in ascending order; four adjacent lanes are added
pairwise, then their sums by halves; then the chunks of a tensor in groups of 256, in ascending order; then the tensors.
So the bits are the same as in the native backend.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .fields import *
from .kernels import address_of, pointer, read, scalar, write
from .math import ascended, bounded, divide, is_finite, newton_factor, widen
from .prepare import column, put_at, value_at


@triton.jit
def ordered_sum(lanes):
    """Returns the sum of 1024 lanes: by fours, then by halves. Axes have two elements, whose order does not matter."""
    sums = tl.sum(tl.reshape(tl.sum(tl.reshape(lanes, [512, 2]), axis=1), [256, 2]), axis=1)
    sums = tl.sum(tl.reshape(sums, [2, 128]), axis=0)
    sums = tl.sum(tl.reshape(sums, [2, 64]), axis=0)
    sums = tl.sum(tl.reshape(sums, [2, 32]), axis=0)
    sums = tl.sum(tl.reshape(sums, [2, 16]), axis=0)
    sums = tl.sum(tl.reshape(sums, [2, 8]), axis=0)
    sums = tl.sum(tl.reshape(sums, [2, 4]), axis=0)
    sums = tl.sum(tl.reshape(sums, [2, 2]), axis=0)
    return tl.sum(sums, axis=0)


@triton.jit
def measure(
    chunks,
    tensors,
    scalars,
    flags,
    grads,
    partials,
    SOURCE_OF: tl.constexpr,
    STORED: tl.constexpr,
    TYPE: tl.constexpr,
):
    """TrainableLR: measures num and sq of one chunk. The running interval becomes the previous one; a new one starts.

    Args:
        chunks, tensors, scalars, flags: tables of ``fields``.
        grads: address of each tensor's gradient that is not in the sum yet, int64; 0: none.
        partials: two float64 for each chunk of this launch.
        SOURCE_OF: DISPLACEMENT, GRADIENT or PRECONDITIONED.
        STORED: storage type of the parameters.
        TYPE: type of the arithmetic and of the state.
    """
    i = tl.program_id(0).to(tl.int64)
    chunk = chunks + i * CHUNK_FIELDS
    tensor, base, count = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int32)
    flag = tl.load(flags + tensor)
    if (flag & DUE) != 0:
        row, shared = tensors + tensor * TENSOR_FIELDS, scalars + tensor * SCALAR_FIELDS
        steps, lr_sum = tl.load(shared + S_APPLIED), tl.load(shared + S_LR_SUM)
        gain = tl.load(tl.load(row + GAIN).to(tl.pointer_type(tl.float64)))
        applied, travelled = steps.to(TYPE), (gain * lr_sum).to(TYPE)
        measured = lr_sum != 0
        if SOURCE_OF != GRADIENT:
            measured = measured & (gain != 0)
        g_at = tl.load(grads + tensor)
        has_grad = (g_at != 0) & ((flag & STEPS) != 0)
        grads_end, previous_end = tl.where(has_grad, count, 0), tl.where(measured, count, 0)
        g_at += base * (STORED.primitive_bitwidth // 8)
        factor = scalar(shared, S_GRAD_FACTOR, TYPE)
        p_at = address_of(row, PARAM, STORED, base)
        start_at = address_of(row, START, TYPE, base)
        sum_at = address_of(row, MEAN_SUM, TYPE, base)
        previous_at = address_of(row, PREVIOUS, TYPE, base)
        nums = tl.zeros([LANES], tl.float64)
        sqs = tl.zeros([LANES], tl.float64)
        for first in range(0, count, LANES):
            offsets = first + tl.arange(0, LANES)
            mean = tl.zeros([LANES], TYPE)
            counted = offsets < previous_end
            previous = tl.load(pointer(previous_at, TYPE, WIDE=False) + offsets, mask=counted, other=0)
            if SOURCE_OF != DISPLACEMENT:
                total = read(sum_at, first, count, TYPE, LANES, WIDE=False)
                if SOURCE_OF == GRADIENT:
                    g = tl.load(pointer(g_at, STORED, WIDE=False) + offsets, mask=offsets < grads_end, other=0)
                    total = tl.where(has_grad, total + widen(g, TYPE) * factor, total)
                mean = divide(total, applied + mean)
            direction = mean
            if SOURCE_OF != GRADIENT:
                now = widen(read(p_at, first, count, STORED, LANES, WIDE=False), TYPE)
                begun = read(start_at, first, count, TYPE, LANES, WIDE=False)
                direction = divide(begun - now, travelled + tl.zeros([LANES], TYPE))
            if SOURCE_OF == DISPLACEMENT:
                mean = direction
            wide = mean.to(tl.float64)
            nums += tl.where(counted, wide * previous.to(tl.float64), 0.0)
            sqs += tl.where(counted, wide * direction.to(tl.float64), 0.0)
            tl.debug_barrier()  # an element may be stored by another thread than the one that loads it
            if SOURCE_OF != DISPLACEMENT:
                write(sum_at, first, count, tl.zeros([LANES], TYPE), TYPE, LANES, WIDE=False)
            if SOURCE_OF != GRADIENT:
                write(start_at, first, count, now, TYPE, LANES, WIDE=False)
            tl.store(pointer(previous_at, TYPE, WIDE=False) + offsets, direction, mask=counted)
        tl.store(partials + 2 * i, ordered_sum(nums))
        tl.store(partials + 2 * i + 1, ordered_sum(sqs))


@triton.jit
def slope(
    chunks,
    tensors,
    scalars,
    flags,
    grads,
    partials,
    DIRECTION: tl.constexpr,
    STATES: tl.constexpr,
    STORED: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Hypergradient: measures ``⟨ĝ, u_prev⟩`` of one chunk before the step is taken.

    Args:
        DIRECTION: direction of the backbone, from ``math``; None if directions are stored.
        STATES: number of state arrays of the backbone; 0 if directions are stored.
        others: see ``measure``.
    """
    i = tl.program_id(0).to(tl.int64)
    chunk = chunks + i * CHUNK_FIELDS
    tensor, base, count = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2).to(tl.int32)
    flag = tl.load(flags + tensor)
    if (flag & DUE) != 0:
        nums = tl.zeros([LANES], tl.float64)
        if (flag & SLOPES) != 0:
            row, shared = tensors + tensor * TENSOR_FIELDS, scalars + tensor * SCALAR_FIELDS
            couples = (tl.load(row + TRAITS).to(tl.int32) & COUPLES) != 0
            factor, weight_decay = scalar(shared, S_GRAD_FACTOR, TYPE), scalar(shared, S_WEIGHT_DECAY, TYPE)
            p_at = address_of(row, PARAM, STORED, base)
            g_at = tl.load(grads + tensor) + base * (STORED.primitive_bitwidth // 8)
            r = (
                scalar(shared, S_DECAY1, TYPE),
                scalar(shared, S_WEIGHT1, TYPE),
                scalar(shared, S_DECAY2, TYPE),
                scalar(shared, S_WEIGHT2, TYPE),
                scalar(shared, S_NUMERATOR_PREV, TYPE),
                scalar(shared, S_SCALE_PREV, TYPE),
                scalar(shared, S_EPS, TYPE),
                (flag & DIVIDES_PREV) != 0,
                (flag & USES_MAX) != 0,
                False,
                scalar(shared, S_GRAD_NUMERATOR, TYPE),
            )
            for first in range(0, count, LANES):
                inside = first + tl.arange(0, LANES) < count
                g = widen(read(g_at, first, count, STORED, LANES, WIDE=False), TYPE) * factor
                if couples:
                    g += weight_decay * widen(read(p_at, first, count, STORED, LANES, WIDE=False), TYPE)
                if STATES == 0:
                    u = read(address_of(row, PREVIOUS, TYPE, base), first, count, TYPE, LANES, WIDE=False)
                else:
                    s0 = read(address_of(row, STATE0, TYPE, base), first, count, TYPE, LANES, WIDE=False)
                    s1, s2 = s0, s0
                    if STATES > 1:
                        s1 = read(address_of(row, STATE1, TYPE, base), first, count, TYPE, LANES, WIDE=False)
                    if STATES > 2:
                        s2 = read(address_of(row, STATE2, TYPE, base), first, count, TYPE, LANES, WIDE=False)
                    u = DIRECTION(s0, s1, s2, r)
                nums += tl.where(inside, g.to(tl.float64) * u.to(tl.float64), 0.0)
        tl.store(partials + 2 * i, ordered_sum(nums))
        tl.store(partials + 2 * i + 1, 0.0)


@triton.jit
def sum_in_order(values, first, count, STRIDE: tl.constexpr):
    """Sums ranges of ``values``, one per lane, in ascending order. Eight loads are issued at a time."""
    total = tl.zeros_like(first).to(tl.float64)
    for begin in range(0, tl.max(count, axis=0).to(tl.int32), 8):
        for k in tl.static_range(8):
            there = begin + k < count
            value = tl.load(values + (first + begin + k) * STRIDE, mask=there, other=0.0)
            total = tl.where(there, total + value, total)
    return total


@triton.jit
def finish(
    tensors,
    scalars,
    flags,
    rule,
    partials,
    groups,
    group_count,
    group_sums,
    shares,
    share_count,
    outcomes,
    BLOCK: tl.constexpr,
):
    """Adapts the gains of one policy to the partial sums of its chunks. One program.

    Args:
        tensors, scalars, flags, groups, shares: tables of ``fields``.
        rule: row of the policy.
        partials: two float64 for each chunk of all launches of the policy.
        group_sums, outcomes: scratch memory.
    """
    first_tensor = tl.load(shares)
    if (tl.load(flags + first_tensor) & DUE) != 0:
        lane = tl.arange(0, BLOCK)
        for begin in range(0, group_count, BLOCK):
            here = begin + lane < group_count
            own = groups + (begin + lane).to(tl.int64) * GROUP_FIELDS
            first, count = column(own, 0, here), column(own, 1, here)
            at = group_sums + 2 * (begin + lane)
            tl.store(at, sum_in_order(partials, first, count, 2), mask=here)
            tl.store(at + 1, sum_in_order(partials + 1, first, count, 2), mask=here)
        tl.debug_barrier()  # before other threads read the group sums

        # Every lane has its own copy of the rule, since the interpreter cannot broadcast a condition over lanes.
        own_rule = rule + lane * 0
        is_slope = tl.load(own_rule + KIND) == HYPERGRADIENT
        per_tensor = tl.load(own_rule + PER_TENSOR) != 0
        needs_gain = tl.load(own_rule + SOURCE) != GRADIENT
        growth = tl.load(own_rule + GROWTH)
        lowest, highest = tl.load(own_rule + LOWEST), tl.load(own_rule + HIGHEST)
        eta = tl.load(own_rule + ETA)
        has_eta = (is_slope == 0) & (eta == eta)
        step_size = tl.where(is_slope, tl.load(own_rule + HYPER_LR), tl.where(has_eta, eta, 0.0))
        for begin in range(0, share_count, BLOCK):
            here = begin + lane < share_count
            own = shares + (begin + lane).to(tl.int64) * SHARE_FIELDS
            tensor = column(own, 0, here)
            first, count = column(own, 1, here), column(own, 2, here)
            num = sum_in_order(group_sums, first, count, 2)
            sq = sum_in_order(group_sums + 1, first, count, 2)
            row, shared = tensors + tensor * TENSOR_FIELDS, scalars + tensor * SCALAR_FIELDS
            flag = tl.load(flags + tensor, mask=here, other=0)
            applied, lr_sum = column(shared, S_APPLIED, here), column(shared, S_LR_SUM, here)
            gain = value_at(row, GAIN, tl.float64, here)
            moved = (lr_sum != 0) & ((needs_gain == 0) | (gain != 0))
            measured = here & tl.where(is_slope, (flag & SLOPES) != 0, moved)
            by_eta = measured & has_eta
            # The product of the sums is the product of the means times the steps of both intervals [TLR, D.4].
            applied_prev = value_at(row, TLR_APPLIED_PREV, tl.int64, by_eta).to(tl.float64)
            put_at(row, TLR_APPLIED_PREV, tl.int64, by_eta, applied.to(tl.int64))
            lr = tl.where(is_slope, column(shared, S_LR, here), value_at(row, LR_LAST, tl.float64, by_eta))
            product = tl.where(is_slope, num, num * (applied * applied_prev))
            climbs = (is_slope | has_eta) & measured
            out = outcomes + (begin + lane).to(tl.int64) * OUTCOME_FIELDS
            tl.store(out + O_NUM, num, mask=here)
            tl.store(out + O_SQ, sq, mask=here)
            tl.store(out + O_SLOPE, tl.where(climbs, lr * product, 0.0), mask=here)
            tl.store(out + O_MEASURED, tl.where(measured, 1.0, 0.0), mask=here)
        tl.debug_barrier()

        all_num, all_sq, all_slope, all_measured = total_of(outcomes, share_count)
        tl.debug_barrier()  # O_MEASURED is overwritten from here on
        for begin in range(0, share_count, BLOCK):
            here = begin + lane < share_count
            tensor = column(shares + (begin + lane).to(tl.int64) * SHARE_FIELDS, 0, here)
            row = tensors + tensor * TENSOR_FIELDS
            out = outcomes + (begin + lane).to(tl.int64) * OUTCOME_FIELDS
            own_num, own_sq = column(out, O_NUM, here), column(out, O_SQ, here)
            own_measured = column(out, O_MEASURED, here) != 0
            num, sq = tl.where(per_tensor, own_num, all_num), tl.where(per_tensor, own_sq, all_sq)
            slopes = tl.where(per_tensor, column(out, O_SLOPE, here), all_slope)
            measured = tl.where(per_tensor, own_measured, all_measured + lane * 0.0 != 0)
            gain = value_at(row, GAIN, tl.float64, here)
            lr_scale = column(scalars + tensor * SCALAR_FIELDS, S_LR_SCALE, here)
            climbed = ascended(gain, step_size * slopes / (lr_scale * lr_scale), lowest, highest)
            newton = bounded(gain * newton_factor(num, sq, growth), lowest, highest)
            adapted = tl.where(is_slope | has_eta, climbed, newton)
            put_at(row, GAIN, tl.float64, here & (is_slope | measured), adapted)
            # If products are not finite, the next interval has nothing to compare with.
            decisive_num, decisive_sq = tl.where(has_eta, own_num, num), tl.where(has_eta, own_sq, sq)
            spoilt = (is_finite(decisive_num) & is_finite(decisive_sq)) == 0
            restarts = here & own_measured & spoilt & (is_slope == 0)
            tl.store(out + O_MEASURED, tl.where(restarts, 1.0, 0.0), mask=here)
            if tl.max(restarts.to(tl.int32), axis=0) != 0:
                tl.debug_barrier()
                forget(tensors, shares, outcomes, begin, tl.minimum(begin + BLOCK, share_count))


@triton.jit
def total_of(outcomes, share_count):
    """Returns the sums over all tensors of a global policy, in their order."""
    num, sq = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    slopes, measured = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    for begin in range(0, share_count, 4):
        for k in tl.static_range(4):
            there = begin + k < share_count
            out = outcomes + (begin + k) * OUTCOME_FIELDS
            counts = there & (tl.load(out + O_MEASURED, mask=there, other=0.0) != 0)
            num = tl.where(counts, num + tl.load(out + O_NUM, mask=there, other=0.0), num)
            sq = tl.where(counts, sq + tl.load(out + O_SQ, mask=there, other=0.0), sq)
            slopes = tl.where(counts, slopes + tl.load(out + O_SLOPE, mask=there, other=0.0), slopes)
            measured = tl.where(counts, measured + 1.0, measured)
    return num, sq, slopes, measured


@triton.jit
def forget(tensors, shares, outcomes, begin, end):
    """Sets ``previous`` to 0 for tensors whose products were not finite. This is rare, so one program may be slow."""
    for i in range(begin, end):
        if tl.load(outcomes + i * OUTCOME_FIELDS + O_MEASURED) != 0:
            row = tensors + tl.load(shares + i * SHARE_FIELDS) * TENSOR_FIELDS
            words = tl.load(row + NUMEL)
            if (tl.load(row + TRAITS).to(tl.int32) & STATE_IS_DOUBLE) != 0:
                words = words * 2
            at = tl.load(row + PREVIOUS).to(tl.pointer_type(tl.int32))
            for word in range(0, words, LANES):
                offsets = word + tl.arange(0, LANES)
                tl.store(at + offsets, tl.zeros([LANES], tl.int32), mask=offsets < words)
