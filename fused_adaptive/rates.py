"""Statistics of the local learning rates ``lr·γ``, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .distributed import local_part
from .policies import Policy, from_plain
from .slot import Slot
from .state import State


def group_rates(
    group: dict[str, Any], states: Any, members: Mapping[Policy, Sequence[Slot]], per_tensor: bool
) -> dict[str, Any]:
    """The entry of ``AdaptiveOptimizer.learning_rates`` for one group. ``members``: of each policy, what has state."""
    lr, policies = float(group["lr"]), from_plain(group["policy"])
    names = group.get("param_names", [None] * len(group["params"]))
    tensors, weights = [], []
    for name, p in zip(names, group["params"], strict=True):
        rate: dict[str, float] = dict.fromkeys(("min", "mean", "max"), lr)
        for policy in policies:
            for key, gain in _gain_statistics(policy, states.get(p, {}), members.get(policy, [])).items():
                rate[key] *= gain
        tensors.append({"name": name, "numel": p.numel(), **rate})
        weights.append(local_part(p).numel())
    return {**_summary(tensors, weights, lr), **({"tensors": tensors} if per_tensor else {})}


def _gain_statistics(policy: Policy, state: State, peers: Sequence[Slot]) -> dict[str, float]:
    if ("element_gain" if policy.elementwise else "gain") not in state:
        if "gain" not in policy.shared_names() or not peers:
            return {}
        state = peers[0].state  # a tensor that has not moved yet shares a global gain all the same
    gain = policy.gain(state)
    if not isinstance(gain, Tensor):
        return dict.fromkeys(("min", "mean", "max"), gain)
    gain = local_part(gain)
    if not gain.numel():
        return {}
    return {"min": gain.min().item(), "mean": gain.double().mean().item(), "max": gain.max().item()}


def _summary(tensors: list[dict[str, Any]], weights: list[int], lr: float) -> dict[str, float]:
    """Over the elements that this rank holds: ``weights`` of each tensor."""
    filled = [(t, weight) for t, weight in zip(tensors, weights, strict=True) if weight]
    if not filled:
        return dict.fromkeys(("min", "mean", "max"), lr)
    total = sum(weight for _, weight in filled)
    return {
        "min": min(t["min"] for t, _ in filled),
        "mean": sum(t["mean"] * weight for t, weight in filled) / total,
        "max": max(t["max"] for t, _ in filled),
    }
