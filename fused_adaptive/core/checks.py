"""Checks of user input, made before anything is modified. Error messages name the culprit and the remedy."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import masters
from .plain import plain, plain_flag, plain_number
from .warning import warn

#: Hyperparameters that are numbers (some may be tensors), and hyperparameters that are flags.
NUMBERS = ("lr", "weight_decay", "eps", "momentum", "dampening", "momentum_decay")
FLAGS = (
    "nesterov",
    "maximize",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "decoupled_weight_decay",
    "amsgrad",
    "rectify",
)
_PLAIN = (int, float, Tensor)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_dtensor(value: Any) -> bool:
    """Returns whether ``value`` is a DTensor. Imports nothing: no DTensor exists before its module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_freed(tensor: Tensor) -> bool:
    """Returns whether a tensor has elements and no memory, as after ``untyped_storage().resize_(0)``."""
    return tensor.numel() > 0 and not is_wrapper(tensor) and tensor.data_ptr() == 0


def is_wrapper(tensor: Tensor) -> bool:
    """Returns whether a tensor consists of other tensors and has no memory of its own, by torch's protocol for them."""
    return hasattr(tensor, "__tensor_flatten__")


def tensors_of(params: Iterable[Any]) -> list[Tensor]:
    """Returns the tensors of an iterable of parameters or named parameters, or of a single tensor."""
    tensors = [params] if isinstance(params, Tensor) else [p[1] if isinstance(p, tuple) else p for p in params]
    return [p for p in tensors if isinstance(p, Tensor)]


def devices_of(groups: Iterable[Mapping[str, Any]]) -> set[torch.device]:
    """Returns the devices of the parameters of these groups."""
    return {p.device for group in groups for p in tensors_of(group["params"])}


def describe(index: int, param: Tensor, name: str | None = None) -> str:
    """Describes a parameter in error messages: position over all groups, name if it has one, shape."""
    return f"parameter {index}{f' ({name})' if name else ''} of shape {tuple(param.shape)}"


def check_hyperparameters(group: Mapping[str, Any], is_new: bool = False) -> dict[str, Any]:
    """Checks the hyperparameters of a group and converts them to plain numbers.

    Args:
        group: any of lr, betas, eps, weight_decay, momentum, dampening, momentum_decay, nesterov, master and
            flags.
        is_new: whether the group is not in use yet. Later lr may be negative: a schedule may overshoot 0 at its end,
            and torch takes that in a step.

    Returns:
        The entries that need a change: numbers of numpy and other libraries as ints and floats, pairs as tuples.
        Tensors stay tensors, except betas of one element, which torch converts to numbers too.

    Raises:
        ValueError: for a value outside of its range, NaN included.
        TypeError: for a value that is not a number, strings included.
    """
    checked = {name: plain_number(name, group[name]) for name in NUMBERS if name in group}
    checked |= {name: plain_flag(name, group[name]) for name in FLAGS if name in group}
    for name in ("lr", "weight_decay", "eps", "momentum", "momentum_decay"):
        if name in checked:
            check_nonnegative(name, abs(checked[name]) if name == "lr" and not is_new else checked[name])
    if "betas" in group:
        checked["betas"] = _pair("betas", group["betas"])
        for i, beta in enumerate(checked["betas"]):
            if not 0.0 <= float(beta) < 1.0:
                raise ValueError(f"betas[{i}] must be in [0, 1), got {beta}")
    if "momentum" in checked:
        if not math.isfinite(checked["dampening"]):
            raise ValueError(f"dampening must be finite, got {checked['dampening']}")
        if checked["nesterov"] and (checked["momentum"] <= 0 or checked["dampening"] != 0):
            raise ValueError(
                "nesterov=True needs momentum > 0 and dampening = 0, got "
                f"momentum={checked['momentum']}, dampening={checked['dampening']}"
            )
    checked |= {name: plain(group[name]) for name in ("master", "rounding_seed") if name in group}
    masters.check({**group, **checked})
    if checked.get("differentiable"):
        raise ValueError("differentiable=True is not supported: updates run in place without autograd; leave it False")
    return {name: value for name, value in checked.items() if value is not group[name]}


def make_numbers_plain(groups: Sequence[dict[str, Any]]) -> None:
    """Converts hyperparameters that were set by hand, as a constructor does: numbers of other classes, and pairs.

    Raises:
        TypeError, ValueError: for what :func:`check_hyperparameters` refuses. Nothing has changed then.
    """
    changes = [(group, check_hyperparameters(group)) for group in groups if not _has_plain_numbers(group)]
    for group, change in changes:
        group.update(change)


def _has_plain_numbers(group: Mapping[str, Any]) -> bool:
    betas = group.get("betas", ())
    numbers = [group[name] for name in NUMBERS if name in group]
    return isinstance(betas, (tuple, list)) and all(isinstance(n, _PLAIN) for n in (*numbers, *betas))


