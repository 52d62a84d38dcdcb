"""Upper bounds of the speed of a step: copy, triad, and a null kernel that reads and writes the same arrays.

They take turns with the other contenders in the same process, so that load on the machine slows all of them equally.
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

#: The most elements of a null step: far more than every cache holds, where its rate is constant. Not a power of two on
#: a CPU: the addresses of arrays of 2**25 floats alias on some processors, which costs a third of the rate.
MOST_ELEMENTS = {"cpu": 33_000_000, "cuda": 2**27}
#: Bytes of each array of copy and triad, far more than every cache holds.
ARRAY_BYTES = {"cpu": 2**27, "cuda": 2**30}


@dataclass(frozen=True)
class Call:
    """A contender whose step is a function call."""

    step: Callable[[], Any]


def bandwidth_contenders(device: torch.device) -> list[Contender]:
    """Returns copy and triad. They use no parameters; their algorithm is a placeholder."""
    numel = ARRAY_BYTES[device.type] // 4

    def arrays(count: int) -> list[Tensor]:
        return [torch.ones(numel, device=device) for _ in range(count)]

    def copy(_: Sequence[Tensor]) -> Steps:
        a, b = arrays(2)
        return Call(lambda: a.copy_(b))

    def triad(_: Sequence[Tensor]) -> Steps:
        a, b, c = arrays(3)
        return Call(lambda: torch.add(b, c, alpha=0.5, out=a))

    placeholder = Algorithm("AdamW")
    return [Contender("copy", "ceiling", placeholder, copy), Contender("triad", "ceiling", placeholder, triad)]


def bandwidth_bytes(name: str, device: torch.device) -> int:
    """Returns the bytes that copy or triad reads and writes."""
    return {"copy": 2, "triad": 3}[name] * ARRAY_BYTES[device.type]


def null_contenders(algorithms: Sequence[Algorithm], device: torch.device) -> list[Contender]:
    """Returns the native null step of each algorithm, and on a GPU also Triton's."""
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
        numel = -(-numel // 16) * 16  # a multiple of the vector length

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
