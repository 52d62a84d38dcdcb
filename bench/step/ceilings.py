"""What a step cannot be faster than: copy, triad, and a null kernel that reads and writes the same arrays.

They take turns with the contenders, in the same process, so that whatever slows the machine slows them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_adaptive.backends import native

from .algorithms import Algorithm
from .rivals import Contender, Steps, Unavailable

#: Elements of a null step, at most: far beyond every cache, where its rate no longer changes. On a CPU no power of two:
#: arrays of 2**25 floats lie in memory such that some processors confuse their lines, and lose a third of the rate.
MOST_ELEMENTS = {"cpu": 33_000_000, "cuda": 2**27}
#: Bytes of each array of copy and triad. What they move is far beyond every cache; on a GPU, 2 GB and more.
ARRAY_BYTES = {"cpu": 2**27, "cuda": 2**30}


@dataclass(frozen=True)
class Call:
    """A function as something to step."""

    step: Callable[[], Any]


def bandwidth_contenders(device: torch.device) -> list[Contender]:
    """Copy and triad. They have no algorithm of their own and take no parameters."""
    numel = ARRAY_BYTES[device.type] // 4

    def arrays(count: int) -> list[Tensor]:
        return [torch.ones(numel, device=device) for _ in range(count)]

    def copy(_: Sequence[Tensor]) -> Steps:
        a, b = arrays(2)
        return Call(lambda: a.copy_(b))

    def triad(_: Sequence[Tensor]) -> Steps:
        a, b, c = arrays(3)
        return Call(lambda: torch.add(b, c, alpha=0.5, out=a))

    nothing = Algorithm("AdamW")
    return [Contender("copy", "ceiling", nothing, copy), Contender("triad", "ceiling", nothing, triad)]


def bandwidth_bytes(name: str, device: torch.device) -> int:
    """What one of them moves."""
    return {"copy": 2, "triad": 3}[name] * ARRAY_BYTES[device.type]


def null_contenders(algorithms: Sequence[Algorithm], device: torch.device) -> list[Contender]:
    """A null step of each algorithm, native, and on a GPU Triton's."""
    makers = {"null, native": _native()}
    if device.type == "cuda":
        makers["null, triton"] = _triton()
    return [
        Contender(name, "ceiling", algorithm, _null(algorithm, maker), 8, MOST_ELEMENTS[device.type])
        for algorithm in algorithms
        for name, maker in makers.items()
    ]


NullStep = Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor]], None]


def _null(algorithm: Algorithm, maker: Callable[[torch.device], NullStep]) -> Callable[[Sequence[Tensor]], Steps]:
    def build(params: Sequence[Tensor]) -> Steps:
        device, dtype, streams = params[0].device, params[0].dtype, algorithm.streams
        null_step = maker(device)
        numel = min(sum(p.numel() for p in params), MOST_ELEMENTS[device.type])
        numel = -(-numel // 16) * 16  # whole vectors

        def arrays(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
            return [torch.ones(numel, device=device, dtype=dtype) for _ in range(count)]

        (param,), grads = arrays(1, dtype), arrays(streams.grads, dtype)
        written, read = arrays(streams.written), arrays(streams.read)
        return Call(lambda: null_step(param, written, grads, read))

    return build


def _native() -> Callable[[torch.device], NullStep]:
    def make(device: torch.device) -> NullStep:
        if reason := native.why_not([device]):
            raise Unavailable(reason)
        return torch.ops.fused_adaptive.null_step.default

    return make


def _triton() -> Callable[[torch.device], NullStep]:
    def make(_: torch.device) -> NullStep:
        try:
            from .null_triton import null_step
        except ImportError as error:
            raise Unavailable(f"triton is not there: {error}") from error
        return null_step

    return make
