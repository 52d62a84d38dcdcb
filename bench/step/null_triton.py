"""The null step in Triton: the streams of a step without its arithmetic. The import needs Triton, the step a GPU."""

# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Elements per program: 8 for each thread of 8 warps, so that accesses are 16 bytes wide.
BLOCK = 2048


@triton.jit
def _null_kernel(param, written, grads, read, numel, mask, BLOCK: tl.constexpr):
    """Reads and writes every array once, with all loads before the first store.

    ``mask`` is 0 and unknown to the compiler, so that loads whose result is masked out are not removed.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    p = tl.load(param + offsets, inside)
    from_grads = tl.zeros_like(p)
    for k in tl.static_range(len(grads)):
        from_grads = from_grads ^ tl.load(grads[k] + offsets, inside, eviction_policy="evict_first")
    from_read = tl.full((BLOCK,), 1, tl.int32)
    for k in tl.static_range(len(read)):
        from_read = from_read ^ tl.load(read[k] + offsets, inside)
    # Unrolled by hand: in a loop each load would come after the previous store, and the compiler cannot move it up.
    if len(written) > 0:
        w0 = tl.load(written[0] + offsets, inside)
    if len(written) > 1:
        w1 = tl.load(written[1] + offsets, inside)
    if len(written) > 2:
        w2 = tl.load(written[2] + offsets, inside)
    if len(written) > 3:
        w3 = tl.load(written[3] + offsets, inside)
    from_read = from_read & mask
    tl.store(param + offsets, p ^ (from_grads & mask.to(p.dtype)), inside)
    if len(written) > 0:
        tl.store(written[0] + offsets, w0 ^ from_read, inside)
    if len(written) > 1:
        tl.store(written[1] + offsets, w1 ^ from_read, inside)
    if len(written) > 2:
        tl.store(written[2] + offsets, w2 ^ from_read, inside)
    if len(written) > 3:
        tl.store(written[3] + offsets, w3 ^ from_read, inside)


def null_step(param: Tensor, written: list[Tensor], grads: list[Tensor], read: list[Tensor], mask: int = 0) -> None:
    """Reads and writes ``param`` and ``written``, and reads ``grads`` and ``read``.

    Args:
        param: float32, bfloat16 or float16 ``[n]``.
        written, read: float32 ``[n]`` each, at most 4 in ``written``.
        grads: in param's dtype, ``[n]`` each.
        mask: with 0 (default) no value changes; with -1 the bits that are read are XORed into those that are written.

    Raises:
        ValueError: for more than 4 arrays in ``written``.
    """
    if len(written) > 4:
        raise ValueError(f"null_step writes up to 4 arrays besides the parameter, got {len(written)}")
    word = {2: torch.int16, 4: torch.int32}[param.element_size()]

    def words(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(t.view(dtype) for t in tensors)

    numel = param.numel()
    _null_kernel[(triton.cdiv(numel, BLOCK),)](
        *words([param], word),
        words(written, torch.int32),
        words(grads, word),
        words(read, torch.int32),
        numel,
        mask,
        BLOCK=BLOCK,
        num_warps=8,
    )
