"""Statistics of the local learning rates ``lr·γ``, for people to read: computed on the device, and read all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.ranks import local_part
from ..core.state import State
from ..core.view import ParamView
from ..policies import Policy, from_plain

KEYS = ("min", "mean", "max")


def learning_rates(
    groups: Sequence[dict[str, Any]], states: Any, members: Mapping[Policy, Sequence[ParamView]], per_tensor: bool
) -> list[dict[str, Any]]:
    """What ``AdaptiveOptimizer.learning_rates`` returns. ``members``: of each policy, what has state."""
    gains, lrs = [], []
    for group in groups:
        policies, lr = from_plain(group["policy"]), group["lr"]
        lrs.append(lr.detach().double().reshape(()).expand(3) if isinstance(lr, Tensor) else None)
        for p in group["params"]:
            gains.append([_gain_statistics(policy, states.get(p, {}), members.get(policy, [])) for policy in policies])
    wanted = [t for t in lrs + [t for of_param in gains for t in of_param] if t is not None]
    read = dict(zip(map(id, wanted), to_host(wanted), strict=True))
    result, remaining = [], iter(gains)
    for group, lr in zip(groups, lrs, strict=True):
        lr = float(group["lr"]) if lr is None else read[id(lr)][0]
        names = group.get("param_names", [None] * len(group["params"]))
        tensors, weights = [], []
        for name, p in zip(names, group["params"], strict=True):
            rate = dict.fromkeys(KEYS, lr)
            for statistics in next(remaining):
                if statistics is not None:
                    rate = {key: rate[key] * gain for key, gain in zip(KEYS, read[id(statistics)], strict=True)}
            tensors.append({"name": name, "numel": p.numel()} | rate)
            weights.append(local_part(p).numel())
        result.append({**_summary(tensors, weights, lr), **({"tensors": tensors} if per_tensor else {})})
    return result


def to_host(values: Sequence[Tensor]) -> list[list[float]]:
    """The numbers in small float64 tensors of equal size: one transfer a device."""
    by_device: dict[torch.device, list[int]] = {}
    for i, value in enumerate(values):
        by_device.setdefault(value.device, []).append(i)
    read: list[list[float]] = [[]] * len(values)
    for positions in by_device.values():
        for i, numbers in zip(positions, torch.stack([values[i] for i in positions]).tolist(), strict=True):
            read[i] = numbers
    return read


def _gain_statistics(policy: Policy, state: State, peers: Sequence[ParamView]) -> Tensor | None:
    """Minimum, mean and maximum of a tensor's gain, on its device; None where it is 1 or there is none."""
    name = "element_gain" if policy.elementwise else "gain"
    if name not in state:
        if "gain" not in policy.shared_names() or not peers:
            return None
        state = peers[0].state  # a tensor that has not moved yet shares a global gain all the same
    gain = local_part(state[name])
    if not gain.numel():
        return None
    return torch.stack([gain.min().double(), gain.mean(dtype=torch.float64), gain.max().double()])


def _summary(tensors: list[dict[str, Any]], weights: list[int], lr: float) -> dict[str, float]:
    """Over the elements that this rank holds: ``weights`` of each tensor."""
    filled = [(t, weight) for t, weight in zip(tensors, weights, strict=True) if weight]
    if not filled:
        return dict.fromkeys(KEYS, lr)
    total = sum(weight for _, weight in filled)
    return {
        "min": min(t["min"] for t, _ in filled),
        "mean": sum(t["mean"] * weight for t, weight in filled) / total,
        "max": max(t["max"] for t, _ in filled),
    }
