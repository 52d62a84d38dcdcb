"""Bad input, refused before anything is modified. Messages name the culprit and the remedy."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import masters

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor. Imports nothing: without the module there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def describe(index: int, param: Tensor, name: str | None = None) -> str:
    """How messages call a parameter: its position over all groups, its name where there is one, its shape."""
    return f"parameter {index}{f' ({name})' if name else ''} of shape {tuple(param.shape)}"


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Raises ValueError for a value outside of its range, NaN included; TypeError for what is no number.

    Checks those of lr, betas, eps, weight_decay, momentum, dampening, nesterov, master that the group has.
    """
    _check_nonnegative("lr", group["lr"])
    _check_nonnegative("weight_decay", group["weight_decay"])
    if "eps" in group:
        _check_nonnegative("eps", group["eps"])
    if "betas" in group:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            if not 0.0 <= _number(f"betas[{i}]", beta) < 1.0:
                raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
    if "momentum" in group:
        _check_nonnegative("momentum", group["momentum"])
        if not math.isfinite(_number("dampening", group["dampening"])):
            raise ValueError(f"dampening must be finite, got {group['dampening']}")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening = 0, got "
                f"momentum={group['momentum']}, dampening={group['dampening']}"
            )
    masters.check(group)
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not supported: updates run in place without autograd; leave it False")


def check_parameters(params: Sequence[Any], start: int) -> None:
    """Raises ValueError for a parameter that stands twice in the list. ``start``: the first one's index."""
    seen: dict[int, int] = {}
    for index, param in enumerate(params, start):
        tensor = param[1] if isinstance(param, tuple) else param
        if isinstance(tensor, Tensor) and seen.setdefault(id(tensor), index) != index:
            raise ValueError(
                f"{describe(index, tensor)} is the same tensor as parameter {seen[id(tensor)]}: pass each of them once"
            )


def check_gradient(index: int, param: Tensor, name: str | None = None) -> None:
    """Raises RuntimeError for a gradient that is sparse, not floating-point, or of another shape or device."""
    problem = None if param.grad is None else _problem(param, param.grad)
    if problem is not None:
        what, complaint = problem
        raise RuntimeError(f"the {what} of {describe(index, param, name)} {complaint}")


def check_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """:func:`check_gradient` for every parameter of these param groups, in their order."""
    params = chain.from_iterable(g["params"] for g in groups)
    names = chain.from_iterable(g.get("param_names", [None] * len(g["params"])) for g in groups)
    for index, (p, name) in enumerate(zip(params, names, strict=True)):
        check_gradient(index, p, name)


def spread_problem(param: Any, grad: Any) -> str | None:
    """What is wrong with how a gradient is spread, and what to do."""
    if not (is_dtensor(param) or is_dtensor(grad)):
        return None
    if not is_dtensor(grad):
        return "is a plain tensor and the parameter a DTensor: assign a DTensor (distribute_tensor), or backward again"
    if not is_dtensor(param):
        return "is a DTensor and the parameter is not: assign its full_tensor(), or backward again"
    if grad.device_mesh != param.device_mesh:
        return f"is on {grad.device_mesh} and the parameter on {param.device_mesh}: backward again"
    return None


def _problem(param: Tensor, grad: Tensor) -> tuple[str, str] | None:
    """What is wrong, and how; None for a good gradient, so that no message is built for it."""
    if grad.layout != torch.strided:
        return "gradient", (
            f"is sparse ({grad.layout}): only dense gradients are supported; build the layer with sparse=False, or "
            "give the parameter to torch.optim.SparseAdam"
        )
    for what, dtype in (("gradient", grad.dtype), ("data", param.dtype)):
        if dtype not in FLOATS:
            remedy = "optimize torch.view_as_real(p)" if dtype.is_complex else "leave it out of the optimizer"
            return what, f"is {dtype}: only float64, float32, bfloat16 and float16 are supported; {remedy}"
    spread = spread_problem(param, grad)
    if spread is not None:
        return "gradient", spread
    if grad.shape != param.shape:
        return "gradient", (
            f"has shape {tuple(grad.shape)}: was the parameter's data replaced after backward? zero_grad(), then "
            "backward again"
        )
    if grad.device != param.device:
        return "gradient", (
            f"is on {grad.device} and the parameter on {param.device}: move the model before the forward pass, then "
            "backward again"
        )
    return None


def _check_nonnegative(name: str, value: Any) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} as a tensor must have one element, got shape {tuple(value.shape)}")
    number = _number(name, value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
