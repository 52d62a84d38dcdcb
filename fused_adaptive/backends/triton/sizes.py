"""Sizes of programs by dtype and device. They are not tuned at run time, since kernels write in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .interpreter import is_interpreted

#: Blocks in a chunk: enough that reading the tables takes little time, few enough that programs end at about the same
#: time.
BLOCKS_OF_CHUNK = 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of an update program.

    Args:
        block: elements at a time with wide accesses, 16 bytes of parameters per thread.
        tail: elements at a time without wide accesses, one per thread.
        warps: warps of a program.
        itemsize: bytes of an element of the parameters.
        is_cuda: whether the device is an NVIDIA GPU.
    """

    block: int
    tail: int
    warps: int
    itemsize: int
    is_cuda: bool

    @property
    def chunk(self) -> int:
        return BLOCKS_OF_CHUNK * self.block


def sizes_for(dtype: torch.dtype, warp_size: int, is_cuda: bool) -> Sizes:
    """Returns the sizes of an update.

    A program of 16-bit parameters has one warp. With 8 elements per thread Triton stores the float32 state in another
    layout than it loads it in. Within a warp the conversion takes shuffles instead of shared memory and barriers.
    """
    threads = 256 if dtype.itemsize >= 4 else warp_size
    return Sizes(threads * 16 // dtype.itemsize, threads, threads // warp_size, dtype.itemsize, is_cuda)


def sizes_of(dtype: torch.dtype, device: torch.device) -> Sizes:
    """Returns the sizes for an available device."""
    if is_interpreted():  # its time depends on the number of operations, not on their size
        return Sizes(4096, 4096, 1, dtype.itemsize, is_cuda=False)
    from triton.runtime import driver

    with torch.cuda.device(device):
        target: Any = driver.active.get_current_target()
    return sizes_for(dtype, target.warp_size, target.backend == "cuda")


#: Registers per thread on NVIDIA, by bytes of a parameter: for up to seven arrays, and for more. They follow from the
#: machine code of each kernel (tests/triton_backend/test_machine_code.py). With 64, four programs of float32 fit on a
#: multiprocessor. With eight arrays three should suffice, since bandwidth depends on the bytes in flight.
REGISTERS = {2: (128, 128), 4: (64, 80), 8: (128, 168)}


def options(sizes: Sizes, arrays: int = 0) -> dict[str, Any]:
    """Returns Triton's options for an update that reads ``arrays`` arrays."""
    chosen: dict[str, Any] = {"num_warps": sizes.warps, "num_stages": 1, "enable_fp_fusion": False}
    if sizes.is_cuda:
        chosen["maxnreg"] = REGISTERS[sizes.itemsize][arrays >= 8]
    return chosen


#: Threads of a program of ``prepare``, ``measure``, ``slope`` and ``finish``. ``prepare`` and ``finish`` take as many
#: tensors at a time: if two threads had the same tensor, one could read a count that the other has already increased.
THREADS = 128


def lanes_options(is_cuda: bool, warp_size: int = 32, itemsize: int = 4) -> dict[str, Any]:
    """Returns Triton's options for kernels with blocks of fixed size.

    Args:
        is_cuda: whether the device is an NVIDIA GPU.
        warp_size: threads of a warp.
        itemsize: bytes of an element of the parameters, for kernels that read them.
    """
    chosen = {"num_warps": max(1, THREADS // warp_size), "num_stages": 1, "enable_fp_fusion": False}
    return chosen | ({"maxnreg": 255 if itemsize == 8 else 128} if is_cuda else {})
