"""Sharded parameters: a step works on this rank's shard of each; inner products are those of the whole tensors.

A DTensor (FSDP2, tensor parallelism) contains the description of its sharding. For any other tensor that a framework
shards, the optimizer's ``process_group=`` describes it. Replicated parameters (DDP) need nothing: equal gradients give
equal rates. A step communicates only for the inner products of TrainableLR and Hypergradient: one all-reduce of at most
two float64 per tensor, at each end of an interval (TrainableLR) or in each step (Hypergradient).
"""

from __future__ import annotations

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
    """Returns the inner products of whole tensors, from those of this rank's parts.

    Args:
        views: the tensors, the same and in the same order on all ranks.
        products: one or more numbers per tensor.
    """
    if all(view.ranks is None for view in views):
        return [list(p) for p in products]
    table = torch.tensor(products, dtype=torch.float64, device="cpu")
    RowSums([view.ranks for view in views], table.device)(table)
    return table.tolist()


# ---- DTensors ----


@dataclass(eq=False)
class Shard:
    """This rank's shard of a DTensor parameter.

    Args:
        param: the parameter, as in its param group.
        state: ``optimizer.state[param]``; element-shaped entries are DTensors sharded like the parameter.
        view: view of the shard in a step. Its parameter shares memory with the local tensor of ``param``, its state
            with that of ``state``.
    """

    param: DTensor
    state: State
    view: ParamView
    _local: Tensor = field(repr=False)
    _known: list[Tensor] = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, view: ParamView) -> Shard:
        """Creates the shard of the view of a DTensor."""
        local = local_part(view.param)
        alias = local.detach()  # so that its .grad can be set
        state = {name: local_part(value) for name, value in view.state.items()}
        shard_view = replace(view, param=alias, state=state)
        return cls(view.param, view.state, shard_view, local, list(state.values()))  # type: ignore[arg-type]

    def is_current(self) -> bool:
        """Returns whether the parameter's local tensor is still the same memory. FSDP may replace it."""
        return self.param._local_tensor is self._local and self._local.data_ptr() == self.view.param.data_ptr()

    def localize_gradient(self) -> bool:
        """Sets the view's gradient to this rank's part, sharded like the parameter. May communicate.

        Returns:
            False if there is a gradient that cannot be used.
        """
        local_param, grad = self.view.param, cast("Any", self.param.grad)
        if grad is None:
            local_param.grad = None
            return True
        if not is_dtensor(grad) or grad._spec is not self.param._spec:  # one object under FSDP
            if sharding_problem(self.param, grad) is not None:
                return False
            if grad.placements != self.param.placements:  # such as Partial, under tensor parallelism
                grad = grad.redistribute(placements=self.param.placements)
        local = local_part(grad)
        if local.dtype != local_param.dtype:
            local_param.grad_dtype = local.dtype
        local_param.grad = local
        return True

    def written(self) -> list[Tensor]:
        """Returns the DTensors whose local tensors a step writes: autograd counts their versions separately."""
        dtensors: list[Tensor] = [value for value in self.state.values() if is_dtensor(value)]
        return [*dtensors, self.param] if self.view.applies else dtensors

    def write_back(self) -> None:
        """Drops the gradient, and stores state that the step has created or replaced in ``state``."""
        self.view.param.grad = None
        values = self.view.state
        if len(values) != len(self._known) or not all(map(is_, values.values(), self._known)):
            for name, value in values.items():
                present = self.state.get(name)
                if present is None or (is_dtensor(present) and local_part(present) is not value):
                    self.state[name] = shard_like(self.param, value)
            self._known = list(values.values())


def shard_like(param: DTensor, local: Tensor) -> DTensor:
    """Returns a DTensor of this rank's part, shaped and sharded like the parameter."""
    return type(param).from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def local_views(views: Sequence[ParamView], process_group: ProcessGroup | None) -> tuple[list[ParamView], list[Shard]]:
    """Returns the views with plain tensors in place of DTensors, and the shards of the DTensors."""
    plain_views, shards = [], []
    for view in views:
        view.ranks = ranks_of(view.param, process_group)
        if is_dtensor(view.param):
            shards.append(Shard.of(view))
            view = shards[-1].view
        plain_views.append(view)
    return plain_views, shards


def shard_state(value: Tensor, param: Tensor, what: Callable[[], str]) -> Tensor:
    """Shards a loaded state tensor of the parameter's shape like the parameter.

    Raises:
        ValueError: if it is sharded over another mesh, or the parameter is not sharded at all.
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

        # Every rank has the whole tensor and keeps its part, without communication.
        return distribute_tensor(value, mesh, placements, src_data_rank=None)
    if value.device_mesh != mesh:  # type: ignore[attr-defined]
        raise ValueError(
            f"{what()} is sharded over another mesh than the parameter: load with set_optimizer_state_dict"
        )
    return value if value.placements == placements else value.redistribute(placements=placements)  # type: ignore[attr-defined]


def floats_of_flat(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Converts signs and remainders to floats if FullyShardedDataParallel has flattened their parameter.

    FullyShardedDataParallel flattens only state of one floating-point dtype. Signs and remainders are exact in float32,
    and loading converts them back.
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


# ---- unsupported sharding ----


def check_split(groups: Sequence[dict[str, Any]], policies: Sequence[Sequence[Any]], process_group: Any) -> None:
    """Raises RuntimeError if inner products would be of parts: for FSDP1's flat parameters without a process group."""
    index = 0
    for group, of_group in zip(groups, policies, strict=True):
        scalar = [p for p in of_group if hasattr(p, "granularity")]
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
