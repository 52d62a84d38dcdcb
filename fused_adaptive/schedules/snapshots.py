"""Copies of a model, buffers included, in the device's memory, in pinned host memory or in a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

Tensors = dict[str, Tensor]


class Snapshot(Protocol):
    """One copy, overwritten by the next ``save``."""

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the copy. Where it fails, the previous one is still there."""
        ...

    def load(self) -> Tensors:
        """The copy, for reading only."""
        ...


def tensors_of(model: Module) -> Tensors:
    """Parameters and buffers by name, also those that ``state_dict`` leaves out; looks inside DDP and torch.compile."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), Module):
            model = inner
        else:
            break
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_fit(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raises ValueError where names or shapes differ."""
    for name in tensors.keys() | saved.keys():
        here, there = tensors.get(name), saved.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (there, here)]
            raise ValueError(
                f"the snapshot does not fit the model: {name!r} has shape {shapes[0]} in the snapshot and {shapes[1]} "
                "in the model; the model must keep its structure while a controller drives it"
            )


@torch.no_grad()
def restore_(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copies ``saved`` into ``tensors`` in place.

    Raises:
        ValueError: where they do not fit. Then nothing has changed.
    """
    check_fit(tensors, saved)
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


class MemorySnapshot:
    """A copy in memory, allocated once: as many bytes as the model's parameters and buffers.

    Args:
        tensors: what is to be copied.
        pinned: in pinned host memory in place of the tensors' own devices.

    Raises:
        MemoryError: if it does not fit.
        RuntimeError: for pinned memory without an accelerator.
    """

    def __init__(self, tensors: Mapping[str, Tensor], pinned: bool = False) -> None:
        if pinned and not torch.accelerator.is_available():
            raise RuntimeError("snapshot='pinned' is host memory for an accelerator, and there is none: use 'device'")
        try:
            self._copy = {name: _allocate(t.detach(), pinned) for name, t in tensors.items()}
        except (MemoryError, RuntimeError) as error:  # torch has no class of its own for a full host
            where = "pinned host memory" if pinned else "/".join(sorted({t.device.type for t in tensors.values()}))
            other = "a file's path" if pinned else "'pinned' or a file's path"
            raise MemoryError(
                f"no room in {where} for a snapshot of the model, {size_of(tensors) / 2**20:.1f} MiB: pass snapshot="
                f"{other}"
            ) from error
        self.save(tensors)

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        restore_(self._copy, tensors)

    def load(self) -> Tensors:
        return self._copy


class FileSnapshot:
    """A copy in a file: no memory but the page cache. Each rank of a process group has a file of its own.

    The file is written beside its place, flushed to the disk and moved there: under its name there is a whole copy at
    any time, even if the process is killed or the disk is full.

    Args:
        path: the file; its directory must exist. In a process group of several ranks ``.rank3`` and so on is added.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            path = path.with_name(f"{path.name}.rank{dist.get_rank()}")
        self.path = path

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                torch.save({name: t.detach() for name, t in tensors.items()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            _sync_directory(self.path.parent)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise OSError(
                f"the snapshot of the model, {size_of(tensors) / 2**20:.1f} MiB, could not be written to {self.path}: "
                f"{error}. The previous one is untouched; make room there and repeat the call"
            ) from error

    def load(self) -> Tensors:
        try:
            return torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the snapshot {self.path} is gone, so the model cannot be restored: put it back and repeat the call"
            ) from None


def make(where: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> Snapshot:
    """``"device"``, ``"pinned"`` or a file's path; the first copy is taken at once."""
    if where in ("device", "pinned"):
        return MemorySnapshot(tensors, pinned=where == "pinned")
    snapshot = FileSnapshot(where)
    snapshot.save(tensors)
    return snapshot


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a copy."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _allocate(tensor: Tensor, pinned: bool) -> Tensor:
    if not pinned:
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # where a directory cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
