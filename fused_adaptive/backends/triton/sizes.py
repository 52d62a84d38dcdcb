"""How much a program takes at a time, by dtype and device. Nothing is tuned at run time: kernels write in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .interpreter import is_interpreted

#: Elements of a chunk in blocks: so many that reading the tables does not count, so few that programs end together.
BLOCKS_OF_CHUNK = 8


@dataclass(frozen=True)
class Sizes:
    """``block``: 16 bytes of parameters a thread. ``tail``: one element a thread, for what is left or not aligned."""

    block: int
    tail: int
    warps: int
    itemsize: int
    is_cuda: bool

    @property
    def chunk(self) -> int:
        return BLOCKS_OF_CHUNK * self.block


def sizes_for(dtype: torch.dtype, warp_size: int, is_cuda: bool) -> Sizes:
    """The sizes of an update.

    A program of 16-bit parameters is one warp: Triton stores the float32 state in another layout than it loads it in,
    with 8 elements a thread, and within a warp that takes shuffles instead of shared memory and barriers.
    """
    threads = 256 if dtype.itemsize >= 4 else warp_size
    return Sizes(threads * 16 // dtype.itemsize, threads, threads // warp_size, dtype.itemsize, is_cuda)


def sizes_of(dtype: torch.dtype, device: torch.device) -> Sizes:
    """The sizes on a device that is there."""
    if is_interpreted():  # whose time goes by operations, whatever their size
        return Sizes(4096, 4096, 1, dtype.itemsize, is_cuda=False)
    from triton.runtime import driver

    with torch.cuda.device(device):
        target: Any = driver.active.get_current_target()
    return sizes_for(dtype, target.warp_size, target.backend == "cuda")


#: Registers a thread on NVIDIA, by bytes of a parameter: up to seven arrays, and more. Found by looking at what the
#: compiler makes of each kernel (tests/triton/test_machine_code.py). 64 keep four programs of float32 on a
#: multiprocessor; with eight arrays, three should do: what fills the memory's pipe is the bytes on their way.
REGISTERS = {2: (128, 128), 4: (64, 80), 8: (128, 168)}


def options(sizes: Sizes, arrays: int = 0) -> dict[str, Any]:
    """Triton's options for an update that reads so many arrays."""
    chosen: dict[str, Any] = {"num_warps": sizes.warps, "num_stages": 1, "enable_fp_fusion": False}
    if sizes.is_cuda:
        chosen["maxnreg"] = REGISTERS[sizes.itemsize][arrays >= 8]
    return chosen


#: Threads of a program of ``prepare``, ``measure``, ``slope`` and ``finish``. Where a program takes tensors, it takes
#: as many: of two threads that had the same one, one would read what the other has counted.
THREADS = 128


def lanes_options(is_cuda: bool, warp_size: int = 32, itemsize: int = 4) -> dict[str, Any]:
    """Of the kernels whose blocks are of fixed size. ``itemsize``: of the parameters, for those that read them."""
    chosen = {"num_warps": max(1, THREADS // warp_size), "num_stages": 1, "enable_fp_fusion": False}
    return chosen | ({"maxnreg": 255 if itemsize == 8 else 128} if is_cuda else {})
