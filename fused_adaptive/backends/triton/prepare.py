"""First kernel of a step: counts the step and computes scalars and flags of each tensor. A program takes many tensors.

On the device it determines whether AMP skips the step, which intervals end, and how many steps a tensor has taken. The
other kernels only read the scalars and flags, so they cannot disagree. A captured CUDA graph can therefore include
interval ends and skipped steps.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .fields import *
from .math import corrections, momentum_of, power


@triton.jit
def column(table, FIELD: tl.constexpr, here):
    """Loads one column of many rows; 0 if there is no row."""
    return tl.load(table + FIELD, mask=here, other=0)


@triton.jit
def value_at(row, FIELD: tl.constexpr, TYPE: tl.constexpr, here):
    """Loads the number whose address is in a column; 0 if there is no row."""
    return tl.load(column(row, FIELD, here).to(tl.pointer_type(TYPE)), mask=here, other=0)


@triton.jit
def put_at(row, FIELD: tl.constexpr, TYPE: tl.constexpr, here, value):
    tl.store(column(row, FIELD, here).to(tl.pointer_type(TYPE)), value, mask=here)


@triton.jit
def bit(condition, FLAG: tl.constexpr):
    return tl.where(condition, FLAG, 0)


@triton.jit
def count_step(row, traits, counts, moves):
    """Returns the step count of each tensor including the current step. It is stored for tensors with a gradient."""
    is_double = (traits & STEP_IS_DOUBLE) != 0
    as_double, as_single = counts & is_double, counts & (is_double == 0)
    before = tl.where(
        is_double,
        value_at(row, STEP, tl.float64, as_double),
        value_at(row, STEP, tl.float32, as_single).to(tl.float64),
    )
    t = before + 1.0
    put_at(row, STEP, tl.float64, as_double & moves, t)
    put_at(row, STEP, tl.float32, as_single & moves, t.to(tl.float32))
    return t


@triton.jit
def count_product(row, traits, keeps, moves, mu):
    """Returns NAdam's product of momenta including the current step. It is stored for tensors with a gradient."""
    is_double, is_rounded = (traits & STEP_IS_DOUBLE) != 0, (traits & PRODUCT_IS_FLOAT) != 0
    as_double, as_single = keeps & is_double, keeps & (is_double == 0)
    before = tl.where(
        is_double,
        value_at(row, MU_PRODUCT, tl.float64, as_double),
        value_at(row, MU_PRODUCT, tl.float32, as_single).to(tl.float64),
    )
    product = tl.where(is_rounded, (before.to(tl.float32) * mu.to(tl.float32)).to(tl.float64), before * mu)
    put_at(row, MU_PRODUCT, tl.float64, as_double & moves, product)
    put_at(row, MU_PRODUCT, tl.float32, as_single & moves, product.to(tl.float32))
    return product


@triton.jit
def rate_factor(random_rates, index):
    """Returns the factors of tensors' rates [ASLR, Eq. 10]. ``index``: their positions over all param groups."""
    step, width = tl.load(random_rates + 1), tl.load((random_rates + 2).to(tl.pointer_type(tl.float64)))
    zeros = (index * 0).to(tl.uint32)
    low, high = (step & 0xFFFFFFFF).to(tl.uint32), ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    bits, _, _, _ = tl.philox(tl.load(random_rates), zeros + low, zeros + high, index.to(tl.uint32), zeros)
    return 1.0 + width * ((bits >> 8).to(tl.float64) * 5.9604644775390625e-8 - 0.5)  # 2^-24


