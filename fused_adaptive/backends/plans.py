"""What the backends that run kernels share: a plan of one device's tensors, and what kernels are told of them.

A plan holds parameters and state by address, so that a step needs the gradients alone. It is built when the tensors of
a step are gathered anew, and lives as long as they do.
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
from ..core.view import Slot, has_rate, numbers_of, reference_rate
from ..core.warning import warn
from ..engine.checkpoint import specs
from ..policies import ActiveLR, FixedLR, Hypergradient, Policy, TrainableLR
from . import reference

if TYPE_CHECKING:
    from ..engine.views import Gathered

#: The policies that kernels know.
POLICIES = (FixedLR, ActiveLR, TrainableLR, Hypergradient)

#: What ``take_gradients`` returns.
READY, GRADIENTS, STALE = range(len(READINESS))


class AnyPlan(Protocol):
    """What a backend's plan of one device's tensors can do."""

    def take_gradients(self, conform: bool = False) -> int: ...

    def holds(self) -> bool: ...

    def end_interval(self) -> Sequence[Any]: ...


P = TypeVar("P", bound=AnyPlan)


def ready(gathered: Gathered, plans_of: Callable[[Gathered], list[P] | None], backend: str) -> list[P] | None:
    """The plans with this step's gradients, all of them checked. None: this is for the reference.

    Args:
        gathered: of the step.
        plans_of: the backend's plans, kept in ``gathered.compiled``; None where it has none for these tensors.
        backend: its name, for the error.
    """
    for _ in range(2):
        own = None if gathered.uses_reference else plans_of(gathered)
        if own is None:
            gathered.uses_reference = True
            return None
        outcomes = [plan.take_gradients() for plan in own]
        if GRADIENTS in outcomes:
            gathered.check_gradients()
            outcomes = [plan.take_gradients(conform=True) for plan in own]
        if not any(outcomes):
            for group in gathered.groups if len(own) > 1 else ():  # all are read before one of the plans moves anything
                numbers_of(group, lr_on_device=isinstance(group["lr"], Tensor))
            return own
        gathered.check_gradients()  # a parameter that was replaced by one of another shape is named before its state
        gathered.compiled = None
    raise RuntimeError(
        f"the {backend} backend cannot use these parameters, gradients or state; use backend='reference'"
    )


def end_interval(gathered: Gathered, plans_of: Callable[[Gathered], list[P] | None]) -> None:
    """Ends the running interval of every policy, outside of a step."""
    own = None if gathered.uses_reference else plans_of(gathered)
    if own is not None and not all(plan.holds() for plan in own):
        gathered.compiled = None
        own = plans_of(gathered)
    if own is None:
        reference.end_interval(gathered)
        return
    for plan in own:
        gathered.keep(plan.end_interval())


def parts(gathered: Gathered, on_device: Callable[[Slot], bool]) -> list[list[Slot]] | None:
    """The tensors, by device and place of their counters.

    None where a gain is shared by tensors of several parts, or two parameters share memory: kernels move all at once.
    """
    if _share_memory(gathered.slots):
        return None
    found: dict[Any, list[Slot]] = {}
    for slot in gathered.slots:
        found.setdefault((slot.param.device, on_device(slot)), []).append(slot)
    home = {id(slot): key for key, slots in found.items() for slot in slots}
    for policy, slots in gathered.members.items():
        if "gain" in policy.shared_names() and len({home[id(slot)] for slot in slots}) > 1:
            return None
    return list(found.values())


def _share_memory(slots: Sequence[Slot]) -> bool:
    """Whether two parameters lie in the same memory, as weights do that were tied by ``.data``; then warns."""
    ranges = sorted((p.data_ptr(), p.numel() * p.element_size(), slot.index) for slot in slots for p in [slot.param])
    ranges = [r for r in ranges if r[0] and r[1]]
    for (begin, size, first), (other, _, second) in pairwise(ranges):
        if begin + size > other and _is_dense(slots, first) and _is_dense(slots, second):
            warn(
                f"parameters {min(first, second)} and {max(first, second)} share memory (tied through .data?): the "
                "step moves one after the other on the reference backend, which is slower. Tie the modules' attributes "
                "instead, as in decoder.weight = encoder.weight, and there is one parameter"
            )
            return True
    return False


def _is_dense(slots: Sequence[Slot], index: int) -> bool:
    param = next(slot.param for slot in slots if slot.index == index)
    return param.stride() == torch.empty_like(param, device="meta").stride()


def parked_members(slots: Sequence[Slot]) -> dict[int, Tensor]:
    """The members that have no memory at present (offloaded blocks), nor a gradient that would ask for it.

    What is theirs of counts and gains goes on at interval ends. Of each, the tensor of its state that tells its shape.
    """
    parked = {}
    for i, slot in enumerate(slots):
        param = slot.param
        shaped = [t for t in slot.state.values() if isinstance(t, Tensor) and (t.dim() or param.dim() == 0)]
        freed = param.numel() > 0 and param.data_ptr() == 0
        emptied = param.numel() == 0 and any(t.numel() > 0 for t in shaped)
        if not slot.applies and (freed or emptied):
            parked[i] = shaped[0] if shaped else torch.empty(0, dtype=state_dtype(param), device=param.device)
    return parked


def dense_copies(params: Sequence[Tensor], parked: Mapping[int, Tensor]) -> list[Tensor]:
    """The parameters; one with gaps or overlaps in memory gives way to a dense tensor, in which it is updated."""
    params = [parked.get(i, p) for i, p in enumerate(params)]
    strides = [torch.empty_like(p, device="meta").stride() for p in params]  # of all at once: not in memory
    dense = [p.stride() == own and not is_lazy(p) for p, own in zip(params, strides, strict=True)]
    return [p if is_dense else torch.empty_like(p) for p, is_dense in zip(params, dense, strict=True)]


def gather_state(
    slots: Sequence[Slot], dense: Sequence[Tensor], backbone: Backbone, parked: Container[int]
) -> tuple[dict[str, dict[int, Tensor]], list[int]]:
    """Of every role, its tensors by member, made and laid out as the update needs them.

    Also the members whose momentum buffer has just been made, and holds nothing yet. Those that are parked keep what
    only an update needs to themselves.

    Raises:
        RuntimeError: for a parameter or state whose memory has been freed.
    """
    bound: dict[str, dict[int, Tensor]] = {}
    first = []
    for i, (slot, param) in enumerate(zip(slots, dense, strict=True)):
        if i not in parked:
            _check_memory(slot.param, "data", slot)
        # What the group's backbone and policies name: what else is there belongs to those of before.
        named = specs(backbone, slot.group, slot.param.dtype)
        if "momentum_buffer" in named and "momentum_buffer" not in slot.state and slot.applies:
            slot.state["momentum_buffer"] = torch.zeros_like(param, dtype=state_dtype(param))
            first.append(i)
        for name in named:
            if name not in slot.state or (i in parked and name in ("master_low", "rounding_step")):
                continue  # a momentum buffer before the first gradient
            if i in parked and name == "interval_start":
                raise RuntimeError(
                    f"the memory of parameter {slot.index} has been freed, and TrainableLR measures what it has moved "
                    "by: bring it back before the step, or use source='gradient'"
                )
            value = slot.state[name]
            _check_memory(value, name, slot)
            role = role_of(backbone.name, name)
            if value.shape == param.shape and value.stride() != param.stride():
                value = slot.state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
            bound.setdefault(role, {})[i] = value
    return bound, first


def _check_memory(tensor: Tensor, name: str, slot: Slot) -> None:
    if tensor.numel() and tensor.data_ptr() == 0:
        raise RuntimeError(
            f"the memory of {name!r} of parameter {slot.index} has been freed, its storage has no bytes: bring it back "
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
        slots: the plan's.

    Attributes:
        groups: those of the slots, in their order.
        resting: the ids of those that were last read without a rate, so that nothing moves.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        first = {id(slot.group): slot for slot in reversed(slots)}
        self.groups = list({id(slot.group): slot.group for slot in slots}.values())
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


def conform(grad: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
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
