"""From param groups to the tensors of a step: who takes part, with which state, under which policies."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.backbone import Backbone
from ..core.checks import check_gradients, describe
from ..core.shards import Part, any_rank, local_part, split_slots
from ..core.state import StateSpec
from ..core.view import Slot
from ..policies import Policy, from_plain
from . import reference_rates
from .checkpoint import conform_value, specs
from .fingerprint import Fingerprint
from .membership import Members, Outline, by_policy, join, missing, outline_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]


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
        key: no other one's in this process.
        captured: what CUDA graphs point to: the optimizer's, so that it outlives this object.
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
    key: int = field(default_factory=count(1).__next__)
    captured: list[Any] = field(default_factory=list, repr=False)
    _waiting: list[Tensor] = field(default_factory=list, repr=False)
    _fingerprint: Fingerprint | None = field(default=None, repr=False)

    def is_current(self, groups: Groups, states: States) -> bool:
        """Whether nothing has changed but values: the optimizer's groups, policies, structure and state tensors."""
        is_same = self._fingerprint is not None and self._fingerprint.matches(groups, states)
        return is_same and all(part.holds() for part in self.parts)

    def outline(self) -> Outline:
        """How its tensors stand."""
        return outline_of(self.params, self.slots)

    def has_newcomers(self) -> bool:
        """Whether a parameter that is not in ``slots`` has a gradient."""
        return not all(map(is_, [p.grad for p in self._waiting], repeat(None)))

    def keep(self, captured: Sequence[Any]) -> None:
        """Keeps what launches that were captured in a CUDA graph point to, for as long as the optimizer lives."""
        self.captured.extend(captured)

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
    before: Outline,
    process_group: ProcessGroup | None = None,
    in_step: bool = True,
) -> Gathered:
    """The tensors of a step: those with a gradient, and those that have had one. Their state is complete.

    Args:
        backbone: of the optimizer.
        groups: its param groups.
        states: its state; grows by what is missing.
        before: how the tensors stood at the last gathering. Those of it that need no state stay, lest each step in
            which one of them has a gradient, and had none in the step before, gathers anew.
        process_group: the ranks that hold parts of parameters that are no DTensors, or None.
        in_step: whether gradients make newcomers. Else tensors that miss some of their state, and did not stand in
            ``before``, are left out.
    """
    slots, late = [], []
    for slot, spec in _all(backbone, groups, states):
        stood, lacks = slot.param in before, missing(spec, slot.state)
        if not ((in_step and slot.applies) or slot.state or (stood and not spec)):
            continue
        if lacks and not in_step and not stood:
            continue
        if spec:
            slot.state = states.setdefault(slot.param, slot.state)
        slots.append(slot)
        _conform(slot, spec)
        if missing(spec, slot.state):
            late.append((slot, spec))
    join(slots, late, groups, before)
    gathered = _gathered(backbone, groups, states, slots, process_group)
    active = {id(slot.group) for slot in slots}
    for group in groups:
        if id(group) in active:
            group.pop("idle_calls", None)
    return gathered


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
        _waiting=[p for group in groups for p in group["params"] if id(p) not in inside],
        _fingerprint=Fingerprint(backbone, groups, states),
    )


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


def scale_groups(groups: Groups) -> dict[int, tuple[dict[str, Any], ...]]:
    """Of groups under a global gain, by id, all groups that are under the same."""
    under: dict[Policy, list[dict[str, Any]]] = {}
    for group in groups:
        for policy in from_plain(group["policy"]):
            if "gain" in policy.shared_names():
                under.setdefault(policy, []).append(group)
    return {id(group): own for own in map(tuple, under.values()) for group in own}


def moves_nothing(groups: Groups, process_group: ProcessGroup | None) -> bool:
    """Whether a step is there to make state alone: the host knows that all lr are 0, and all the gradients are.

    So ``torch.distributed.checkpoint`` makes state in order to read a state_dict. The same on all ranks.
    """
    lrs = [group["lr"] for group in groups]
    if any(isinstance(lr, Tensor) and not reference_rates.is_on_host(lr) for lr in lrs) or any(
        float(lr) != 0 for lr in lrs
    ):
        return False
    params = [p for group in groups for p in group["params"]]
    grads = [local_part(p.grad) for p in params if p.grad is not None]
    is_idle = not grads  # a call like any other, which counts
    return not any_rank(params, process_group, is_idle or any(bool((grad != 0).any()) for grad in grads))