@triton.jit
def prepare_active(row, shared, rules, here, moves, has_rate, lr_ref, NOW: tl.constexpr):
    """ActiveLR: counts the step in its interval and sets scalars. Returns flags."""
    active = column(row, ACTIVE, here)
    has = here & (active >= 0)
    rule = rules + tl.where(has, active, 0) * RULE_FIELDS
    applied = value_at(row, ACTIVE_APPLIED, tl.int64, has)
    fresh = applied == 0
    if NOW:
        over = has
        ends = over & (fresh == 0)
        adjusts = over & (applied > 0)
        calls, applied = applied * 0, applied * 0
    else:
        calls = value_at(row, ACTIVE_STEP, tl.int64, has) + 1
        interval = column(rule, INTERVAL, has).to(tl.int64)
        over = has & (interval > 0) & (calls >= interval)
        # Negative if the last step had no rate, since end_interval() needs this.
        steps = tl.where(applied < 0, -applied, applied) + 1
        applied = tl.where(moves, tl.where(has_rate, steps, -steps), applied)
        ends = over & (applied != 0)
        adjusts = over & (applied > 0)
        applied = tl.where(over, 0, applied)
        calls = tl.where(over, 0, calls)
    put_at(row, ACTIVE_STEP, tl.int64, has, calls)
    put_at(row, ACTIVE_APPLIED, tl.int64, has, applied)
    increment = column(rule, INCREMENT, has)
    # If lr_ref is 0, the tensor has no rate and its gains are not adjusted.
    grows = (increment == increment) & (lr_ref != 0)
    high = tl.where(grows, increment / tl.where(grows, lr_ref, 1.0), column(rule, HIGH, has))
    tl.store(shared + S_HIGH, high, mask=has)
    tl.store(shared + S_LOW, column(rule, LOW, has), mask=has)
    tl.store(shared + S_LOWEST, column(rule, LOWEST, has), mask=has)
    tl.store(shared + S_HIGHEST, column(rule, HIGHEST, has), mask=has)
    holds = has & (column(rule, HOLDS, has) != 0)
    return bit(has & fresh, FRESH) | bit(ends, ENDS) | bit(adjusts, ADJUSTS) | bit(holds, HOLDS_ZERO)


@triton.jit
def prepare_trainable(row, shared, rule, has, moves, lr, factor, NOW: tl.constexpr):
    """TrainableLR: counts the step in its interval and sets the interval's scalars. Returns flags."""
    applied = value_at(row, TLR_APPLIED, tl.int64, has)
    lr_sum = value_at(row, LR_SUM, tl.float64, has)
    adds = has
    if NOW:
        ends = has
        calls = applied * 0
    else:
        applied = applied + moves.to(tl.int64)
        lr_sum = lr_sum + tl.where(moves, lr * factor, 0.0)
        calls = value_at(row, TLR_STEP, tl.int64, has) + 1
        interval = column(rule, INTERVAL, has).to(tl.int64)
        ends = has & (interval > 0) & (calls >= interval)
        # If the source is the gradient, the measurement before the last update already includes the gradient.
        adds = has & ((ends & (column(rule, SOURCE, has) == GRADIENT)) == 0)
        eta = column(rule, ETA, has)
        put_at(row, LR_LAST, tl.float64, has & (eta == eta), lr)
    tl.store(shared + S_APPLIED, applied.to(tl.float64), mask=has)
    tl.store(shared + S_LR_SUM, lr_sum, mask=has)
    put_at(row, TLR_STEP, tl.int64, has, tl.where(ends, 0, calls))
    put_at(row, TLR_APPLIED, tl.int64, has, tl.where(ends, 0, applied))
    put_at(row, LR_SUM, tl.float64, has, tl.where(ends, 0.0, lr_sum))
    return bit(ends, DUE) | bit(adds, ADDS)


