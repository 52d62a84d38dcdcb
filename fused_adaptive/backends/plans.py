"""Functions that the backends with kernels share to build and run plans.

A plan holds the addresses of one device's parameters and their state, so a step only passes the gradients. It is built
when participants are collected and lives as long as they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..core.backbone import Backbone
from ..core.checks import is_freed, is_wrapper
from ..core.declarations import READINESS, SOURCES, Rule, role_of
from ..core.state import state_dtype
from ..core.view import ParamView, has_rate, numbers_of, reference_rate
from ..core.warning import warn
from ..engine.checkpoint import specs
from ..engine.memory import check_memory, is_parked
from ..policies import ActiveLR, FixedLR, Hypergradient, Policy, TrainableLR
from . import reference
from .overlaps import share_memory

if TYPE_CHECKING:
    from ..engine.participants import Participants

#: The policies that have kernels.
POLICIES = (FixedLR, ActiveLR, TrainableLR, Hypergradient)

#: The return values of ``take_gradients``.
READY, GRADIENTS, STALE = range(len(READINESS))


class AnyPlan(Protocol):
    """The interface of a backend's plan."""

    def take_gradients(self, make_dense: bool = False) -> int: ...

    def holds(self) -> bool: ...

    def end_interval(self) -> Sequence[Any]: ...

    def unfilled(self) -> list[ParamView]: ...


P = TypeVar("P", bound=AnyPlan)


def ready(
    participants: Participants, plans_of: Callable[[Participants, bool], list[P] | None], backend: str
) -> list[P] | None:
    """Returns the plans with this step's gradients, checked; None if the reference backend must run the step.

    Args:
        participants: the participants of the step.
        plans_of: returns the backend's plans and keeps them in ``participants.plans``; None if it has no plans for
            these tensors. The second argument says whether they are for a step, which creates momentum buffers.
        backend: the name of the backend, for the error message.

    Raises:
        RuntimeError: if the backend cannot use the parameters, gradients or state.
    """
    for _ in range(2):
        if participants.plans is None:
            participants.follow_data()
        plans = None if participants.uses_reference else plans_of(participants, True)
        if plans is None:
            participants.uses_reference = True
            return None
        outcomes = [plan.take_gradients() for plan in plans]
        if GRADIENTS in outcomes:
            participants.check_gradients()
            outcomes = [plan.take_gradients(make_dense=True) for plan in plans]
        if not any(outcomes):
            # Raises for an invalid number before the first of several plans updates its parameters.
            for group in participants.groups if len(plans) > 1 else ():
                numbers_of(group, lr_on_device=isinstance(group["lr"], Tensor))
            return plans
        participants.check_gradients()  # its error for a gradient of the wrong shape is clearer than one for state
        participants.drop_plans()
    raise RuntimeError(
        f"the {backend} backend cannot use these parameters, gradients or state; use backend='reference'"
    )


def end_interval(participants: Participants, plans_of: Callable[[Participants, bool], list[P] | None]) -> None:
    """Ends the running interval of every policy, outside of a step."""
    plans = None if participants.uses_reference else plans_of(participants, False)
    if plans is not None and not all(plan.holds() for plan in plans):
        participants.drop_plans()
        participants.follow_data()
        plans = plans_of(participants, False)
    if plans is None:
        reference.end_interval(participants)
        return
    for plan in plans:
        participants.keep(plan.end_interval())


def views_of_plans(participants: Participants, on_device: Callable[[ParamView], bool]) -> list[list[ParamView]] | None:
    """Returns the views of each plan: one plan per device and location of the counters.

    Returns None if tensors of several plans share a gain, or if two parameters share memory, since kernels update all
    tensors at once, or if a parameter has no memory of its own.
    """
    if _wraps_tensors(participants.views) or share_memory(participants.views):
        return None
    views_by_key: dict[Any, list[ParamView]] = {}
    for view in participants.views:
        views_by_key.setdefault((view.param.device, on_device(view)), []).append(view)
    keys = {id(view): key for key, views in views_by_key.items() for view in views}
    for policy, views in participants.members.items():
        if policy.shares_gain and len({keys[id(view)] for view in views}) > 1:
            return None
    return list(views_by_key.values())