def check_names(groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Raises KeyError for a group that lacks one of the optimizer's options."""
    for index, group in enumerate(groups):
        if missing := sorted(defaults.keys() - group.keys()):
            raise KeyError(f"param group {index} has lost {missing[0]!r}: set it again")


def check_parameters(params: Sequence[Any], start: int) -> None:
    """Raises ValueError for a parameter that occurs twice in the list. ``start``: index of the first one."""
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
    """Calls :func:`check_gradient` for every parameter of the param groups, in order."""
    params = chain.from_iterable(g["params"] for g in groups)
    names = chain.from_iterable(g.get("param_names", [None] * len(g["params"])) for g in groups)
    for index, (p, name) in enumerate(zip(params, names, strict=True)):
        check_gradient(index, p, name)


def check_in_backward(optimizer: Any, policies: Iterable[Iterable[Any]]) -> None:
    """Raises ValueError if torch has built one optimizer per parameter and that would change the results.

    ``torch.distributed.optim._apply_optimizer_in_backward`` marks such parameters with ``_in_backward_optimizers``.

    Args:
        policies: policies of each group.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    owners = getattr(params[0], "_in_backward_optimizers", ()) if len(params) == 1 else ()
    if not any(owner is optimizer for owner in owners):
        return
    what = "_apply_optimizer_in_backward builds one optimizer a parameter, each of which sees one gradient"
    for policy in (policy for of_group in policies for policy in of_group):
        if policy.shares_gain:
            which = "naive=True" if policy.naive else "granularity='global'"
            raise ValueError(
                f"{what}: {type(policy).__name__}({which}) needs those of all tensors before any of them moves; use "
                "granularity='tensor', or ActiveLR"
            )
    if optimizer.max_grad_norm is not None or optimizer.skip_nonfinite:
        raise ValueError(f"{what}: max_grad_norm and skip_nonfinite need those of all tensors; leave them out")


def warn_of_parts(optimizer: Any, before: Sequence[Mapping[str, Any]], policies: Iterable[Iterable[Any]]) -> None:
    """Warns if steps take param groups in turn and that changes the results.

    DeepSpeed's ZeRO replaces ``param_groups`` by one group after the other and calls ``step()`` for each.

    Args:
        before: param groups of the last step.
        policies: policies of each group.
    """
    seen = {id(p) for group in before for p in group["params"]}
    if not seen or any(id(p) in seen for group in optimizer.param_groups for p in group["params"]):
        return
    spans = any(policy.shares_gain for of_group in policies for policy in of_group)
    if spans or optimizer.max_grad_norm is not None or optimizer.skip_nonfinite:
        warn(
            "this step has none of the parameters of the last one, as where DeepSpeed's ZeRO steps one group after "
            "the other: a gain of all tensors, max_grad_norm and skip_nonfinite are then of each group apart. Put all "
            "parameters into one group, or use granularity='tensor' and clip outside"
        )


def sharding_problem(param: Any, grad: Any) -> str | None:
    """Returns what is wrong with the sharding of a gradient, and the remedy; None if nothing is."""
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
    """Returns which tensor is unusable and why; None for a good gradient, for which no message is built."""
    if grad.layout != torch.strided:
        return "gradient", (
            f"is sparse ({grad.layout}): only dense gradients are supported; build the layer with sparse=False, or "
            "give the parameter to torch.optim.SparseAdam"
        )
    for what, dtype in (("gradient", grad.dtype), ("data", param.dtype)):
        if dtype not in FLOATS:
            remedy = "optimize torch.view_as_real(p)" if dtype.is_complex else "leave it out of the optimizer"
            return what, f"is {dtype}: only float64, float32, bfloat16 and float16 are supported; {remedy}"
    problem = sharding_problem(param, grad)
    if problem is not None:
        return "gradient", problem
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
    if type(grad) is Tensor and not grad.is_meta and not grad._is_zerotensor() and is_freed(grad):
        return "gradient", "has no memory, its storage has no bytes: zero_grad(), then backward again"
    if 0 in param.stride() and any(s == 0 and n > 1 for s, n in zip(param.stride(), param.shape, strict=True)):
        return "data", "has elements that share memory, as expand() makes them: clone() it"
    return None


def check_nonnegative(name: str, value: Any) -> None:
    """Raises ValueError for a number, or a tensor of one element, that is negative or not finite."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} as a tensor must have one element, got shape {tuple(value.shape)}")
    number = float(value)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    """Converts any sequence of two numbers, such as a list of a configuration library, an array or a tensor."""
    try:
        if isinstance(value, (str, bytes, Mapping, Set)):
            raise TypeError
        first, second = value
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair of numbers, got {value!r}") from None
    return _beta(f"{name}[0]", first), _beta(f"{name}[1]", second)


def _beta(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}")
        value = value.item()
    return plain_number(name, value)
