"""Arithmetic of backbones and gains in Triton, the same for all GPUs.

It is tested against the torch definition: the interface in :mod:`fused_adaptive.core.backbone` and the backbones in
``fused_adaptive/optimizers/``. Operations have the same order as in the native definition in ``csrc/rules``, so results
of IEEE 754 arithmetic have the same bits. Kernels are compiled without contraction to fused multiply-adds.

An ``update`` takes the gradient, three arrays of state (some of which it may not use) and the scalars ``r`` of the
step. It returns the direction ``u`` and the new state. A ``direction`` returns the ``u`` of the current state.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false
# (Triton's compiler determines the types of arguments; type checkers do not see them.)

from __future__ import annotations

import triton
import triton.language as tl

# ---- storage ----


@triton.jit
def widen(x, TYPE: tl.constexpr):
    """Converts loaded values to the type of the arithmetic. bfloat16 is loaded as its bits."""
    if x.dtype == tl.uint16:
        wide = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(TYPE)
    return wide


@triton.jit
def narrow(x, STORED: tl.constexpr):
    """Rounds to nearest, ties to even. bfloat16 is rounded with integers, since Triton's interpreter truncates it."""
    if STORED == tl.uint16:  # noqa: SIM300
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        stored = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    else:
        stored = x.to(STORED)
    return stored


# ---- IEEE arithmetic ----


@triton.jit
def divide(x, y):
    """Returns the correctly rounded quotient. A float32 ``/`` is not correctly rounded on NVIDIA GPUs."""
    if x.dtype == tl.float32:
        quotient = tl.div_rn(x, y)
    else:
        quotient = x / y
    return quotient


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        root = tl.sqrt_rn(x)
    else:
        root = tl.sqrt(x)
    return root


@triton.jit
def is_finite(x):
    return x - x == 0


@triton.jit
def larger(a, b):
    """Returns the larger of both; NaN if one of them is NaN."""
    return tl.where((b > a) | (b != b), b, a)


# ---- updates ----


@triton.jit
def sgd_plain(g, s0, s1, s2, r):
    return g, s0, s1, s2


@triton.jit
def sgd_momentum(g, s0, s1, s2, r):
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    buffer = tl.where(first, g, decay1 * s0 + weight1 * g)
    return buffer, buffer, s1, s2


@triton.jit
def sgd_nesterov(g, s0, s1, s2, r):
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    buffer = tl.where(first, g, decay1 * s0 + weight1 * g)
    return g + decay1 * buffer, buffer, s1, s2


@triton.jit
def adam(g, s0, s1, s2, r):
    """AdamW and RAdam. They differ only in their scalars."""
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    mean = decay1 * s0 + weight1 * g
    square = decay2 * s1 + (weight2 * g) * g
    return quotient(mean, square, s2, r), mean, square, s2


@triton.jit
def adam_amsgrad(g, s0, s1, s2, r):
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    mean = decay1 * s0 + weight1 * g
    square = decay2 * s1 + (weight2 * g) * g
    most = larger(s2, square)
    return quotient_of_max(mean, square, most, r), mean, square, most


@triton.jit
def nadam(g, s0, s1, s2, r):
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    mean = decay1 * s0 + weight1 * g
    square = decay2 * s1 + (weight2 * g) * g
    return divide(grad_numerator * g + numerator * mean, square_root(square) * scale + eps), mean, square, s2


@triton.jit
def belief(g, s0, s1, s2, r):
    """AdaBelief, with and without rectification."""
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    mean = decay1 * s0 + weight1 * g
    surprise = g - mean
    variance = decay2 * s1 + (weight2 * surprise) * surprise + eps
    return quotient(mean, variance, s2, r), mean, variance, s2


@triton.jit
def belief_amsgrad(g, s0, s1, s2, r):
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    mean = decay1 * s0 + weight1 * g
    surprise = g - mean
    variance = decay2 * s1 + (weight2 * surprise) * surprise + eps
    most = larger(s2, variance)
    return quotient_of_max(mean, variance, most, r), mean, variance, most


# ---- directions ----


@triton.jit
def momentum(s0, s1, s2, r):
    return s0