def _wraps_tensors(views: Sequence[ParamView]) -> bool:
    """Returns whether a parameter wraps other tensors, as torchao's float8 weights do, and warns if so."""
    for view in views:
        if is_wrapper(view.param):
            warn(
                f"parameter {view.index} is a {type(view.param).__name__}, which wraps other tensors: the step runs on "
                "the reference backend, which is slower"
            )
            return True
    return False


def parked_members(views: Sequence[ParamView]) -> dict[int, Tensor]:
    """Returns the parked members: those without memory at present (offloaded blocks) and without a gradient.

    Interval ends still update their counts and gains.

    Returns:
        A dict from the position of a parked member to a tensor of its state that has the parameter's shape.
    """
    parked = {}
    for i, view in enumerate(views):
        param = view.param
        tensors = [t for t in view.state.values() if isinstance(t, Tensor) and t.device == param.device]
        shaped = [t for t in tensors if t.dim() or param.dim() == 0]
        if not view.applies and is_parked(view):
            parked[i] = shaped[0] if shaped else param
    return parked


def dense_copies(params: Sequence[Tensor], parked: Mapping[int, Tensor]) -> list[Tensor]:
    """Returns the tensors to update: the parameters, or a new dense tensor for one with gaps in memory."""
    params = [parked.get(i, p) for i, p in enumerate(params)]
    strides = [torch.empty_like(p, device="meta").stride() for p in params]
    dense = [p.stride() == dense_strides and not is_lazy(p) for p, dense_strides in zip(params, strides, strict=True)]
    return [p if is_dense else torch.empty_like(p) for p, is_dense in zip(params, dense, strict=True)]


def collect_state(
    views: Sequence[ParamView],
    dense: Sequence[Tensor],
    backbone: Backbone,
    parked: Container[int],
    for_step: bool,
) -> tuple[dict[str, dict[int, Tensor]], list[int]]:
    """Collects the state tensors of a plan, and creates or copies them where the update requires it.

    Leaves out the state of parked members that only an update uses.

    Args:
        views: the views of the plan.
        dense: the tensors to update.
        backbone: the backbone of the views.
        parked: the members without memory.
        for_step: whether the momentum buffers of members with a gradient are created.

    Returns:
        A dict from role to a dict from member to tensor, and the list of members whose momentum buffer was just
        created and has no value yet.

    Raises:
        RuntimeError: for a parameter or state whose memory has been freed.
    """
    check_memory(views)
    bound: dict[str, dict[int, Tensor]] = {}
    first = []
    for i, (view, param) in enumerate(zip(views, dense, strict=True)):
        # Only the entries of the group's backbone and policies; others may be left from previous policies.
        named = specs(backbone, view.group, view.param.dtype)
        if for_step and view.applies and "momentum_buffer" in named and "momentum_buffer" not in view.state:
            view.state["momentum_buffer"] = torch.zeros_like(param, dtype=state_dtype(param))
            first.append(i)
        for name in named:
            if name not in view.state or (i in parked and name in ("master_low", "rounding_step")):
                continue  # not in the state yet: a momentum buffer before the first gradient
            value = view.state[name]
            if i in parked and is_freed(value):
                continue
            role = role_of(backbone.name, name)
            if value.shape == param.shape and value.stride() != param.stride():
                value = view.state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
            bound.setdefault(role, {})[i] = value
    return bound, first


class Unfilled:
    """The members of a plan whose momentum buffers were created and have no value yet, as far as the host knows.

    Args:
        views: the views of the plan.
        members: those whose buffers were just created.
    """

    def __init__(self, views: Sequence[ParamView], members: list[int]) -> None:
        self._views, self.members = views, members

    def follow_step(self, absent: Container[int]) -> None:
        """Keeps the members without a gradient, after a step that was not skipped."""
        self.members = [i for i in self.members if i in absent]

    def views(self, uncounted: Callable[[], Container[int]]) -> list[ParamView]:
        """Returns the views of the members.

        Args:
            uncounted: returns the members that no step has updated. It may wait for the device, so it is not called
                without need: zeros are as good a buffer as none without dampening, and a graph that is being captured
                follows a step.
        """
        views = [self._views[i] for i in self.members]
        if all(view.group["dampening"] == 0 for view in views) or is_capturing(views[0].param.device):
            return []
        unknown = uncounted()
        self.members = [i for i in self.members if i in unknown]
        return [self._views[i] for i in self.members]


