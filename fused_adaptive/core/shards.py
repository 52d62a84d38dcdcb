"""Parameters that are spread over ranks: a step sees this rank's part of each, inner products are of the whole.

DTensors (FSDP2, tensor parallelism) say themselves how they are spread. Everything else that a framework splits does
not: then the optimizer's ``process_group=`` does. Replicated parameters (DDP) need nothing: equal gradients give equal
rates. Of what a step computes, only the inner products of TrainableLR and Hypergradient need other ranks: one
all-reduce of two float64 a tensor, once an interval.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import describe, is_dtensor, spread_problem
from .state import State, state_dtype
from .view import Slot

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def local_part(value: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its local tensor itself, not a view; else the tensor."""
    if not is_dtensor(value):
        return value
    local = value._local_tensor  # type: ignore[attr-defined]  # to_local() gives views, whose identity tells nothing
    return local.wait() if hasattr(local, "wait") else local  # an asynchronous collective may still be under way


# ---- over which ranks a tensor is spread ----


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
    """Over which ranks a parameter is spread; None if this rank holds all of it.

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


def whole_products(slots: Sequence[Slot], products: Sequence[Sequence[float]]) -> list[list[float]]:
    """Inner products of whole tensors, from those of the parts that this rank holds.

    Args:
        slots: the tensors, the same and in the same order on all ranks.
        products: of each, one or more numbers.
    """
    if all(slot.ranks is None for slot in slots):
        return [list(p) for p in products]
    table = torch.tensor(products, dtype=torch.float64, device="cpu")
    RowSums([slot.ranks for slot in slots], table.device)(table)
    return table.tolist()


def any_rank(params: Iterable[Tensor], process_group: ProcessGroup | None, flag: bool) -> bool:
    """Whether ``flag`` is true on any rank that holds a part of these parameters."""
    count = torch.tensor(float(flag), dtype=torch.float64, device="cpu")
    for ranks in dict.fromkeys(ranks_of(p, process_group) for p in params):
        if ranks is not None:
            ranks.add_up_(count)
    return bool(count > 0)


# ---- DTensors as a step sees them ----


@dataclass(eq=False)
class Part:
    """This rank's part of a DTensor parameter.

    Args:
        param: the parameter, as its group holds it.
        state: ``optimizer.state[param]``; element-shaped entries are DTensors spread like the parameter.
        slot: of the step: its parameter shares memory with ``param``'s local tensor, its state with ``state``'s.
    """

    param: DTensor
    state: State
    slot: Slot
    _local: Tensor = field(repr=False)
    _known: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, slot: Slot) -> Part:
        """From the slot of a DTensor."""
        local = local_part(slot.param)
        stand_in = local.detach()  # whose .grad is ours to set
        state = {name: local_part(value) for name, value in slot.state.items()}
        own = replace(slot, param=stand_in, state=state)
        return cls(slot.param, slot.state, own, local, list(state.values()))  # type: ignore[arg-type]

    def holds(self) -> bool:
        """Whether the parameter's local tensor is still the same memory: FSDP may have set another."""
        return self.param._local_tensor is self._local and self._local.data_ptr() == self.slot.param.data_ptr()

    def bring_gradient(self) -> bool:
        """Gives the slot this rank's part of the gradient, spread like the parameter, which may communicate.

        Returns:
            False if there is a gradient that cannot be brought.
        """
        own, grad = self.slot.param, cast("Any", self.param.grad)
        if grad is None:
            own.grad = None
            return True
        if not is_dtensor(grad) or grad._spec is not self.param._spec:  # FSDP's gradients share the parameter's
            if spread_problem(self.param, grad) is not None:
                return False
            if grad.placements != self.param.placements:  # Partial, under tensor parallelism
                grad = grad.redistribute(placements=self.param.placements)
        local = local_part(grad)
        if local.dtype != own.dtype:
            own.grad_dtype = local.dtype
        own.grad = local
        return True

    def written(self) -> list[Tensor]:
        """The DTensors whose local tensors a step has written: versions of their own tell autograd."""
        own: list[Tensor] = [value for value in self.state.values() if is_dtensor(value)]
        return [*own, self.param] if self.slot.applies else own

    def take_back(self) -> None:
        """Drops the gradient; state that the step has made or laid out anew becomes the parameter's."""
        self.slot.param.grad = None
        values = self.slot.state
        if len(values) != len(self._known) or not all(map(is_, values.values(), self._known)):
            for name, value in values.items():
                present = self.state.get(name)
                if present is None or (is_dtensor(present) and local_part(present) is not value):
                    self.state[name] = spread_like(self.param, value)
            self._known = list(values.values())


