"""From param groups to the tensors of a step: who takes part, with which state, under which policies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from .backbones import Backbone
from .checkpoint import specs
from .policies import Policy, from_plain, to_plain
from .slot import Slot
from .state import State, StateSpec

Groups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]
Members = dict[Policy, list[Slot]]


def policies_of(group: dict[str, Any], backbone: Backbone) -> tuple[Policy, ...]:
    """The policies of a group, which may have been set by hand: then the plain form takes their place."""
    policy = group["policy"]
    if not isinstance(policy, dict) and not (isinstance(policy, list) and all(isinstance(p, dict) for p in policy)):
        group["policy"] = to_plain(policy, backbone, group)
    return from_plain(group["policy"])


def by_policy(slots: Iterable[Slot]) -> Members:
    """Of every policy, its tensors."""
    members: Members = {}
    for slot in slots:
        for policy in slot.policies:
            members.setdefault(policy, []).append(slot)
    return members


def gather(backbone: Backbone, groups: Groups, states: States, grad_scale: Tensor | None = None) -> list[Slot]:
    """The tensors of this step: those with a gradient, and those that have had one. Their state is complete.

    Args:
        backbone: of the optimizer.
        groups: its param groups.
        states: its state; grows by what is missing.
        grad_scale: what gradients are to be divided by (AMP), or None.
    """
    slots, late, index = [], [], -1
    for group in groups:
        policies, spec = policies_of(group, backbone), specs(backbone, group)
        for p in group["params"]:
            index += 1
            applies, state = p.grad is not None, states.get(p, {})
            if not (applies or state):
                continue
            if spec:
                state = states[p]
            slots.append(Slot(p, state, group, backbone, policies, index, applies, grad_scale))
            if _missing(spec, state):
                late.append((slots[-1], spec))
    if late:
        _join(slots, late, groups)
    return slots


def with_state(backbone: Backbone, groups: Groups, states: States) -> Iterator[Slot]:
    """The tensors whose state is complete, outside of a step."""
    for group in groups:
        policies, spec = policies_of(group, backbone), specs(backbone, group)
        for p in group["params"]:
            state = states.get(p, {})
            if state and not _missing(spec, state):
                yield Slot(p, state, group, backbone, policies)


def _missing(spec: dict[str, StateSpec], state: State) -> list[str]:
    return [name for name, s in spec.items() if name not in state and not s.optional]


def _join(slots: list[Slot], late: list[tuple[Slot, dict[str, StateSpec]]], groups: Groups) -> None:
    """Gives newcomers their state; what a policy's tensors share, they take from those that were there before."""
    newcomers = {id(slot) for slot, _ in late}
    peers = {policy: old[0] for policy, old in by_policy(s for s in slots if id(s) not in newcomers).items()}
    for slot, spec in late:
        missing = _missing(spec, slot.state)
        for name in missing:
            slot.state[name] = spec[name].create(slot.param, slot.group)
        for policy in slot.policies:
            peer = peers.setdefault(policy, slot)
            for name in set(missing).intersection(policy.shared_names()):
                value = slot.state[name]
                if peer is not slot:
                    value.copy_(peer.state[name])
                elif name == policy.counter:
                    value.copy_(_idle_calls(policy, groups, value.device))


# A policy's interval also counts the calls that found no gradient yet, so no state to count in: its groups count those.


def _idle_calls(policy: Policy, groups: Groups, device: torch.device) -> Tensor:
    counts = [g["idle_calls"].to(device) for g in groups if "idle_calls" in g and policy in from_plain(g["policy"])]
    calls = torch.stack(counts).max() if counts else torch.zeros((), dtype=torch.int64)
    return calls.remainder(policy.interval) if policy.interval else calls


def count_idle_calls(groups: Groups, slots: Iterable[Slot], found_inf: Tensor | None) -> None:
    """One call more for the groups without state, but none if AMP skips it, which is known on the device only."""
    active = {id(slot.group) for slot in slots}
    for group in groups:
        if id(group) in active:
            group.pop("idle_calls", None)
        elif any(policy.counter for policy in from_plain(group["policy"])):
            idle = group.get("idle_calls", torch.zeros((), dtype=torch.int64))
            if found_inf is None:
                group["idle_calls"] = idle + 1
            else:
                group["idle_calls"] = idle.to(found_inf.device) + (found_inf == 0).to(torch.int64).reshape(())


def forget_idle_calls(groups: Groups) -> None:
    """An interval has ended for all."""
    for group in groups:
        group.pop("idle_calls", None)