def structure(backbone: str, group: dict[str, Any]) -> str:
    """Returns the name of the backbone's struct in csrc/rules/backbones.h."""
    if backbone == "SGD":
        variant = "Nesterov" if group["nesterov"] else "Momentum"
        return "SgdPlain" if group["momentum"] == 0 else f"Sgd{variant}"
    variant = ("Rectify" if group.get("rectify") else "") + ("Amsgrad" if group.get("amsgrad") else "")
    return f"{backbone}{variant or 'Plain'}"


class GroupNumbers:
    """The run-time numbers of a plan's param groups, read in each step.

    Args:
        views: the views of the plan.

    Attributes:
        groups: the param groups of the views, in their order.
        resting: the ids of the groups whose lr or reference rate was 0 when last read: their parameters do not change.
    """

    def __init__(self, views: Sequence[ParamView]) -> None:
        first = {id(view.group): view for view in reversed(views)}
        self.groups = list({id(view.group): view.group for view in views}.values())
        self.resting: set[int] = set()
        self._scale_groups = [first[id(group)].scale_groups or (group,) for group in self.groups]

    def read(self, device: torch.device) -> tuple[list[float], list[Tensor | None]]:
        """Returns the numbers of all groups, and for each group its lr if it is a tensor on that GPU, else None.

        Such an lr is read on the GPU, so that the host does not wait for it.
        """
        scales: dict[int, float] = {}
        for groups in self._scale_groups:
            if id(groups) not in scales:
                scales[id(groups)] = max(map(reference_rate, groups))
        rates = [_lr_on(device, group["lr"]) for group in self.groups]
        numbers = [
            number
            for group, rate, scaled_by in zip(self.groups, rates, self._scale_groups, strict=True)
            for number in numbers_of(group, scales[id(scaled_by)], rate is not None)
        ]
        by_group = zip(self.groups, rates, strict=True)
        self.resting = {id(g) for g, rate in by_group if rate is None and not has_rate(g)}
        return numbers, rates


def _lr_on(device: torch.device, lr: Any) -> Tensor | None:
    return lr if isinstance(lr, Tensor) and device.type != "cpu" and lr.device == device else None


def rule_of(policy: Policy) -> Rule:
    """Returns a policy's arguments in the form that the kernels take."""

    def number(name: str, default: float) -> float:
        value = getattr(policy, name, default)
        return math.nan if value is None else float(value)

    lowest, highest = getattr(policy, "gain_bounds", None) or (-math.inf, math.inf)
    source = getattr(policy, "source", None)
    return Rule(
        interval=float(policy.interval or 0),
        per_tensor=float(getattr(policy, "granularity", "global") == "tensor"),
        lowest=lowest,
        highest=highest,
        increment=number("increment", math.nan),
        high=getattr(policy, "high", None) or 0.0,
        low=number("low", 1.0),
        holds=float(getattr(policy, "on_zero", "") == "hold"),
        c=number("c", 0.0),
        source=float(SOURCES.index(source)) if source else 0.0,
        eta=number("eta", math.nan),
        hyper_lr=number("hyper_lr", 0.0),
    )


def is_capturing(device: torch.device) -> bool:
    """Checks whether a CUDA graph is being captured on the current stream. ``device`` must be the current device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def dense_gradient(grad: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the gradient in its parameter's memory layout and in this dtype, with lazy values resolved."""
    if grad.stride() == param.stride() and grad.dtype == dtype and not is_lazy(grad):
        return grad
    return torch.empty_like(param, dtype=dtype).copy_(grad)


def is_lazy(tensor: Tensor) -> bool:
    """Checks whether a tensor's values differ from its memory: torch negates parts of complex numbers lazily."""
    return tensor.is_neg() or tensor._is_zerotensor()


def scalar(value: Tensor | None, device: torch.device, *others: torch.dtype) -> Tensor | None:
    """Returns ``value`` on this device, in its own dtype if that is one of ``others``, else in float32."""
    if value is None:
        return None
    return value.to(device=device, dtype=value.dtype if value.dtype in others else torch.float32)
