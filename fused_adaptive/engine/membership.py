"""Creates state for tensors and policies that are new to each other, and adapts state after changes of groups.

Any code may set ``group["policy"]`` or ``group["amsgrad"]`` between two steps. So the optimizer stores the membership
of each tensor when its state is complete, and adapts the state before it is used: by a step, the end of an interval, or
a ``state_dict()``.
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
    """Policies of a tensor, structure of its backbone and its group's ``master``, for which its state was made."""

    policies: tuple[Policy, ...]
    structure: tuple[Any, ...]
    master: str


def _membership(backbone: Backbone, group: Mapping[str, Any]) -> Membership:
    return Membership(from_plain(group["policy"]), backbone.structure(group), group["master"])


#: Memberships of tensors whose state was complete. They hold no state, so that state dropped by the user is freed.
Memberships = Mapping[Tensor, Membership]


def memberships_of(params: Iterable[Tensor], views: Iterable[ParamView]) -> Memberships:
    """Returns the present memberships of these tensors.

    Args:
        params: the optimizer's parameters. Views may hold this rank's parts of them.
        views: their views, in the same order.
    """
    return {p: _membership(view.backbone, view.group) for p, view in zip(params, views, strict=True)}


def memberships_of_groups(backbone: Backbone, groups: Groups, states: Mapping[Tensor, Any]) -> Memberships:
    """Returns the memberships that the groups define for the tensors that have state."""
    return {p: _membership(backbone, group) for group in groups for p in group["params"] if states.get(p)}


def by_policy(views: Iterable[ParamView]) -> Members:
    """Returns the views of each policy."""
    members: Members = {}
    for view in views:
        for policy in view.policies:
            members.setdefault(policy, []).append(view)
    return members


def missing(spec: Mapping[str, StateSpec], state: State) -> list[str]:
    """Returns the names of required entries that the state lacks."""
    return [name for name, s in spec.items() if name not in state and not s.optional]


def join(
    views: Sequence[ParamView],
    late: Late,
    groups: Groups,
    before: Memberships,
    calls: Mapping[Policy, Tensor] = MappingProxyType({}),
) -> None:
    """Creates the state of new tensors, and adapts the state of tensors whose policy or structure is new.

    If a policy is new to a tensor that has trained under another, its sums and counts restart, unless they have the
    same meaning under both: numbers of a policy may change during training. A global gain and the count of calls are
    those of the tensors that had the policy before; if none had, the first tensor's.

    Args:
        views: all tensors whose state is to be complete.
        late: those that lack some state, with the declarations of all of theirs.
        groups: all param groups.
        before: previous memberships. Tensors with state that are not in it have their present membership.
        calls: counts of calls of policies, for tensors that join without the other tensors of the policy.
    """
    known = {id(view): before[view.param] for view in views if view.state and view.param in before}
    created = {id(view): create(view, spec) for view, spec in late}
    for policy, members in by_policy(views).items():
        count = partial(_calls_of, policy, groups, calls)
        _join_policy(policy, members, known, created, count)
    for view in views:
        if id(view) in known and known[id(view)].structure != view.backbone.structure(view.group):
            for policy in view.policies:
                policy.reset_direction(view)


def create(view: ParamView, spec: Mapping[str, StateSpec]) -> list[str]:
    """Creates the entries that the state lacks, and returns their names."""
    names = missing(spec, view.state)
    for name in names:
        view.state[name] = spec[name].create(view.param, view.group)
    for name in names:
        if spec[name].fill == "parameter":  # which needs the master created above
            spec[name].reset_(view.state[name], view.weight())
    return names


def _join_policy(
    policy: Policy,
    members: Sequence[ParamView],
    known: Mapping[int, Membership],
    created: Mapping[int, Collection[str]],
    count: Callable[[torch.device], Tensor],
) -> None:
    previous = {id(member): known[id(member)].policies for member in members if id(member) in known}
    earlier = {key: policies for key, policies in previous.items() if policy not in policies}
    staying = [member for member in members if id(member) not in earlier and id(member) not in created]
    continuing = [member for member in members if any(map(policy.continues, earlier.get(id(member), ())))]
    source = [*staying, *continuing, *(member for member in members if id(member) in earlier), *members][0]
    continued = earlier[id(source)] if continuing and not staying else None
    joining = [member for member in members if id(member) in earlier or id(member) in created]
    for view in sorted(joining, key=lambda view: view is not source):  # the source first, since the others copy from it
        names, shared = created.get(id(view), ()), set(policy.shared_names())
        if id(view) not in earlier:
            shared.intersection_update(names)
        elif earlier[id(view)] != continued:
            policy.restart_interval([view])
            names = policy.state_spec(view.backbone, view.group)
        for name in shared:
            if view is not source:
                view.state[name].copy_(source.state[name])
            elif name == policy.counter and id(view) in created:
                view.state[name].copy_(count(view.state[name].device))
        policy.join(view, names)


# An interval also counts calls before the first gradient. There is no state to count them in, so the groups do.


def _calls_of(policy: Policy, groups: Groups, calls: Mapping[Policy, Tensor], device: torch.device) -> Tensor:
    return calls[policy] if policy in calls else idle_calls(policy, groups, device)


def idle_calls(policy: Policy, groups: Groups, device: torch.device) -> Tensor:
    """Returns the calls in the current interval of a policy whose tensors have no state yet."""
    counts = [g["idle_calls"].to(device) for g in groups if "idle_calls" in g and policy in from_plain(g["policy"])]
    calls = torch.stack(counts).max() if counts else torch.zeros((), dtype=torch.int64)
    return calls.remainder(policy.interval) if policy.interval else calls


def count_idle_calls(groups: Iterable[dict[str, Any]], found_inf: Tensor | None) -> None:
    """Counts one call for these groups, which have no state, unless AMP skips the step.

    Whether it does is known on the device only.
    """
    for group in groups:
        idle = group.get("idle_calls", torch.zeros((), dtype=torch.int64))
        if found_inf is None:
            group["idle_calls"] = idle + 1
        else:
            group["idle_calls"] = idle.to(found_inf.device) + (found_inf == 0).to(torch.int64).reshape(())


def forget_idle_calls(groups: Groups) -> None:
    """Removes the counts of these groups, after an interval has ended for all of them."""
    for group in groups:
        group.pop("idle_calls", None)
