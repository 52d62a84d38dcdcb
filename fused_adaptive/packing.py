"""Small tensors of state side by side in memory.

A step of many small tensors waits for memory. Where each has a storage of its own, that is two more lines of the caches
for each to find out where its data is, and data that no hardware fetches ahead.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

#: Bytes: larger tensors keep a storage of their own, for nothing can be seen to be gained.
SMALL = 16 * 1024
#: Tensors of a common storage, at most: who copies or saves one of them alone copies or saves them all.
BLOCK = 32
#: Bytes between the beginnings of tensors of more than one element, as allocators align.
ALIGNMENT = 64


def pack(tensors: Iterable[Tensor]) -> None:
    """Moves those that are small to common storages, in this order; they stay the same objects with the same versions.

    Args:
        tensors: new ones, of which nobody has a view yet. Those of other classes, and those that are not all of their
            storage, stay where they are.
    """
    by_kind: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for tensor in tensors:
        if _is_packable(tensor):
            # One-element tensors lie close together, apart from the others.
            by_kind.setdefault((tensor.device, tensor.dtype, tensor.numel() == 1), []).append(tensor)
    for alike in by_kind.values():
        for begin in range(0, len(alike), BLOCK):
            _move(alike[begin : begin + BLOCK])


@torch.no_grad()
def unpack(tensors: Iterable[Tensor]) -> None:
    """Gives those that lie in a common storage one of their own; they stay the same objects with the same versions."""
    for tensor in tensors:
        is_small = type(tensor) is Tensor and 0 < tensor.nbytes <= SMALL and not tensor._is_view()
        if is_small and not tensor.is_inference() and tensor.untyped_storage().nbytes() > tensor.nbytes:
            tensor.data = tensor.clone()


def _is_packable(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.is_inference() or tensor.device.type == "meta":
        return False
    return 0 < tensor.nbytes <= SMALL and tensor.untyped_storage().nbytes() == tensor.nbytes


def _room(tensor: Tensor) -> int:
    """How many elements further the next one begins."""
    each = max(ALIGNMENT // tensor.itemsize, 1)
    return 1 if tensor.numel() == 1 else -(-tensor.numel() // each) * each


@torch.no_grad()
def _move(tensors: list[Tensor]) -> None:
    if len(tensors) == 1:
        return
    rooms = list(map(_room, tensors))
    common = tensors[0].new_zeros(sum(rooms))
    at = 0
    for tensor, room in zip(tensors, rooms, strict=True):
        place = common.as_strided(tensor.shape, tensor.stride(), at)
        place.copy_(tensor)
        tensor.data = place
        at += room
