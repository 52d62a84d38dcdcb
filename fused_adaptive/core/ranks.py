"""The ranks that hold parts of a tensor, and sums over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def local_part(value: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its local tensor itself, not a view; else the tensor."""
    if not is_dtensor(value):
        return value
    local = value._local_tensor  # type: ignore[attr-defined]  # to_local() gives views, whose identity tells nothing
    return local.wait() if hasattr(local, "wait") else local  # an asynchronous collective may still be under way


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold parts of a tensor.

    Args:
        sums: groups over which partial sums are added, one after another.
        copies: groups in which the first rank's sum then replaces the others'. Those sum the same numbers in groups of
            their own, perhaps in another order: rates must not differ by a rounding.
    """

    sums: tuple[ProcessGroup, ...]
    copies: tuple[ProcessGroup, ...] = ()

    def add_up_(self, values: Tensor) -> None:
        """Sums over the ranks, in place; afterwards all ranks hold the same bits. Does not wait on the host for a GPU.

        Args:
            values: float64, of the same shape on all ranks.
        """
        for group in self.sums:
            _on_device_of(group, values, lambda t, group=group: dist.all_reduce(t, group=group))
        for group in self.copies:
            _on_device_of(group, values, lambda t, group=group: dist.broadcast(t, group=group, group_src=0))


def _on_device_of(group: ProcessGroup, values: Tensor, collective: Any) -> None:
    """Runs a collective on values whose device the group may not serve (parameters offloaded to the CPU under nccl)."""
    device = device_served(group._device_types, values.device)
    moved = values.to(device)
    collective(moved)
    if moved is not values:
        values.copy_(moved)


def device_served(served: Sequence[torch.device], device: torch.device) -> torch.device:
    """``device`` if a group serves its type, else the current device of a type that it serves."""
    types = [d.type for d in served]
    if device.type in types or not types:
        return device
    return (
        torch.device(types[0])
        if types[0] == "cpu"
        else torch.device(types[0], torch.accelerator.current_device_index())
    )


def ranks_of(param: Tensor, process_group: ProcessGroup | None) -> Ranks | None:
    """Over which ranks a parameter is sharded; None if this rank holds all of it.

    Args:
        param: a DTensor, or anything else.
        process_group: the ranks that hold parts of whatever is no DTensor.
    """
    if not is_dtensor(param):
        return None if process_group is None else Ranks((process_group,))
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None:
        return None  # this rank has no part in it
    split = [dim for dim, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(dim) > 1]
    if not split:
        return None
    # Along the last of them all ranks get the same bits; along the others, whoever comes first decides.
    others = [dim for dim in range(mesh.ndim) if dim != split[-1] and mesh.size(dim) > 1]
    return Ranks(tuple(map(mesh.get_group, split)), tuple(map(mesh.get_group, others)))


class RowSums:
    """Sums rows of a table over the ranks that hold parts of their tensors.

    Args:
        ranks: of each row; None for a tensor that is whole.
        device: of the tables.
    """

    def __init__(self, ranks: Sequence[Ranks | None], device: torch.device) -> None:
        rows: dict[Ranks, list[int]] = {}
        for row, key in enumerate(ranks):
            if key is not None:
                rows.setdefault(key, []).append(row)
        self._rows = [(key, torch.tensor(own, device=device)) for key, own in rows.items()]

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __call__(self, table: Tensor) -> None:
        """In place; ``table``: float64, (rows, anything), whose other rows stay."""
        for ranks, rows in self._rows:
            values = table.index_select(0, rows)
            ranks.add_up_(values)
            table.index_copy_(0, rows, values)


def any_rank(params: Iterable[Tensor], process_group: ProcessGroup | None, flag: bool) -> bool:
    """Whether ``flag`` is true on any rank that holds a part of these parameters."""
    count = torch.tensor(float(flag), dtype=torch.float64, device="cpu")
    for ranks in dict.fromkeys(ranks_of(p, process_group) for p in params):
        if ranks is not None:
            ranks.add_up_(count)
    return bool(count > 0)
