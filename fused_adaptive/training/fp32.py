"""Export and import of a model's float32 weights when its optimizer trains bfloat16 parameters with masters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..core.masters import join, split
from ..optimizers.base import AdaptiveOptimizer


def export_fp32(model: torch.nn.Module, optimizer: AdaptiveOptimizer) -> dict[str, Tensor]:
    """Returns the float32 weights of a model: for bfloat16 parameters with a master, the exact master.

    Args:
        model: the model whose ``named_parameters()`` are exported.
        optimizer: holds the 16-bit remainders of the parameters that it trains with ``master="split"``.

    Returns:
        A dict from name to a float32 copy on the parameter's device, sharded over ranks as the parameter is.
    """
    with_master, weights = _with_master(optimizer), {}
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        if id(param) in with_master and param.dtype == torch.bfloat16 and "master_low" in state:
            joined = join(_local(param.detach()), _local(state["master_low"]))
            weights[name] = torch.empty_like(param, dtype=torch.float32, requires_grad=False)
            _local(weights[name]).copy_(joined)
        else:
            weights[name] = param.detach().to(torch.float32, copy=True)
    return weights


@torch.no_grad()
def import_fp32(model: torch.nn.Module, optimizer: AdaptiveOptimizer, weights: Mapping[str, Tensor]) -> None:
    """Sets a model's parameters to float32 weights, without loss if the optimizer trains with ``master="split"``.

    May be called before the first step; it then creates the masters' state. Call ``optimizer.restart_interval()``
    afterwards if a policy compares intervals.

    Args:
        model: the model whose ``named_parameters()`` are set.
        optimizer: receives the 16-bit remainders of its parameters.
        weights: a dict as :func:`export_fp32` returns it, of any floating-point dtype and device.

    Raises:
        ValueError: for a missing or unknown name or a different shape. Nothing has changed then.
    """
    params = dict(model.named_parameters())
    if missing := params.keys() - weights.keys():
        raise ValueError(f"weights lack {', '.join(sorted(missing))}: they are of another model")
    if unknown := weights.keys() - params.keys():
        raise ValueError(f"the model has no parameter {', '.join(sorted(unknown))}: these weights are of another model")
    for name, param in params.items():
        if weights[name].shape != param.shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(param.shape)}")
    with_master = _with_master(optimizer)
    for name, param in params.items():
        if id(param) in with_master and param.dtype == torch.bfloat16:
            weight = torch.empty_like(param, dtype=torch.float32, requires_grad=False).copy_(weights[name])
            state = optimizer.state[param]
            if "master_low" not in state:
                state["master_low"] = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
            high, low = split(_local(weight))
            _local(param).copy_(high)
            _local(state["master_low"]).copy_(low)
        else:
            param.copy_(weights[name])


def _with_master(optimizer: AdaptiveOptimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups if group["master"] == "split" for p in group["params"]}


def _local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, and any other tensor itself."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
