"""How state comes to tensors and policies that are new to each other, and what becomes of it where groups are changed.

Anyone may set ``group["policy"]`` or ``group["amsgrad"]`` between two steps. So the optimizer remembers how each tensor
stood when its state last was complete, and brings it in line before anything uses it: a step, an end of an interval, a
``state_dict()``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.backbone import Backbone
from ..core.state import State, StateSpec
from ..core.view import ParamView
from ..policies import Policy, from_plain

Groups = Sequence[dict[str, Any]]
Members = dict[Policy, list[ParamView]]
Late = Sequence[tuple[ParamView, dict[str, StateSpec]]]


class Membership(NamedTuple):
    """Under which policies a tensor's state was made, and for which variant of the backbone."""

    policies: tuple[Policy, ...]
    variant: tuple[Any, ...]


#: Of the tensors whose state was complete. It holds no state: what the user has dropped is to be freed.
Memberships = Mapping[Tensor, Membership]


def memberships_of(params: Iterable[Tensor], views: Iterable[ParamView]) -> Memberships:
    """How these tensors stand now. ``params``: the optimizer's, of which a view may hold this rank's part."""
    return {p: Membership(s.policies, s.backbone.variant(s.group)) for p, s in zip(params, views, strict=True)}


def memberships_of_groups(backbone: Backbone, groups: Groups, states: Mapping[Tensor, Any]) -> Memberships:
    """How tensors stand whose state agrees with their groups: both have just come in together."""
    with_state = [(p, group) for group in groups for p in group["params"] if states.get(p)]
    return {p: Membership(from_plain(group["policy"]), backbone.variant(group)) for p, group in with_state}


def by_policy(views: Iterable[ParamView]) -> Members:
    """Of every policy, its tensors."""
    members: Members = {}
    for view in views:
        for policy in view.policies:
            members.setdefault(policy, []).append(view)
    return members


def missing(spec: Mapping[str, StateSpec], state: State) -> list[str]:
    """What state still has to get."""
    return [name for name, s in spec.items() if name not in state and not s.optional]


def join(
    views: Sequence[ParamView],
    late: Late,
    groups: Groups,
    before: Memberships,
    calls: Mapping[Policy, Tensor] = MappingProxyType({}),
) -> None:
    """Completes the state of tensors that are new, and of those whose policy or variant is.

    Where a policy is new to a tensor that has trained under another, its sums and counts begin anew, unless they mean
    the same as before: numbers of a policy may be changed as training goes. A global gain and the count of calls are
    those of the tensors that had the policy before; where none had, the first tensor's.

    Args:
        views: all tensors whose state is to be complete.
        late: those that miss some, with what theirs must have.
        groups: all param groups.
        before: how the tensors stood; those that are not in it, but have state, stand as they do now.
        calls: the counts of calls of policies, for tensors that come without the others.
    """
    known = {id(view): before[view.param] for view in views if view.state and view.param in before}
    created = {id(view): create(view, spec) for view, spec in late}
    for policy, members in by_policy(views).items():
        count = partial(_calls_of, policy, groups, calls)
        _join_policy(policy, members, known, created, count)
    for view in views:
        if id(view) in known and known[id(view)].variant != view.backbone.variant(view.group):
            for policy in view.policies:
                policy.reset_direction(view)


def create(view: ParamView, spec: Mapping[str, StateSpec]) -> list[str]:
    """Makes what the state lacks, and returns its names."""
    names = missing(spec, view.state)
    for name in names:
        view.state[name] = spec[name].create(view.param, view.group)
    for name in names:
        if spec[name].fill == "parameter":  # now that its master is there
            spec[name].reset_(view.state[name], view.weight())
    return names


def _join_policy(
    policy: Policy,
    members: Sequence[ParamView],
    known: Mapping[int, Membership],
    created: Mapping[int, Collection[str]],
    count: Callable[[torch.device], Tensor],
) -> None:
    stood = {id(s): known[id(s)].policies for s in members if id(s) in known}
    earlier = {key: policies for key, policies in stood.items() if policy not in policies}
    old = [s for s in members if id(s) not in earlier and id(s) not in created]
    going_on = [s for s in members if any(map(policy.continues, earlier.get(id(s), ())))]
    leader = [*old, *going_on, *(s for s in members if id(s) in earlier), *members][0]
    together = earlier[id(leader)] if going_on and not old else None
    joining = [s for s in members if id(s) in earlier or id(s) in created]
    for view in sorted(joining, key=lambda view: view is not leader):  # from which the others take
        names, shared = created.get(id(view), ()), set(policy.shared_names())
        if id(view) not in earlier:
            shared.intersection_update(names)
        elif earlier[id(view)] != together:
            policy.restart_interval([view])
            names = policy.state_spec(view.backbone, view.group)
        for name in shared:
            if view is not leader:
                view.state[name].copy_(leader.state[name])
            elif name == policy.counter and id(view) in created:
                view.state[name].copy_(count(view.state[name].device))
        policy.join(view, names)


# A policy's interval also counts the calls that found no gradient yet, so no state to count in: its groups count those.


def _calls_of(policy: Policy, groups: Groups, calls: Mapping[Policy, Tensor], device: torch.device) -> Tensor:
    return calls[policy] if policy in calls else idle_calls(policy, groups, device)


def idle_calls(policy: Policy, groups: Groups, device: torch.device) -> Tensor:
    """The calls in the running interval of a policy whose tensors have no state yet."""
    counts = [g["idle_calls"].to(device) for g in groups if "idle_calls" in g and policy in from_plain(g["policy"])]
    calls = torch.stack(counts).max() if counts else torch.zeros((), dtype=torch.int64)
    return calls.remainder(policy.interval) if policy.interval else calls


def count_idle_calls(groups: Iterable[dict[str, Any]], found_inf: Tensor | None) -> None:
    """One call more for these groups, which have no state, but none if AMP skips it: known on the device only."""
    for group in groups:
        idle = group.get("idle_calls", torch.zeros((), dtype=torch.int64))
        if found_inf is None:
            group["idle_calls"] = idle + 1
        else:
            group["idle_calls"] = idle.to(found_inf.device) + (found_inf == 0).to(torch.int64).reshape(())


def forget_idle_calls(groups: Groups) -> None:
    """An interval has ended for all."""
    for group in groups:
        group.pop("idle_calls", None)
