"""The counter-based random numbers of ASLR's draws: no state, the same on every rank, device and backend."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011), elementwise.

    Args:
        counter: four int64 tensors of one shape (or broadcastable to it), each a 32-bit word.
        key: two 32-bit words.

    Returns:
        Four int64 tensors with 32-bit words.
    """
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The low 64 bits of the product are right although int64 wraps, and the mask undoes the arithmetic shift.
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = ((p1 >> 32) & WORD) ^ x1 ^ k0, p1 & WORD
        x2, x3 = ((p0 >> 32) & WORD) ^ x3 ^ k1, p0 & WORD
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & WORD, (k1 + _KEY_INCREMENTS[1]) & WORD
    return x0, x1, x2, x3


def uniform(seed: int, step: Tensor, index: Tensor) -> Tensor:
    """``u`` in [0, 1), 24 bits each: the oracle of every backend's draws.

    Args:
        seed: its low 64 bits are the key.
        step: int64, 0-dim: applied optimizer steps before this one.
        index: int64: positions of tensors over all param groups, each below 2³².

    Returns:
        float64, shaped as ``index``, on its device; nothing is read back on the host.
    """
    key = (seed & WORD, (seed >> 32) & WORD)
    zero = torch.zeros_like(index)
    low, high = (step & WORD).expand_as(index), ((step >> 32) & WORD).expand_as(index)
    x0, *_ = philox4x32((low, high, index, zero), key)
    return (x0 >> 8).to(torch.float64) * 2.0**-24
