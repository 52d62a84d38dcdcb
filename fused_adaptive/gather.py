"""From param groups to the tensors of a step: who takes part, with which state, under which policies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, repeat
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import reference_rates
from .backbones import Backbone
from .checkpoint import conform_value, specs
from .checks import check_gradients, describe
from .distributed import Part, any_rank, local_part, split_slots
from .fingerprint import Fingerprint
from .policies import Policy, from_plain
from .slot import Slot
from .state import State, StateSpec
from .versions import SharedVersion

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]
Members = dict[Policy, list[Slot]]


class Outline(NamedTuple):
    """What one gathering knows of the last. It holds no state: what the user has dropped is to be freed.

    Args:
        params: of the slots.
        policies: of every parameter, by its id.
        variants: of every group, by its id, what the backbone made of it.
    """

    params: list[Tensor]
    policies: dict[int, tuple[Policy, ...]]
    variants: dict[int, tuple[Any, ...]]


@dataclass(eq=False)
class Gathered:
    """The tensors that have state, gathered once and kept for as long as nothing about them changes.

    Scalar hyperparameters are not part of it: they are read from the groups at every step.

    Args:
        slots: every parameter whose state is complete, in the order of the param groups; with a backbone and a policy
            that need none, every parameter that has had a gradient. Which have one in a step, ``slot.applies`` tells.
        members: of every policy, its slots.
        params: of the slots, in the same order.
        groups: the param groups.
        backbone: of the optimizer.
        idle: the groups that have no state yet although their policies count steps.
        parts: behind the slots of DTensors.
        compiled: what a backend keeps with it; it dies with this object.
        uses_reference: the backend's kernels cannot step these tensors, and the reference does.
        owner: the optimizer, weakly.
        variants: of every group, by its id, what the backbone made of it.
        key: no other one's in this process.
    """

    slots: list[Slot]
    members: Members
    params: list[Tensor]
    groups: Groups
    backbone: Backbone
    idle: Groups
    parts: list[Part] = field(default_factory=list)
    compiled: Any = None
    uses_reference: bool = False
    owner: Any = None
    variants: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    key: int = field(default_factory=count(1).__next__)
    _waiting: list[Tensor] = field(default_factory=list, repr=False)
    _fingerprint: Fingerprint | None = field(default=None, repr=False)

    def is_current(self, groups: Groups, states: States) -> bool:
        """Whether nothing has changed but values: the optimizer's groups, policies, structure and state tensors."""
        is_same = self._fingerprint is not None and self._fingerprint.matches(groups, states)
        return is_same and all(part.holds() for part in self.parts)

    def outline(self) -> Outline:
        """What the next gathering has to know of this one."""
        policies = {id(p): slot.policies for p, slot in zip(self.params, self.slots, strict=True)}
        return Outline(self.params, policies, self.variants)

    def has_newcomers(self) -> bool:
        """Whether a parameter that is not in ``slots`` has a gradient."""
        return not all(map(is_, [p.grad for p in self._waiting], repeat(None)))

    def bring_gradients(self) -> None:
        """Gives the slots of DTensors this step's gradients, spread like their parameters; may communicate.

        Raises:
            RuntimeError: for a gradient that is no DTensor, or of another shape or mesh. Then nothing has changed.
        """
        for part in self.parts:
            if not part.bring_gradient():
                self.check_gradients()

    def take_back(self) -> None:
        """What a step has made of the slots of DTensors becomes theirs."""
        if self.parts:
            torch.autograd.graph.increment_version([t for part in self.parts for t in part.written()])
        for part in self.parts:
            part.take_back()

    def check_gradients(self) -> None:
        """Raises RuntimeError that names the first parameter whose gradient cannot be used, as ``step()`` promises."""
        check_gradients(self.groups)


def gather(
    backbone: Backbone,
    groups: Groups,
    states: States,
    before: Outline | None = None,
    process_group: ProcessGroup | None = None,
) -> Gathered:
    """The tensors of this step: those with a gradient, and those that have had one. Their state is complete.

    Args:
        backbone: of the optimizer.
        groups: its param groups.
        states: its state; grows by what is missing.
        before: the last gathering. Tensors of it that need no state stay, lest each step in which one of them has a
            gradient, and had none in the step before, gathers anew.
        process_group: the ranks that hold parts of parameters that are no DTensors, or None.
    """
    slots, late, known = [], [], set(map(id, before.params if before else ()))
    for slot, spec in _all(backbone, groups, states):
        if not (slot.applies or slot.state or (not spec and id(slot.param) in known)):
            continue
        if spec:
            slot.state = states.setdefault(slot.param, slot.state)
        slots.append(slot)
        _conform(slot, spec)
        if _missing(spec, slot.state):
            late.append((slot, spec))
    if late:
        _join(slots, late, groups)
    if before:
        _follow_changes(slots, before, backbone)
    gathered = _gathered(backbone, groups, states, slots, process_group)
    active = {id(slot.group) for slot in slots}
    for group in groups:
        if id(group) in active:
            group.pop("idle_calls", None)
    return gathered


def gather_complete(
    backbone: Backbone, groups: Groups, states: States, process_group: ProcessGroup | None = None
) -> Gathered:
    """The tensors whose state is complete, outside of a step: nothing is created, gradients do not matter."""
    slots = []
    for slot, spec in _all(backbone, groups, states):
        if slot.state and not _missing(spec, slot.state):
            _conform(slot, spec)
            slots.append(slot)
    return _gathered(backbone, groups, states, slots, process_group)