def spread_like(param: DTensor, local: Tensor) -> DTensor:
    """A DTensor of this rank's part, shaped and spread like the parameter."""
    return type(param).from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def split_slots(slots: Sequence[Slot], process_group: ProcessGroup | None) -> tuple[list[Slot], list[Part]]:
    """The slots with plain tensors in place of DTensors, and the parts behind those."""
    own, parts = [], []
    for slot in slots:
        slot.ranks = ranks_of(slot.param, process_group)
        if is_dtensor(slot.param):
            parts.append(Part.of(slot))
            slot = parts[-1].slot
        own.append(slot)
    return own, parts


def conform(value: Tensor, param: Tensor, what: Callable[[], str]) -> Tensor:
    """A loaded state tensor of the parameter's shape, spread like the parameter.

    Raises:
        ValueError: if it is spread over other ranks, or the parameter is not spread at all.
    """
    if not is_dtensor(param):
        if is_dtensor(value):
            raise ValueError(
                f"{what()} is a DTensor and the parameter is not: save with full_state_dict=True "
                "(torch.distributed.checkpoint.state_dict.StateDictOptions), or load with set_optimizer_state_dict"
            )
        return value
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole and keeps its part.
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    if value.device_mesh != mesh:  # type: ignore[attr-defined]
        raise ValueError(f"{what()} is spread over another mesh than the parameter: load with set_optimizer_state_dict")
    return value if value.placements == placements else value.redistribute(placements=placements)  # type: ignore[attr-defined]


def floats_of_flat(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A state_dict whose signs and remainders are floats where FullyShardedDataParallel has flattened the parameter.

    It flattens state of one floating-point dtype alone. Both are exact in float32, and loading brings them back.
    """
    params = [p for group in groups for p in group["params"]]
    flat = {i: state_dtype(p) for i, p in enumerate(params) if getattr(p, "_fsdp_flattened", False)}
    if not flat:
        return state_dict

    def as_float(key: Any, value: Any) -> Any:
        is_integer = isinstance(value, Tensor) and value.dim() > 0 and not value.is_floating_point()
        return value.to(flat[key]) if is_integer and key in flat else value

    state = {
        key: {name: as_float(key, value) for name, value in values.items()} if key in flat else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


# ---- what cannot be right ----


def check_split(groups: Sequence[dict[str, Any]], policies: Sequence[Sequence[Any]], process_group: Any) -> None:
    """Raises RuntimeError where inner products would be of parts: FSDP1's flat parameters without a process group."""
    index = 0
    for group, own in zip(groups, policies, strict=True):
        scalar = [p for p in own if hasattr(p, "granularity")]
        for p in group["params"]:
            if scalar and getattr(p, "_fsdp_flattened", False):
                _check_flat(index, p, type(scalar[0]).__name__, process_group)
            index += 1


def _check_flat(index: int, param: Tensor, policy: str, process_group: Any) -> None:
    what = f"{describe(index, param)} was split by FullyShardedDataParallel"
    if not getattr(param, "_is_flat_param", False):
        raise RuntimeError(
            f"{what} with use_orig_params=True, where ranks without a part have no gradient: {policy} cannot sum over "
            "them; use torch.distributed.fsdp.fully_shard, or use_orig_params=False with process_group="
        )
    if process_group is None:
        raise RuntimeError(
            f"{what}: {policy} needs inner products of the whole; pass the optimizer process_group= (the group over "
            "which it is sharded), or use torch.distributed.fsdp.fully_shard"
        )


def check_not_partitioned(policies: Sequence[Any]) -> None:
    """Raises ValueError for a global scalar policy in an optimizer that ZeroRedundancyOptimizer is building.

    Each rank's would know a part of the tensors alone. It builds its optimizers itself and tells them nothing, so the
    calling frames are asked.
    """
    if "torch.distributed.optim.zero_redundancy_optimizer" not in sys.modules:
        return
    is_global = [p for p in policies if getattr(p, "granularity", None) == "global"]
    frame = sys._getframe(1) if is_global else None
    while frame is not None:
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                f"{type(is_global[0]).__name__}(granularity='global') cannot be right under ZeroRedundancyOptimizer, "
                "where each rank's optimizer knows its own tensors only: use granularity='tensor', ActiveLR, or "
                "torch.distributed.fsdp.fully_shard"
            )
        frame = frame.f_back
