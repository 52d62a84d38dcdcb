"""Collects the tensors of a step from the param groups, with their state and policies."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import masters
from ..core.backbone import Backbone
from ..core.checks import check_gradients, describe, is_freed
from ..core.ranks import any_rank, local_part
from ..core.shards import Shard, local_views
from ..core.state import StateSpec
from ..core.view import ParamView
from ..policies import Policy, from_plain
from . import reference_rates
from .checkpoint import convert_state, match_counts, specs
from .fingerprint import Fingerprint
from .membership import Members, Memberships, by_policy, join, memberships_of, missing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Groups = list[dict[str, Any]]
States = MutableMapping[Tensor, dict[str, Any]]


@dataclass(eq=False)
class Participants:
    """Tensors that have state, collected once and kept until something about them changes.

    Scalar hyperparameters are not part of this: they are read from the groups at every step.

    Args:
        views: every parameter whose state is complete, in the order of the param groups; if backbone and policy need no
            state, every parameter that has had a gradient. ``view.applies`` is true for those with a gradient in a
            step.
        members: views of each policy.
        params: parameters of the views, in the same order.
        groups: the param groups.
        backbone: backbone of the optimizer.
        idle: groups that have no state yet although their policies count steps.
        shards: shards behind the views of DTensors.
        plans: plans of the backend that steps the tensors; freed with this object.
        uses_reference: whether the reference steps these tensors because the backend's kernels cannot.
        owner: weak reference to the optimizer.
        key: unique in this process.
        captured: memory that CUDA graphs point to. The list is the optimizer's, so it outlives this object.
        incomplete: parameters whose next update creates state, as SGD's first one does.
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
    incomplete: list[Tensor] = field(default_factory=list, repr=False)
    _waiting: list[Tensor] = field(default_factory=list, repr=False)
    _forms: list[Any] = field(default_factory=list, repr=False)
    _fingerprint: Fingerprint | None = field(default=None, repr=False)

    def is_current(self, groups: Groups, states: States) -> bool:
        """Returns whether groups, policies, options and state tensors are the same; values may have changed."""
        is_same = self._fingerprint is not None and self._fingerprint.matches(groups, states)
        return is_same and all(shard.is_current() for shard in self.shards)

    def memberships(self) -> Memberships:
        """Returns the memberships of the tensors."""
        return memberships_of(self.params, self.views)

    def counts(self) -> list[Tensor]:
        """Returns the counts of calls of ``step()`` in the running intervals, of each tensor and policy."""
        return [v.state[policy.counter] for policy, views in self.members.items() if policy.counter for v in views]

    def has_newcomers(self) -> bool:
        """Returns whether a parameter that is not in ``views`` has a gradient."""
        return not all(map(is_, [p.grad for p in self._waiting], repeat(None)))

    def renew(self, states: States) -> None:
        """Takes the state that a step has created for the participants' own."""
        self._fingerprint = Fingerprint(self.backbone, self.groups, states)
        self.incomplete = _incomplete(self.views, self.params)

    def drop_plans(self) -> None:
        """Frees the plans."""
        self.drop_unfilled()
        self.plans = None

    def drop_unfilled(self) -> None:
        """Removes the momentum buffers that plans have created and no step has filled, and the plans with them.

        Only these plans know that the first update has to fill them. Such buffers exist if AMP has skipped every step
        on the device, or a step has raised an error.
        """
        unfilled = [view for plan in self.plans or () for view in plan.unfilled()]
        for view in unfilled:
            del view.state["momentum_buffer"]
        for shard in self.shards:
            if "momentum_buffer" in shard.state and "momentum_buffer" not in shard.view.state:
                del shard.state["momentum_buffer"]
        if unfilled:
            self.plans = None

    def follow_data(self) -> None:
        """Converts state if data of parameters or state have another dtype or shape than in the last call.

        Raises:
            RuntimeError: for state of another shape than its parameter.
        """
        forms = [
            [(t.dtype, t.shape) for t in (view.param, *view.state.values()) if isinstance(t, Tensor)]
            for view in self.views
        ]
        taken: set[int] = set()
        for view in self.views if self._forms not in ([], forms) else ():
            _convert(view, specs(self.backbone, view.group, view.param.dtype), taken)
        self._forms = forms

    def keep(self, captured: Sequence[Any]) -> None:
        """Keeps memory that launches in a captured CUDA graph point to, as long as the optimizer lives."""
        self.captured.extend(captured)

    def localize_gradients(self) -> None:
        """Sets the gradients of the views of DTensors in this step, sharded like their parameters. May communicate.

        Raises:
            RuntimeError: for a gradient that is not a DTensor, or of another shape or mesh. Then nothing has changed.
        """
        for shard in self.shards:
            if not shard.localize_gradient():
                self.check_gradients()

    def write_back(self) -> None:
        """Stores the results of a step in the DTensors, and increments their versions for autograd."""
        if self.shards:
            torch.autograd.graph.increment_version([t for shard in self.shards for t in shard.written()])
        for shard in self.shards:
            shard.write_back()

    def check_gradients(self) -> None:
        """Raises RuntimeError that names the first parameter whose gradient cannot be used, as ``step()`` does."""
        check_gradients(self.groups)


