"""Loads a ``state_dict``: checks it as a whole before the optimizer changes, and keeps the dtypes of the state.

``torch.optim.Optimizer.load_state_dict`` casts floating-point state to the parameter's dtype, which would round the
float32 state of bf16 parameters and turn int8 signs into floats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..core import masters
from ..core.backbone import Backbone
from ..core.checks import check_hyperparameters, describe
from ..core.plain import plain
from ..core.shards import shard_state
from ..core.state import State, StateSpec
from ..policies import from_plain, parse, resolve
from . import reference_rates

Groups = list[dict[str, Any]]
_OF_PARAMS = ("params", "param_names")


def specs(backbone: Backbone, group: Mapping[str, Any], dtype: torch.dtype) -> dict[str, StateSpec]:
    """Returns the declarations of all state of a parameter of this group and dtype."""
    spec = backbone.state_spec(group) | masters.state_spec(group, dtype)
    for policy in from_plain(group["policy"]):
        spec = spec | policy.state_spec(backbone, group)
    return spec


def restore(
    backbone: Backbone,
    groups: Groups,
    state_dict: Mapping[str, Any],
    defaults: Mapping[str, Any],
    own_flags: Sequence[str] = (),
) -> tuple[dict[Any, Any], Groups]:
    """Returns the state and the param groups that ``state_dict`` describes. Changes nothing.

    Args:
        backbone: backbone of the optimizer that loads.
        groups: param groups of this optimizer.
        state_dict: of an optimizer of this package, or of its ``torch.optim`` namesake; then policy state starts anew.
        defaults: options of this optimizer. A group keeps those that ``state_dict`` lacks, and nothing else: not what a
            scheduler has written there.
        own_flags: hyperparameters that are not taken from a checkpoint of ``torch.optim``.

    Raises:
        ValueError: if groups do not match, or a state entry is missing or of the wrong shape.
    """
    saved_groups: Groups = state_dict["param_groups"]
    _check_sizes(groups, saved_groups)
    merged = [
        _merge(backbone, {n: v for n, v in ours.items() if n in defaults or n in _OF_PARAMS}, saved, i, own_flags)
        for i, (ours, saved) in enumerate(zip(groups, saved_groups, strict=True))
    ]
    ids = list(chain.from_iterable(group["params"] for group in saved_groups))
    names = list(chain.from_iterable(g.get("param_names", [None] * len(g["params"])) for g in merged))
    owners = [
        (param, group, "policy" in saved)
        for group, saved in zip(merged, saved_groups, strict=True)
        for param in group["params"]
    ]
    index_of = {key: index for index, key in enumerate(ids)}
    state: dict[Any, Any] = defaultdict(dict)
    for key, values in state_dict["state"].items():
        if key not in index_of:
            state[key] = values  # not a parameter's state: kept unchanged, as torch does
        elif values:
            index = index_of[key]
            param, group, is_ours = owners[index]
            which = describe(index, param, names[index])
            state[param] = _restore_one(backbone, group, param, values, which, is_ours)
    return state, merged


def _check_sizes(groups: Groups, saved: Groups) -> None:
    if len(groups) != len(saved):
        raise ValueError(f"loaded state dict has {len(saved)} parameter groups, the optimizer has {len(groups)}")
    for i, (ours, theirs) in enumerate(zip(groups, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                f"loaded state dict has {len(theirs['params'])} parameters in group {i}, "
                f"the optimizer has {len(ours['params'])}: build the optimizer from the same model"
            )


def _merge(
    backbone: Backbone, ours: Mapping[str, Any], saved: Mapping[str, Any], index: int, own_flags: Sequence[str]
) -> dict[str, Any]:
    """Returns our hyperparameters, overridden by the saved ones."""
    kept = {"params", *(own_flags if "policy" not in saved else ())}
    merged = {**ours, **deepcopy({k: v for k, v in saved.items() if k not in kept})}
    if merged.get("differentiable"):
        raise ValueError(f"group {index} of the loaded state dict has differentiable=True, which is not supported")
    try:
        merged |= check_hyperparameters(merged)
    except (TypeError, ValueError) as error:
        raise ValueError(f"group {index} of the loaded state dict is not usable: {error}") from error
    try:
        merged["policy"] = resolve(parse(merged["policy"]), backbone, [merged])
    except (TypeError, ValueError) as error:
        raise ValueError(f"the policy in group {index} of the loaded state dict is not usable: {error}") from error
    reference_rates.meet(merged)
    return merged


def _restore_one(
    backbone: Backbone,
    group: Mapping[str, Any],
    param: Tensor,
    values: Mapping[str, Any],
    which: str,
    is_ours: bool,
) -> State:
    expected = specs(backbone, group, param.dtype) if is_ours else backbone.state_spec(group)
    is_begun = not values.keys() <= masters.NAMES  # before the first step fa.import_fp32 creates these alone
    for name, spec in expected.items():
        if is_begun and name not in values and not spec.optional:
            raise ValueError(
                f"the loaded state of {which} lacks {name!r}: it was saved by another optimizer or policy than "
                f"{backbone.name} with {group['policy']}"
            )
    restored = {}
    for name, value in values.items():
        if name in expected:
            if value is None:
                continue  # torch's SGD stores None before its first step
            # A tensor that needs no conversion is not copied, as in torch.
            what = partial(_describe_loaded, name, which)
            restored[name] = convert_state(expected[name], value, param, group, what)
        elif isinstance(value, Tensor):
            restored[name] = value.to(param.device)
        else:
            restored[name] = deepcopy(value)
    match_counts(restored)
    return restored


def _describe_loaded(name: str, which: str) -> str:
    return f"the loaded state {name!r} of {which}"


def match_counts(state: State) -> None:
    """Gives ``step`` and NAdam's ``mu_product`` one dtype, which kernels rely on. torch's loader casts only one."""
    step, product = state.get("step"), state.get("mu_product")
    if isinstance(step, Tensor) and isinstance(product, Tensor) and step.dtype != product.dtype:
        dtype = torch.promote_types(step.dtype, product.dtype)
        state["step"], state["mu_product"] = step.to(dtype), product.to(dtype)


def convert_state(
    spec: StateSpec, value: Any, param: Tensor, group: Mapping[str, Any], what: Callable[[], str]
) -> Tensor:
    """Converts a state entry to its declared dtype, device and shape. Returns ``value`` itself if nothing differs.

    Other code may have changed it: torch's own ``load_state_dict`` casts to the parameter's dtype, users reset moments
    with ``zeros_like(p)``, old checkpoints count steps in Python.

    Args:
        spec: declaration of the entry.
        value: present value of the entry.
        param: its parameter; the state of a DTensor becomes a DTensor.
        group: param group of the parameter.
        what: returns the name of the entry in error messages.

    Raises:
        ValueError: for a value that is not a number, or of another shape.
    """
    if not isinstance(value, Tensor):
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{what()} is no tensor but {value!r}: the checkpoint is damaged")
        value = torch.as_tensor(value)
    if value.layout != torch.strided:
        raise ValueError(f"{what()} is sparse ({value.layout}): state is dense, use to_dense()")
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{what()} is on the meta device and has no values: bring it back before the step")
    if spec.scalar and value.numel() == 1:
        # ``step`` keeps its dtype, as in torch, if that can count far enough; all other entries get the declared one.
        is_step = (
            spec.host and value.dtype in (torch.float32, torch.float64) and spec.dtype_for(param).is_floating_point
        )
        value = value.clone() if _is_fixed(value) else value
        value = value if value.dim() == 0 else value.reshape(())
        return value.to(spec.device_for(param, group), value.dtype if is_step else spec.dtype_for(param))
    if spec.scalar or value.shape != param.shape:
        shape = () if spec.scalar else tuple(param.shape)
        raise ValueError(
            f"{what()} has shape {tuple(value.shape)} instead of {shape}: it belongs to another model or another "
            "order of parameters; or the parameter has another shape now: change all of its state alike, or delete it"
        )
    value = shard_state(value, param, what).to(param.device, spec.dtype_for(param))
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value) if _is_fixed(value) else value


def _is_fixed(value: Tensor) -> bool:
    """Checks whether torch refuses to write to a tensor: one that ``expand`` made, or that of ``inference_mode``."""
    is_expanded = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    return is_expanded or (value.is_inference() and not torch.is_inference_mode_enabled())
