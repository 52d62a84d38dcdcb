"""Export and import of a model's float32 weights when its optimizer trains bfloat16 parameters with masters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.checks import is_dtensor
from ..core.masters import join, split
from ..core.ranks import local_part, reshard
from ..core.shards import shard_state
from ..engine.handles import driven
from ..optimizers.base import AdaptiveOptimizer


def export_fp32(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Returns the float32 weights of a model: for bfloat16 parameters with a master, the exact master.

    Args:
        model: the model whose ``named_parameters()`` are exported.
        optimizer: holds the 16-bit remainders of the parameters that it trains with ``master="split"``. One of another
            package has none, so with it bfloat16 parameters are converted as they are.

    Returns:
        A dict from name to a float32 copy on the parameter's device, sharded over ranks as the parameter is. Parameters
        that are not of a floating-point dtype, complex and integer ones, are copied in their own.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer.
    """
    optimizer = driven(optimizer)
    reshard(model)
    with_master, weights = _with_master(optimizer), {}
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        if id(param) in with_master and param.dtype == torch.bfloat16 and "master_low" in state:
            joined = join(local_part(param.detach()), local_part(state["master_low"]))
            weights[name] = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
            local_part(weights[name]).copy_(joined)
        else:
            weights[name] = param.detach().to(torch.float32 if param.is_floating_point() else param.dtype, copy=True)
    return weights


@torch.no_grad()
def import_fp32(model: torch.nn.Module, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Sets a model's parameters to float32 weights, without loss if the optimizer trains with ``master="split"``.

    May be called before the first step; it then creates the masters' state. Call ``optimizer.restart_interval()``
    afterwards if a policy compares intervals.

    Args:
        model: the model whose ``named_parameters()`` are set.
        optimizer: receives the 16-bit remainders of its parameters. One of another package receives none.
        weights: a dict as :func:`export_fp32` returns it, of any device, and of any floating-point dtype where the
            parameter's is one. Of a whole tensor for a sharded parameter each rank keeps its part.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer, or a weight not a tensor. Nothing has changed then.
        ValueError: for a missing or unknown name, a different shape or another mesh, and for a weight that is on the
            meta device, sparse, or of another kind than the parameter: real, complex or integer. Nothing has changed
            then.
    """
    optimizer = driven(optimizer)
    reshard(model)
    params = dict(model.named_parameters())
    if missing := params.keys() - weights.keys():
        raise ValueError(f"weights lack {', '.join(sorted(missing))}: they are of another model")
    if unknown := weights.keys() - params.keys():
        raise ValueError(f"the model has no parameter {', '.join(sorted(unknown))}: these weights are of another model")
    for name, param in params.items():
        weight: Any = weights[name]
        _check_has_values(name, weight)
        if _kind(weight) != _kind(param):
            raise ValueError(
                f"{name} is {_kind(weight)} in weights ({weight.dtype}) and {_kind(param)} in the model "
                f"({param.dtype}): they are of another model; or convert it, if that is meant"
            )
        if weight.shape != param.shape:
            raise ValueError(f"{name} has shape {tuple(weight.shape)} instead of {tuple(param.shape)}")
        if is_dtensor(weight) and getattr(param, "device_mesh", None) != weight.device_mesh:
            raise ValueError(f"{name} is sharded over another mesh than the parameter: pass its full_tensor()")
    with_master = _with_master(optimizer)
    for name, param in params.items():
        sharded = shard_state(weights[name], param, lambda name=name: name)
        if id(param) in with_master and param.dtype == torch.bfloat16:
            weight = torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(sharded)
            state = optimizer.state[param]
            if "master_low" not in state:
                state["master_low"] = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
            high, low = split(local_part(weight))
            local_part(param).copy_(high)
            local_part(state["master_low"]).copy_(low)
        else:
            param.copy_(sharded)


def _check_has_values(name: str, weight: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} is a {type(weight).__name__} in weights: pass a tensor, as torch.from_numpy makes it")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device in weights and has no values: load it to the CPU")
    if weight.layout is not torch.strided:
        raise ValueError(f"{name} is {weight.layout} in weights: pass its to_dense()")


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    return "real" if tensor.is_floating_point() else "integer"


def _with_master(optimizer: Optimizer) -> set[int]:
    if not isinstance(optimizer, AdaptiveOptimizer):
        return set()
    return {id(p) for group in optimizer.param_groups if group["master"] == "split" for p in group["params"]}
