"""Parameters that are sharded over ranks: a step sees this rank's part of each, inner products are of the whole.

DTensors (FSDP2, tensor parallelism) say themselves how they are sharded. Everything else that a framework splits does
not: then the optimizer's ``process_group=`` does. Replicated parameters (DDP) need nothing: equal gradients give equal
rates. Of what a step computes, only the inner products of TrainableLR and Hypergradient need other ranks: one
all-reduce of two float64 a tensor, once an interval.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .checks import describe, is_dtensor, sharding_problem
from .ranks import RowSums, local_part, ranks_of
from .state import State, state_dtype
from .view import ParamView

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def whole_products(views: Sequence[ParamView], products: Sequence[Sequence[float]]) -> list[list[float]]:
    """Inner products of whole tensors, from those of the parts that this rank holds.

    Args:
        views: the tensors, the same and in the same order on all ranks.
        products: of each, one or more numbers.
    """
    if all(view.ranks is None for view in views):
        return [list(p) for p in products]
    table = torch.tensor(products, dtype=torch.float64, device="cpu")
    RowSums([view.ranks for view in views], table.device)(table)
    return table.tolist()


# ---- DTensors as a step sees them ----


@dataclass(eq=False)
class Shard:
    """This rank's shard of a DTensor parameter.

    Args:
        param: the parameter, as its group holds it.
        state: ``optimizer.state[param]``; element-shaped entries are DTensors sharded like the parameter.
        view: of the step: its parameter shares memory with ``param``'s local tensor, its state with ``state``'s.
    """

    param: DTensor
    state: State
    view: ParamView
    _local: Tensor = field(repr=False)
    _known: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, view: ParamView) -> Shard:
        """From the view of a DTensor."""
        local = local_part(view.param)
        stand_in = local.detach()  # whose .grad is ours to set
        state = {name: local_part(value) for name, value in view.state.items()}
        own = replace(view, param=stand_in, state=state)
        return cls(view.param, view.state, own, local, list(state.values()))  # type: ignore[arg-type]

    def is_current(self) -> bool:
        """Whether the parameter's local tensor is still the same memory: FSDP may have set another."""
        return self.param._local_tensor is self._local and self._local.data_ptr() == self.view.param.data_ptr()

    def localize_gradient(self) -> bool:
        """Gives the view this rank's part of the gradient, sharded like the parameter, which may communicate.

        Returns:
            False if there is a gradient that cannot be brought.
        """
        own, grad = self.view.param, cast("Any", self.param.grad)
        if grad is None:
            own.grad = None
            return True
        if not is_dtensor(grad) or grad._spec is not self.param._spec:  # FSDP's gradients share the parameter's
            if sharding_problem(self.param, grad) is not None:
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
        return [*own, self.param] if self.view.applies else own

    def write_back(self) -> None:
        """Drops the gradient; state that the step has made or laid out anew becomes the parameter's."""
        self.view.param.grad = None
        values = self.view.state
        if len(values) != len(self._known) or not all(map(is_, values.values(), self._known)):
            for name, value in values.items():
                present = self.state.get(name)
                if present is None or (is_dtensor(present) and local_part(present) is not value):
                    self.state[name] = shard_like(self.param, value)
            self._known = list(values.values())


def shard_like(param: DTensor, local: Tensor) -> DTensor:
    """A DTensor of this rank's part, shaped and sharded like the parameter."""
    return type(param).from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def local_views(views: Sequence[ParamView], process_group: ProcessGroup | None) -> tuple[list[ParamView], list[Shard]]:
    """The views with plain tensors in place of DTensors, and the shards behind those."""
    own, shards = [], []
    for view in views:
        view.ranks = ranks_of(view.param, process_group)
        if is_dtensor(view.param):
            shards.append(Shard.of(view))
            view = shards[-1].view
        own.append(view)
    return own, shards


def shard_state(value: Tensor, param: Tensor, what: Callable[[], str]) -> Tensor:
    """A loaded state tensor of the parameter's shape, sharded like the parameter.

    Raises:
        ValueError: if it is sharded over other ranks, or the parameter is not sharded at all.
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
        raise ValueError(
            f"{what()} is sharded over another mesh than the parameter: load with set_optimizer_state_dict"
        )
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