@triton.jit
def prepare(
    tensors,
    tensor_count,
    grads,
    hypers,
    rules,
    random_rates,
    grad_scale,
    found_inf,
    scalars,
    flags,
    RANDOM_RATES: tl.constexpr,
    NOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts a step and writes the scalars and flags for its kernels.

    Args:
        tensors, hypers, rules: tables of ``fields``.
        grads: address of each tensor's gradient, int64; 0: no gradient.
        random_rates: inputs of ASLR's random rates, see core.random_rates.RandomRates.table.
        grad_scale, found_inf: of AMP, one element each, float32, or for grad_scale float64; 1 and 0 without AMP.
        scalars, flags: tables of ``fields`` that are written.
        RANDOM_RATES: whether rates are random.
        NOW: whether this is ``end_interval()``, outside of a step. There are no gradients then.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = i < tensor_count
    row = tensors + i * TENSOR_FIELDS
    shared = scalars + i * SCALAR_FIELDS
    grad = tl.zeros([BLOCK], tl.int64)
    alive = here
    if not NOW:
        skips = tl.load(found_inf + i * 0, mask=here, other=0)
        alive = here & (skips == 0)  # if AMP skips the step, no state and no count changes
        grad = tl.load(grads + i, mask=alive, other=0)
    moves = grad != 0
    traits = column(row, TRAITS, alive).to(tl.int32)
    hyper = hypers + column(row, GROUP, alive) * HYPER_FIELDS
    lr, weight_decay = column(hyper, LR, alive), column(hyper, WEIGHT_DECAY, alive)
    factor = tl.full([BLOCK], 1.0, tl.float64)
    if RANDOM_RATES:
        factor = rate_factor(random_rates, column(row, INDEX, alive))

    scalar_rule = column(row, SCALAR, alive)
    has_scalar = alive & (scalar_rule >= 0)
    rule = rules + tl.where(has_scalar, scalar_rule, 0) * RULE_FIELDS
    kind = column(rule, KIND, has_scalar)
    trains = has_scalar & (kind == TRAINABLE_LR)
    lr_ref = column(hyper, LR_REF, alive)
    has_rate = (lr != 0) & (lr_ref != 0)
    flag = prepare_active(row, shared, rules, alive, moves, has_rate, lr_ref, NOW)
    tl.store(shared + S_LR_SCALE, column(hyper, LR_SCALE, alive), mask=has_scalar)
    flag |= prepare_trainable(row, shared, rule, trains, moves, lr, factor, NOW)

    if not NOW:
        beta1, beta2 = column(hyper, BETA1, alive), column(hyper, BETA2, alive)
        has_moments = (traits & HAS_MOMENTS) != 0
        t = count_step(row, traits, alive & (column(row, STEP, alive) != 0), moves)
        rectifies, at_five = (traits & RECTIFIES) != 0, (traits & AT_FIVE) != 0
        keeps, mu_decay = alive & (column(row, MU_PRODUCT, alive) != 0), column(hyper, MU_DECAY, alive)
        base, n = tl.where(keeps, mu_decay, beta1), t.to(tl.int64)
        power1, power2 = power(base, n), power(beta2, n)
        numerator, scale, divides = corrections(power1, power2, beta2, t, rectifies, at_five)
        mu, mu_next = momentum_of(power1, beta1), momentum_of(power1 * mu_decay, beta1)
        product = count_product(row, traits, keeps, moves, mu)
        numerator = tl.where(keeps, mu_next / (1.0 - product * mu_next), numerator)
        slopes = has_scalar & (kind == HYPERGRADIENT)
        if tl.max(slopes.to(tl.int32), axis=0) != 0:
            # The direction of the last step, with the current betas.
            power1, power2 = power(base, n - 1), power(beta2, n - 1)
            numerator_prev, scale_prev, divides_prev = corrections(power1, power2, beta2, t - 1.0, rectifies, at_five)
            tl.store(shared + S_NUMERATOR_PREV, numerator_prev, mask=slopes)
            tl.store(shared + S_SCALE_PREV, scale_prev, mask=slopes)
            flag |= bit(divides_prev, DIVIDES_PREV)
        has_direction = value_at(row, DIRECTION_VALID, tl.int64, slopes) != 0
        put_at(row, DIRECTION_VALID, tl.int64, slopes & moves, tl.full([BLOCK], 1, tl.int64))
        flag |= bit(slopes, DUE) | bit(slopes & moves & has_rate & has_direction, SLOPES)
        flag |= bit(moves, STEPS) | bit(((traits & ALIGNED) != 0) & (grad % 16 == 0), WIDE)
        flag |= bit(t == 1.0, FIRST) | bit(divides, DIVIDES) | bit(rectifies == 0, USES_MAX)
        flag |= bit((traits & ADAPTS) != 0, ADAPTIVE)

        momentum, dampening = column(hyper, MOMENTUM, alive), column(hyper, DAMPENING, alive)
        unscaled = 1.0 / tl.load(grad_scale).to(tl.float64)
        tl.store(shared + S_GRAD_FACTOR, tl.where((traits & MAXIMIZES) != 0, -unscaled, unscaled), mask=alive)
        tl.store(shared + S_LR, lr, mask=alive)
        tl.store(shared + S_RATE_FACTOR, factor, mask=alive)
        tl.store(shared + S_WEIGHT_DECAY, weight_decay, mask=alive)
        tl.store(shared + S_DECAY1, tl.where(has_moments, beta1, momentum), mask=alive)
        tl.store(shared + S_WEIGHT1, 1.0 - tl.where(has_moments, beta1, dampening), mask=alive)
        tl.store(shared + S_DECAY2, beta2, mask=alive)
        tl.store(shared + S_WEIGHT2, 1.0 - beta2, mask=alive)
        tl.store(shared + S_EPS, column(hyper, EPS, alive), mask=alive)
        tl.store(shared + S_NUMERATOR, numerator, mask=alive)
        tl.store(shared + S_SCALE, scale, mask=alive)
        tl.store(shared + S_GRAD_NUMERATOR, (1.0 - mu) / (1.0 - product), mask=keeps)
    tl.store(flags + i, tl.where(alive, flag, 0), mask=here)
