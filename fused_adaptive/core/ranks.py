"""Ranks that hold parts of a tensor, and sums over them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.nn import Module


def local_part(value: Tensor) -> Tensor:
    """Returns this rank's part of a tensor: of a DTensor the local tensor itself, not a view; else the tensor."""
    if not is_dtensor(value):
        return value
    # Not to_local(), whose views cannot be compared by identity.
    local = value._local_tensor  # type: ignore[attr-defined]
    return local.wait() if hasattr(local, "wait") else local  # an asynchronous collective may be pending


def reshard(model: Module) -> None:
    """Makes the parameters of a model under FSDP2 those that its optimizer trains: this rank's shards.

    After a forward pass without a backward pass (an evaluation) the root has whole parameters, which the next pass
    would gather again from the shards. Does nothing to other models.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # no such model exists before its module is imported
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()  # type: ignore[operator]


@dataclass(frozen=True)
class Ranks:
    """Ranks that hold parts of a tensor.

    Args:
        sums: groups over which partial sums are added, one after another.
        copies: groups in which the sum of the first rank then replaces the others'. The ranks of such a group compute
            the same sum in different groups of ``sums``, possibly in another order, and rates must not differ by a
            rounding.
    """

    sums: tuple[ProcessGroup, ...]
    copies: tuple[ProcessGroup, ...] = ()

    def add_up_(self, values: Tensor) -> None:
        """Sums over the ranks in place. All ranks then hold the same bits. The host does not wait for a GPU.

        Args:
            values: float64, of the same shape on all ranks.
        """
        for group in self.sums:
            _on_device_of(group, values, lambda t, group=group: dist.all_reduce(t, group=group))
        for group in self.copies:
            _on_device_of(group, values, lambda t, group=group: dist.broadcast(t, group=group, group_src=0))


def _on_device_of(group: ProcessGroup, values: Tensor, collective: Any) -> None:
    """Runs a collective on values, copied to a device that the group serves if necessary.

    Under nccl, for example, parameters may be offloaded to the CPU.
    """
    device = device_served(group._device_types, values.device)
    moved = values.to(device)
    collective(moved)
    if moved is not values:
        values.copy_(moved)


def device_served(served: Sequence[torch.device], device: torch.device) -> torch.device:
    """Returns ``device`` if a group serves its type, else the current device of a type that it serves."""
    types = [d.type for d in served]
    if device.type in types or not types:
        return device
    return (
        torch.device(types[0])
        if types[0] == "cpu"
        else torch.device(types[0], torch.accelerator.current_device_index())
    )


def ranks_of(param: Tensor, process_group: ProcessGroup | None) -> Ranks | None:
    """Returns the ranks over which a parameter is sharded; None if this rank holds all of it.

    Args:
        param: a DTensor or any other tensor.
        process_group: ranks that hold parts of the tensors that are not DTensors.
    """
    if not is_dtensor(param):
        return None if process_group is None else Ranks((process_group,))
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None:
        return None  # this rank holds no part of it
    split = [dim for dim, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(dim) > 1]
    if not split:
        return None
    # The last sum gives the same bits to all ranks of its dimension; along the others, the first rank's are copied.
    others = [dim for dim in range(mesh.ndim) if dim != split[-1] and mesh.size(dim) > 1]
    return Ranks(tuple(map(mesh.get_group, split)), tuple(map(mesh.get_group, others)))


class RowSums:
    """Sums rows of a table over the ranks that hold parts of their tensors.

    Args:
        ranks: ranks of each row; None for a tensor that is not sharded.
        device: device of the tables.
    """

    def __init__(self, ranks: Sequence[Ranks | None], device: torch.device) -> None:
        rows: dict[Ranks, list[int]] = {}
        for row, key in enumerate(ranks):
            if key is not None:
                rows.setdefault(key, []).append(row)
        self._rows = [(key, torch.tensor(indices, device=device)) for key, indices in rows.items()]

    def __bool__(self) -> bool:
        return bool(self._rows)

    def __call__(self, table: Tensor) -> None:
        """Sums in place. ``table``: float64, (rows, anything). Other rows are unchanged."""
        for ranks, rows in self._rows:
            values = table.index_select(0, rows)
            ranks.add_up_(values)
            table.index_copy_(0, rows, values)


def any_rank(params: Iterable[Tensor], process_group: ProcessGroup | None, flag: bool) -> bool:
    """Returns whether ``flag`` is true on any rank that holds a part of these parameters."""
    count = torch.tensor(float(flag), dtype=torch.float64, device="cpu")
    for ranks in dict.fromkeys(ranks_of(p, process_group) for p in params):
        if ranks is not None:
            ranks.add_up_(count)
    return bool(count > 0)


def mean(value: float, process_group: ProcessGroup | None, device: torch.device) -> float:
    """Returns the mean over the ranks. NaN on one rank gives NaN on all, so that all take the same branch.

    Args:
        value: this rank's number.
        process_group: the ranks; None for the default group if ``torch.distributed`` is initialized.
        device: where a group without gloo exchanges the numbers.
    """
    if not (dist.is_available() and dist.is_initialized()) or (size := dist.get_world_size(process_group)) <= 1:
        return value
    if "gloo" in dist.get_backend(process_group):
        device = torch.device("cpu")
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=process_group)
    return total.item() / size