@triton.jit
def quotient(s0, s1, s2, r):
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    denominator = tl.where(divides, square_root(s1) * scale + eps, 1.0)
    return divide(numerator * s0, denominator)


@triton.jit
def quotient_of_max(s0, s1, s2, r):
    decay1, weight1, decay2, weight2, numerator, scale, eps, divides, uses_max, first, grad_numerator = r
    return quotient(s0, tl.where(uses_max, s2, s1), s2, r)


# ---- the scalars of a step, in float64 ----


@triton.jit
def _product(a_high, a_low, b_high, b_low):
    """Returns the product of two numbers, each a sum of two float64, with about 100 bits [Dekker 1971]."""
    p = a_high * b_high
    t = a_high * 134217729.0  # 2²⁷ + 1 splits 53 bits into halves
    a1 = t - (t - a_high)
    a2 = a_high - a1
    t = b_high * 134217729.0
    b1 = t - (t - b_high)
    b2 = b_high - b1
    error = ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2
    error = error + (a_high * b_low + a_low * b_high)
    high = p + error
    return high, error - (high - p)


@triton.jit
def power(base, exponent):
    """Returns ``base ** exponent`` for float64 bases in [0, 1] and integer exponents, almost always correctly rounded.

    It squares repeatedly with twice the precision, since in float64 the error would be as many ulps as steps. Triton
    has no ``pow`` that its interpreter supports.
    """
    high, low = base * 0 + 1.0, base * 0
    square_high, square_low = base, base * 0
    left = exponent
    while tl.max(left, axis=0) > 0:
        odd = (left & 1) != 0
        times_high, times_low = _product(high, low, square_high, square_low)
        high = tl.where(odd, times_high, high)
        low = tl.where(odd, times_low, low)
        square_high, square_low = _product(square_high, square_low, square_high, square_low)
        left = left >> 1
    return high


@triton.jit
def corrections(power1, power2, beta2, t, rectifies, at_five):
    """Returns numerator, scale and divides of step ``t``.

    ``u = numerator·m / (scale·√v + ε)`` if divides, else ``u = numerator·m``. The latter is the case if the backbone
    rectifies [RAdam, Eq. 3 and 4] and the variance cannot be rectified yet.

    Args:
        power1, power2: ``β1^t`` and ``β2^t``.
    """
    correction2 = 1.0 - power2
    numerator = 1.0 / (1.0 - power1)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * t * power2 / correction2
    rectification = tl.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
    long_enough = tl.where(at_five, rho >= 5.0, rho > 5.0)
    rectified = tl.where(long_enough, numerator * (rectification * tl.sqrt(correction2)), numerator)
    return (
        tl.where(rectifies, rectified, numerator),
        tl.where(rectifies, 1.0, 1.0 / tl.sqrt(correction2)),
        long_enough | (rectifies == 0),
    )


@triton.jit
def momentum_of(power1, beta1):
    """Returns NAdam's momentum of step ``t``. ``power1``: ``0.96^(t·momentum_decay)``."""
    return beta1 * (1.0 - 0.5 * power1)


# ---- the gains of whole tensors ----


@triton.jit
def bounded(gain, lowest, highest):
    return tl.where(gain < lowest, lowest, tl.where(gain > highest, highest, gain))


@triton.jit
def ascended(gain, amount, lowest, highest):
    """Returns the gain plus the amount, at least 0 and within the bounds; the gain if the amount is not finite."""
    moved = gain + amount
    return tl.where(is_finite(amount), bounded(tl.where(moved > 0, moved, 0.0), lowest, highest), gain)


@triton.jit
def newton_factor(num, sq, c):
    """Returns 1 + num/den, bounded to [3/4, 1 + c] [TLR, Eq. 9]; 3/4 if num or sq is not finite or den is not positive.

    It is 1 if num is 0.
    """
    curvature, bound = 4.0 * (sq - num), num / c
    den = tl.where(curvature > bound, curvature, bound)
    factor = 1.0 + num / den
    factor = tl.where(factor < 0.75, 0.75, tl.where(factor > 1.0 + c, 1.0 + c, factor))
    factor = tl.where(den <= 0, 0.75, factor)
    factor = tl.where(num == 0, 1.0, factor)
    return tl.where(is_finite(num) & is_finite(sq), factor, 0.75)