def _all(backbone: Backbone, groups: Groups, states: States) -> Iterator[tuple[Slot, dict[str, StateSpec]]]:
    """Every parameter, and what its state must have."""
    index = 0
    for group in groups:
        policies, by_dtype = from_plain(group["policy"]), {}
        for p in group["params"]:
            spec = by_dtype.get(p.dtype)
            if spec is None:
                spec = by_dtype[p.dtype] = specs(backbone, group, p.dtype)
            yield Slot(p, states.get(p, {}), group, backbone, policies, index), spec
            index += 1


def _gathered(
    backbone: Backbone, groups: Groups, states: States, slots: list[Slot], process_group: ProcessGroup | None
) -> Gathered:
    params, active = [slot.param for slot in slots], {id(slot.group) for slot in slots}
    inside, under = set(map(id, params)), scale_groups(groups)
    for slot in slots:
        slot.scale_groups = under.get(id(slot.group), ())
    slots, parts = split_slots(slots, process_group)
    return Gathered(
        slots,
        by_policy(slots),
        params,
        list(groups),
        backbone,
        [g for g in groups if id(g) not in active and any(policy.counter for policy in from_plain(g["policy"]))],
        parts,
        variants={id(group): backbone.variant(group) for group in groups},
        _waiting=[p for group in groups for p in group["params"] if id(p) not in inside],
        _fingerprint=Fingerprint(backbone, groups, states),
    )


def by_policy(slots: Iterable[Slot]) -> Members:
    """Of every policy, its tensors."""
    members: Members = {}
    for slot in slots:
        for policy in slot.policies:
            members.setdefault(policy, []).append(slot)
    return members


def _conform(slot: Slot, spec: dict[str, StateSpec]) -> None:
    """Brings state that others have put there to its own dtype and device."""
    for name in spec.keys() & slot.state.keys():
        value = slot.state[name]
        if value is None and spec[name].optional:  # torch's SGD before its first step
            del slot.state[name]
            continue
        if not slot.applies and isinstance(value, Tensor) and value.dim() and value.shape != slot.param.shape:
            continue  # the parameter's memory has been given away
        try:
            own = conform_value(spec[name], value, slot.param, slot.group, partial(_call, slot, name))
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        if own is not value:
            slot.state[name] = own


def _call(slot: Slot, name: str) -> str:
    return f"the state {name!r} of {describe(slot.index, slot.param)}"


def _missing(spec: dict[str, StateSpec], state: State) -> list[str]:
    return [name for name, s in spec.items() if name not in state and not s.optional]


def _join(slots: list[Slot], late: list[tuple[Slot, dict[str, StateSpec]]], groups: Groups) -> None:
    """Gives newcomers their state; what a policy's tensors share, they take from those that were there before."""
    newcomers = {id(slot) for slot, _ in late}
    peers = {policy: old[0] for policy, old in by_policy(s for s in slots if id(s) not in newcomers).items()}
    version = SharedVersion()
    for slot, spec in late:
        missing = _missing(spec, slot.state)
        for name in missing:
            slot.state[name] = spec[name].create(slot.param, slot.group, version)
        for name in missing:
            if spec[name].fill == "parameter":  # now that its master is there
                spec[name].reset_(slot.state[name], slot.weight())
        for policy in slot.policies:
            peer = peers.setdefault(policy, slot)
            for name in set(missing).intersection(policy.shared_names()):
                value = slot.state[name]
                if peer is not slot:
                    value.copy_(peer.state[name])
                elif name == policy.counter:
                    value.copy_(_idle_calls(policy, groups, value.device))
            policy.join(slot, missing)


def _follow_changes(slots: Sequence[Slot], before: Outline, backbone: Backbone) -> None:
    """What has to happen to state whose policy or structure has been changed since the last gathering.

    A tensor whose policy has become that of others takes what they share, a global gain and the count of calls, and
    its sums begin anew. Where nobody had the policy before, the first tensor's gain and count are everyone's.
    """
    for policy, members in by_policy(slots).items():
        had = {id(s): before.policies[id(s.param)] for s in members if id(s.param) in before.policies}
        old = [s for s in members if id(s) in had]
        if not old:
            continue
        leader = next((s for s in old if policy in had[id(s)]), old[0])
        for slot in old:
            was_apart = policy in had[id(leader)] or had[id(slot)] != had[id(leader)]
            if policy not in had[id(slot)] and was_apart:
                policy.restart_interval([slot])
                for name in policy.shared_names():
                    slot.state[name].copy_(leader.state[name])
    for slot in slots:
        if before.variants.get(id(slot.group), backbone.variant(slot.group)) != backbone.variant(slot.group):
            for policy in slot.policies:
                policy.restructure(slot)


def scale_groups(groups: Groups) -> dict[int, tuple[dict[str, Any], ...]]:
    """Of groups under a global gain, by id, all groups that are under the same."""
    under: dict[Policy, list[dict[str, Any]]] = {}
    for group in groups:
        for policy in from_plain(group["policy"]):
            if "gain" in policy.shared_names():
                under.setdefault(policy, []).append(group)
    return {id(group): own for own in map(tuple, under.values()) for group in own}


def moves_nothing(groups: Groups, process_group: ProcessGroup | None) -> bool:
    """Whether a step is there to make state alone: the host knows that all lr are 0, and all gradients are.

    So ``torch.distributed.checkpoint`` makes state in order to read a state_dict. The same on all ranks.
    """
    lrs = [group["lr"] for group in groups]
    if any(isinstance(lr, Tensor) and not reference_rates.is_on_host(lr) for lr in lrs) or any(
        float(lr) != 0 for lr in lrs
    ):
        return False
    params = [p for group in groups for p in group["params"]]
    is_any = any(p.grad is not None and bool((local_part(p.grad) != 0).any()) for p in params)
    return not any_rank(params, process_group, is_any)


# A policy's interval also counts the calls that found no gradient yet, so no state to count in: its groups count those.


def _idle_calls(policy: Policy, groups: Groups, device: torch.device) -> Tensor:
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