def collect(
    backbone: Backbone,
    groups: Groups,
    states: States,
    before: Memberships,
    process_group: ProcessGroup | None = None,
    in_step: bool = True,
) -> Participants:
    """Collects the tensors of a step: those that have a gradient, and those that have had one. Completes their state.

    Args:
        backbone: backbone of the optimizer.
        groups: param groups of the optimizer.
        states: state of the optimizer; missing entries are added.
        before: memberships at the last collection. Tensors in it that need no state are kept; else a step in which such
            a tensor has a gradient after a step without one would collect again.
        process_group: ranks that hold parts of the parameters that are not DTensors, or None.
        in_step: whether tensors with a gradient join. If not, tensors that lack some of their state and are not in
            ``before`` are left out.
    """
    views, late, taken = [], [], set()
    for view, spec in _all(backbone, groups, states):
        for name in masters.NAMES - spec.keys():  # of a master that the group has no more
            view.state.pop(name, None)
        was_member, lacks = view.param in before, missing(spec, view.state)
        if not ((in_step and view.applies) or view.state or (was_member and not spec)):
            continue
        if lacks and not in_step and not was_member:
            continue
        if spec:
            view.state = states.setdefault(view.param, view.state)
        views.append(view)
        _convert(view, spec, taken)
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
    """Yields a view of every parameter, with the declarations of its state."""
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
    collected, sharing = set(map(id, params)), scale_groups(groups)
    for view in views:
        view.scale_groups = sharing.get(id(view.group), ())
    views, shards = local_views(views, process_group)
    return Participants(
        views,
        by_policy(views),
        params,
        list(groups),
        backbone,
        [g for g in groups if id(g) not in active and any(policy.counter for policy in from_plain(g["policy"]))],
        shards,
        incomplete=_incomplete(views, params),
        _waiting=[p for group in groups for p in group["params"] if id(p) not in collected],
        _fingerprint=Fingerprint(backbone, groups, states),
    )


def _incomplete(views: Sequence[ParamView], params: Sequence[Tensor]) -> list[Tensor]:
    """Returns the parameters whose state lacks an optional entry."""
    groups = {id(view.group): view for view in views}
    names = {key: {n for n, s in v.backbone.state_spec(v.group).items() if s.optional} for key, v in groups.items()}
    pairs = zip(views, params, strict=True)
    return [p for view, p in pairs if names[id(view.group)] - view.state.keys()]


def _convert(view: ParamView, spec: dict[str, StateSpec], taken: set[int]) -> None:
    """Converts state that other code has set to its declared dtype and device, and copies what it has set twice.

    Args:
        view: the parameter.
        spec: declarations of its state.
        taken: ids of the tensors of other entries, to which those of this parameter are added.
    """
    for name in spec.keys() & view.state.keys():
        value = view.state[name]
        if value is None and spec[name].optional:  # torch's SGD stores None before its first step
            del view.state[name]
            continue
        if not view.applies and isinstance(value, Tensor) and _is_offloaded(value, view.param):
            continue
        try:
            converted = convert_state(spec[name], value, view.param, view.group, partial(_describe, view, name))
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        if id(converted) in taken and not is_freed(converted):
            converted = converted.clone()  # an update would write it twice
        if converted is not value:
            view.state[name] = converted
        taken.add(id(converted))
    match_counts(view.state)


def _is_offloaded(value: Tensor, param: Tensor) -> bool:
    return value.is_meta or (value.dim() > 0 and value.shape != param.shape)


def _describe(view: ParamView, name: str) -> str:
    return f"the state {name!r} of {describe(view.index, view.param)}"


def scale_groups(groups: Groups) -> dict[int, tuple[dict[str, Any], ...]]:
    """Returns, for the id of each group under a global gain, all groups that share this gain."""
    sharing: dict[Policy, list[dict[str, Any]]] = {}
    for group in groups:
        for policy in from_plain(group["policy"]):
            if policy.shares_gain:
                sharing.setdefault(policy, []).append(group)
    return {id(group): shared for shared in map(tuple, sharing.values()) for group in shared}


def moves_nothing(groups: Groups, process_group: ProcessGroup | None) -> bool:
    """Returns whether a step only creates state: the host knows that all lr are 0, and all gradients are 0.

    ``torch.distributed.checkpoint`` takes such a step to create the state before it reads a state_dict. The result is
    the same on all ranks.
    """
    lrs = [group["lr"] for group in groups]
    if any(isinstance(lr, Tensor) and not reference_rates.is_on_host(lr) for lr in lrs) or any(
        float(lr) != 0 for lr in lrs
    ):
        return False
    params = [p for group in groups for p in group["params"]]
    grads = [local_part(p.grad) for p in params if p.grad is not None]
    is_idle = not grads  # a step without gradients counts as a call, so it does more than create state
    return not any_rank(params, process_group, is_idle or any(bool((grad != 0).any()) for grad in grads))
