"""What the backends that run kernels share: a plan of one device's tensors, and what kernels are told of them.

A plan holds parameters and state by address, so that a step needs the gradients alone. It is built when the tensors of
a step are collected anew, and lives as long as they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..core.backbone import Backbone
from ..core.declarations import READINESS, SOURCES, Rule, role_of
from ..core.state import state_dtype
from ..core.view import ParamView, has_rate, numbers_of, reference_rate
from ..core.warning import warn
from ..engine.checkpoint import specs
from ..policies import ActiveLR, FixedLR, Hypergradient, Policy, TrainableLR
from . import reference

if TYPE_CHECKING:
    from ..engine.participants import Participants

#: The policies that kernels know.
POLICIES = (FixedLR, ActiveLR, TrainableLR, Hypergradient)

#: What ``take_gradients`` returns.
READY, GRADIENTS, STALE = range(len(READINESS))


class AnyPlan(Protocol):
    """What a backend's plan of one device's tensors can do."""

    def take_gradients(self, make_dense: bool = False) -> int: ...

    def holds(self) -> bool: ...

    def end_interval(self) -> Sequence[Any]: ...


P = TypeVar("P", bound=AnyPlan)


def ready(
    participants: Participants, plans_of: Callable[[Participants], list[P] | None], backend: str
) -> list[P] | None:
    """The plans with this step's gradients, all of them checked. None: this is for the reference.

    Args:
        participants: of the step.
        plans_of: the backend's plans, kept in ``participants.plans``; None where it has none for these tensors.
        backend: its name, for the error.
    """
    for _ in range(2):
        own = None if participants.uses_reference else plans_of(participants)
        if own is None:
            participants.uses_reference = True
            return None
        outcomes = [plan.take_gradients() for plan in own]
        if GRADIENTS in outcomes:
            participants.check_gradients()
            outcomes = [plan.take_gradients(make_dense=True) for plan in own]
        if not any(outcomes):
            for group in (
                participants.groups if len(own) > 1 else ()
            ):  # all are read before one of the plans moves anything
                numbers_of(group, lr_on_device=isinstance(group["lr"], Tensor))
            return own
        participants.check_gradients()  # names a parameter of another shape before its state
        participants.plans = None
    raise RuntimeError(
        f"the {backend} backend cannot use these parameters, gradients or state; use backend='reference'"
    )


def end_interval(participants: Participants, plans_of: Callable[[Participants], list[P] | None]) -> None:
    """Ends the running interval of every policy, outside of a step."""
    own = None if participants.uses_reference else plans_of(participants)
    if own is not None and not all(plan.holds() for plan in own):
        participants.plans = None
        own = plans_of(participants)
    if own is None:
        reference.end_interval(participants)
        return
    for plan in own:
        participants.keep(plan.end_interval())


def views_of_plans(participants: Participants, on_device: Callable[[ParamView], bool]) -> list[list[ParamView]] | None:
    """The tensors, by device and place of their counters.

    None where a gain is shared by tensors of several plans, or two parameters share memory: kernels move all at once.
    """
    if _share_memory(participants.views):
        return None
    found: dict[Any, list[ParamView]] = {}
    for view in participants.views:
        found.setdefault((view.param.device, on_device(view)), []).append(view)
    home = {id(view): key for key, views in found.items() for view in views}
    for policy, views in participants.members.items():
        if "gain" in policy.shared_names() and len({home[id(view)] for view in views}) > 1:
            return None
    return list(found.values())


def _share_memory(views: Sequence[ParamView]) -> bool:
    """Whether two parameters lie in the same memory, as weights do that were tied by ``.data``; then warns."""
    ranges = sorted((p.data_ptr(), p.numel() * p.element_size(), view.index) for view in views for p in [view.param])
    ranges = [r for r in ranges if r[0] and r[1]]
    for (begin, size, first), (other, _, second) in pairwise(ranges):
        if begin + size > other and _is_dense(views, first) and _is_dense(views, second):
            warn(
                f"parameters {min(first, second)} and {max(first, second)} share memory (tied through .data?): the "
                "step moves one after the other on the reference backend, which is slower. Tie the modules' attributes "
                "instead, as in decoder.weight = encoder.weight, and there is one parameter"
            )
            return True
    return False


def _is_dense(views: Sequence[ParamView], index: int) -> bool:
    param = next(view.param for view in views if view.index == index)
    return param.stride() == torch.empty_like(param, device="meta").stride()


def parked_members(views: Sequence[ParamView]) -> dict[int, Tensor]:
    """The members that have no memory at present (offloaded blocks), nor a gradient that would ask for it.

    What is theirs of counts and gains goes on at interval ends. Of each, the tensor of its state that tells its shape.
    """
    parked = {}
    for i, view in enumerate(views):
        param = view.param
        shaped = [t for t in view.state.values() if isinstance(t, Tensor) and (t.dim() or param.dim() == 0)]
        freed = param.numel() > 0 and param.data_ptr() == 0
        emptied = param.numel() == 0 and any(t.numel() > 0 for t in shaped)
        if not view.applies and (freed or emptied):
            parked[i] = shaped[0] if shaped else torch.empty(0, dtype=state_dtype(param), device=param.device)
    return parked


def dense_copies(params: Sequence[Tensor], parked: Mapping[int, Tensor]) -> list[Tensor]:
    """The parameters; one with gaps or overlaps in memory gives way to a dense tensor, in which it is updated."""
    params = [parked.get(i, p) for i, p in enumerate(params)]
    strides = [torch.empty_like(p, device="meta").stride() for p in params]  # of all at once: not in memory
    dense = [p.stride() == own and not is_lazy(p) for p, own in zip(params, strides, strict=True)]
    return [p if is_dense else torch.empty_like(p) for p, is_dense in zip(params, dense, strict=True)]


def collect_state(
    views: Sequence[ParamView], dense: Sequence[Tensor], backbone: Backbone, parked: Container[int]
) -> tuple[dict[str, dict[int, Tensor]], list[int]]:
    """Of every role, its tensors by member, made and laid out as the update needs them.

    Also the members whose momentum buffer has just been made, and holds nothing yet. Those that are parked keep what
    only an update needs to themselves.

    Raises:
        RuntimeError: for a parameter or state whose memory has been freed.
    """
    bound: dict[str, dict[int, Tensor]] = {}
    first = []
    for i, (view, param) in enumerate(zip(views, dense, strict=True)):
        if i not in parked:
            _check_memory(view.param, "data", view)
        # What the group's backbone and policies name: what else is there belongs to those of before.
        named = specs(backbone, view.group, view.param.dtype)
        if "momentum_buffer" in named and "momentum_buffer" not in view.state and view.applies:
            view.state["momentum_buffer"] = torch.zeros_like(param, dtype=state_dtype(param))
            first.append(i)
        for name in named:
            if name not in view.state or (i in parked and name in ("master_low", "rounding_step")):
                continue  # a momentum buffer before the first gradient
            if i in parked and name == "interval_start":
                raise RuntimeError(
                    f"the memory of parameter {view.index} has been freed, and TrainableLR measures what it has moved "
                    "by: bring it back before the step, or use source='gradient'"
                )
            value = view.state[name]
            _check_memory(value, name, view)
            role = role_of(backbone.name, name)
            if value.shape == param.shape and value.stride() != param.stride():
                value = view.state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
            bound.setdefault(role, {})[i] = value
    return bound, first


def _check_memory(tensor: Tensor, name: str, view: ParamView) -> None:
    if tensor.numel() and tensor.data_ptr() == 0:
        raise RuntimeError(
            f"the memory of {name!r} of parameter {view.index} has been freed, its storage has no bytes: bring it back "
            "before the step"
        )


def structure(backbone: str, group: dict[str, Any]) -> str:
    """The name of the backbone's struct in csrc/rules/backbones.h."""
    if backbone == "SGD":
        variant = "Nesterov" if group["nesterov"] else "Momentum"
        return "SgdPlain" if group["momentum"] == 0 else f"Sgd{variant}"
    variant = ("Rectify" if group.get("rectify") else "") + ("Amsgrad" if group.get("amsgrad") else "")
    return f"{backbone}{variant or 'Plain'}"


