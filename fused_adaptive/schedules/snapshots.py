"""Copies of a model, buffers included, in the device's memory, in pinned host memory or in a file."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from ..core.checks import is_dtensor
from ..core.ranks import local_part, reshard

Tensors = dict[str, Tensor]


class Snapshot(Protocol):
    """A copy of a model, which the next ``save`` overwrites."""

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Saves a copy. If it fails, the previous copy has not changed."""
        ...

    def load(self) -> Tensors:
        """Returns the copy, which the caller must not change."""
        ...


def tensors_of(model: Module) -> Tensors:
    """Returns parameters and buffers by name, those not in ``state_dict`` included.

    Unwraps DDP and torch.compile. FSDP2's parameters are the shards of this rank, which the optimizer trains. Of a
    tensor that ``expand`` made, only what is in memory is returned, as a view.
    """
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), Module):
            model = inner
        else:
            break
    reshard(model)
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _without_repeats(t) for name, t in found.items()}


def _without_repeats(tensor: Tensor) -> Tensor:
    """Returns the part that ``expand`` repeats, since torch refuses to write to the repeated elements."""
    if tensor.layout is torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.detach().narrow(dim, 0, 1)
    return tensor


def check_fit(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raises ValueError if names, shapes or shards differ."""
    for name in tensors.keys() | saved.keys():
        copy, tensor = (_layout(held.get(name)) for held in (saved, tensors))
        if copy != tensor:
            raise ValueError(
                f"the snapshot does not fit the model: {name!r} is {copy} in the snapshot and {tensor} in the model; "
                "the model must keep its structure and its sharding while a controller drives it"
            )


def check_writable(tensors: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError if a tensor could not be restored."""
    for name, tensor in tensors.items():
        if tensor.is_inference():
            raise RuntimeError(
                f"{name!r} was made in torch.inference_mode(), so a snapshot could not restore it: make it in "
                "torch.no_grad()"
            )


def _layout(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    shape = f"of shape {tuple(tensor.shape)}"
    if not is_dtensor(tensor):
        return shape
    placements = tensor.placements  # type: ignore[attr-defined]
    return f"{shape} as {placements}, {tuple(local_part(tensor).shape)} on this rank"


@torch.no_grad()
def restore_(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copies ``saved`` into ``tensors`` in place.

    Raises:
        ValueError: if names, shapes or shards differ. Nothing has changed then.
        RuntimeError: if a tensor cannot be written to. Nothing has changed then.
    """
    check_fit(tensors, saved)
    check_writable(tensors)
    for name, tensor in tensors.items():
        local_part(tensor).copy_(local_part(saved[name]))


class MemorySnapshot:
    """A copy in memory, allocated once, of the size of the model's parameters and buffers.

    Args:
        tensors: the tensors to copy.
        pinned: whether the copy is in pinned host memory rather than on the tensors' devices.

    Raises:
        MemoryError: if there is not enough memory.
        RuntimeError: for pinned memory without an accelerator.
    """

    def __init__(self, tensors: Mapping[str, Tensor], pinned: bool = False) -> None:
        if pinned and not torch.accelerator.is_available():
            raise RuntimeError("snapshot='pinned' is host memory for an accelerator, and there is none: use 'device'")
        try:
            self._copy = {name: _allocate(t.detach(), pinned) for name, t in tensors.items()}
        except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError when host memory is exhausted
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
    """A copy in a file, which uses no memory besides the page cache. Each rank of a process group has its own file.

    The file is written under a temporary name, flushed to the disk and renamed. So ``path`` holds a complete copy at
    any time, even if the process is killed or the disk is full. It is ``{"token": …, "tensors": …}``: the token is
    random, and says whose copy it is.

    Args:
        path: the file, in a directory that exists. In a process group of several ranks, ``.rank3`` and so on is
            appended. A deep copy has a file and a token of its own, with ``.copy1`` and so on appended to the path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path).absolute()  # the working directory may change
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            path = path.with_name(f"{path.name}.rank{dist.get_rank()}")
        self.path, self._token = path, uuid.uuid4().hex

    def __deepcopy__(self, memo: Any) -> FileSnapshot:
        beside = (self.path.with_name(f"{self.path.name}.copy{n}") for n in count(1))
        copied = object.__new__(FileSnapshot)
        copied.path, copied._token = next(path for path in beside if not path.exists()), uuid.uuid4().hex
        copied.save(self.load())
        return copied

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            with open(partial, "wb") as file:
                copies = {name: t.detach() for name, t in tensors.items()}
                torch.save({"token": self._token, "tensors": copies}, file)
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
        """Returns the copy in the file.

        Raises:
            FileNotFoundError: if the file is gone.
            RuntimeError: if something else has written to the file.
        """
        try:
            saved = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the snapshot {self.path} is gone, so the model cannot be restored: put it back and repeat the call"
            ) from None
        if not isinstance(saved, dict) or saved.get("token") != self._token:
            raise RuntimeError(
                f"the snapshot {self.path} is not the one that this controller saved: something else writes to the "
                "file, such as another controller; give each controller a path of its own"
            )
        return saved["tensors"]


def make(where: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> Snapshot:
    """Returns a snapshot with a first copy of ``tensors``. ``where``: ``"device"``, ``"pinned"`` or a file's path."""
    check_writable(tensors)
    if not isinstance(where, (str, os.PathLike)) or not os.fspath(where):
        raise TypeError(f"snapshot must be 'device', 'pinned' or the path of a file, got {where!r}")
    if where in ("device", "pinned"):
        return MemorySnapshot(tensors, pinned=where == "pinned")
    snapshot = FileSnapshot(where)
    snapshot.save(tensors)
    return snapshot


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Returns the size of a copy in bytes."""
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _allocate(tensor: Tensor, pinned: bool) -> Tensor:
    if not pinned:
        return torch.empty_like(tensor)
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
