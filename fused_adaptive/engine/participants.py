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
from ..core.ranks import any_rank, local_part
from ..core.shards import Shard, local_views
from ..core.state import StateSpec
from ..core.view import ParamView
from ..policies import Policy, from_plain
from . import reference_rates
from .checkpoint import convert_state, specs
from .fingerprint import Fingerprint
from .membership import Members, Memberships, by_policy, join, memberships_of, missing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]


@dataclass(eq=False)
class Participants:
    """The tensors that have state, collected once and kept for as long as nothing about them changes.

    Scalar hyperparameters are not part of it: they are read from the groups at every step.

    Args:
        views: every parameter whose state is complete, in the order of the param groups; with a backbone and a policy
            that need none, every parameter that has had a gradient. Which have one in a step, ``view.applies`` tells.
        members: of every policy, its views.
        params: of the views, in the same order.
        groups: the param groups.
        backbone: of the optimizer.
        idle: the groups that have no state yet although their policies count steps.
        shards: behind the views of DTensors.
        plans: of the backend that steps them; they die with this object.
        uses_reference: the backend's kernels cannot step these tensors, and the reference does.
        owner: the optimizer, weakly.
        key: no other one's in this process.
        captured: what CUDA graphs point to: the optimizer's, so that it outlives this object.
    """

    views: list[ParamView]
    members: Members
    params: list[Tensor]
    groups: Groups
    backbone: Backbone
    idle: Groups
    shards: list[Shard] = field(default_factory=list)
    plans: Any = None
    uses_reference: bool = False
    owner: Any = None
    key: int = field(default_factory=count(1).__next__)
    captured: list[Any] = field(default_factory=list, repr=False)
    _waiting: list[Tensor] = field(default_factory=list, repr=False)
    _fingerprint: Fingerprint | None = field(default=None, repr=False)

    def is_current(self, groups: Groups, states: States) -> bool:
        """Whether nothing has changed but values: the optimizer's groups, policies, options and state tensors."""
        is_same = self._fingerprint is not None and self._fingerprint.matches(groups, states)
        return is_same and all(shard.is_current() for shard in self.shards)

    def memberships(self) -> Memberships:
        """How its tensors stand."""
        return memberships_of(self.params, self.views)

    def has_newcomers(self) -> bool:
        """Whether a parameter that is not in ``views`` has a gradient."""
        return not all(map(is_, [p.grad for p in self._waiting], repeat(None)))

    def keep(self, captured: Sequence[Any]) -> None:
        """Keeps what launches that were captured in a CUDA graph point to, for as long as the optimizer lives."""
        self.captured.extend(captured)

    def localize_gradients(self) -> None:
        """Gives the views of DTensors this step's gradients, sharded like their parameters; may communicate.

        Raises:
            RuntimeError: for a gradient that is no DTensor, or of another shape or mesh. Then nothing has changed.
        """
        for shard in self.shards:
            if not shard.localize_gradient():
                self.check_gradients()

    def write_back(self) -> None:
        """What a step has made of the views of DTensors becomes theirs."""
        if self.shards:
            torch.autograd.graph.increment_version([t for shard in self.shards for t in shard.written()])
        for shard in self.shards:
            shard.write_back()

    def check_gradients(self) -> None:
        """Raises RuntimeError that names the first parameter whose gradient cannot be used, as ``step()`` promises."""
        check_gradients(self.groups)


def collect(
    backbone: Backbone,
    groups: Groups,
    states: States,
    before: Memberships,
    process_group: ProcessGroup | None = None,
    in_step: bool = True,
) -> Participants:
    """The tensors of a step: those with a gradient, and those that have had one. Their state is complete.

    Args:
        backbone: of the optimizer.
        groups: its param groups.
        states: its state; grows by what is missing.
        before: how the tensors stood at the last collecting. Those of it that need no state stay, lest each step in
            which one of them has a gradient, and had none in the step before, collects anew.
        process_group: the ranks that hold parts of parameters that are no DTensors, or None.
        in_step: whether gradients make newcomers. Else tensors that miss some of their state, and did not stand in
            ``before``, are left out.
    """
    views, late = [], []
    for view, spec in _all(backbone, groups, states):
        stood, lacks = view.param in before, missing(spec, view.state)
        if not ((in_step and view.applies) or view.state or (stood and not spec)):
            continue
        if lacks and not in_step and not stood:
            continue
        if spec:
            view.state = states.setdefault(view.param, view.state)
        views.append(view)
        _convert(view, spec)
        if missing(spec, view.state):
            late.append((view, spec))
    join(views, late, groups, before)
    participants = _participants(backbone, groups, states, views, process_group)
    active = {id(view.group) for view in views}
    for group in groups:
        if id(group) in active:
            group.pop("idle_calls", None)
    return participants


def _all(backbone: Backbone, groups: Groups, states: States) -> Iterator[tuple[ParamView, dict[str, StateSpec]]]:
    """Every parameter, and what its state must have."""
    index = 0
    for group in groups:
        policies, by_dtype = from_plain(group["policy"]), {}
        for p in group["params"]:
            spec = by_dtype.get(p.dtype)
            if spec is None:
                spec = by_dtype[p.dtype] = specs(backbone, group, p.dtype)
            yield ParamView(p, states.get(p, {}), group, backbone, policies, index), spec
            index += 1


def _participants(
    backbone: Backbone, groups: Groups, states: States, views: list[ParamView], process_group: ProcessGroup | None
) -> Participants:
    params, active = [view.param for view in views], {id(view.group) for view in views}
    inside, under = set(map(id, params)), scale_groups(groups)
    for view in views:
        view.scale_groups = under.get(id(view.group), ())
    views, shards = local_views(views, process_group)
    return Participants(
        views,
        by_policy(views),
        params,
        list(groups),
        backbone,
        [g for g in groups if id(g) not in active and any(policy.counter for policy in from_plain(g["policy"]))],
        shards,
        _waiting=[p for group in groups for p in group["params"] if id(p) not in inside],
        _fingerprint=Fingerprint(backbone, groups, states),
    )


def _convert(view: ParamView, spec: dict[str, StateSpec]) -> None:
    """Brings state that others have put there to its own dtype and device."""
    for name in spec.keys() & view.state.keys():
        value = view.state[name]
        if value is None and spec[name].optional:  # torch's SGD before its first step
            del view.state[name]
            continue
        if not view.applies and isinstance(value, Tensor) and value.dim() and value.shape != view.param.shape:
            continue  # the parameter's memory has been given away
        try:
            own = convert_state(spec[name], value, view.param, view.group, partial(_call, view, name))
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        if own is not value:
            view.state[name] = own


def _call(view: ParamView, name: str) -> str:
    return f"the state {name!r} of {describe(view.index, view.param)}"


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