class GroupNumbers:
    """The run-time numbers of a plan's param groups, read anew for each step.

    Args:
        views: the plan's.

    Attributes:
        groups: those of the views, in their order.
        resting: the ids of those that were last read without a rate, so that nothing moves.
    """

    def __init__(self, views: Sequence[ParamView]) -> None:
        first = {id(view.group): view for view in reversed(views)}
        self.groups = list({id(view.group): view.group for view in views}.values())
        self.resting: set[int] = set()
        self._scale_groups = [first[id(group)].scale_groups or (group,) for group in self.groups]

    def read(self, device: torch.device) -> tuple[list[float], list[Tensor | None]]:
        """All numbers, group by group, and of each group its lr if it is a tensor on that GPU: the host would wait."""
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
    """A policy's arguments as the kernels take them."""

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
    """Whether a CUDA graph is being captured on the device's current stream; the device is the current one."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def dense_gradient(grad: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient laid out as its parameter, in this dtype, in memory as it reads."""
    if grad.stride() == param.stride() and grad.dtype == dtype and not is_lazy(grad):
        return grad
    return torch.empty_like(param, dtype=dtype).copy_(grad)


def is_lazy(tensor: Tensor) -> bool:
    """Whether its memory does not hold its values: parts of complex numbers may be negated when they are read."""
    return tensor.is_neg() or tensor._is_zerotensor()


def scalar(value: Tensor | None, device: torch.device, *others: torch.dtype) -> Tensor | None:
    """On this device, in float32 or in one of the ``others``."""
    if value is None:
        return None
    return value.to(device=device, dtype=value.dtype if value.dtype in others else torch.float32)
