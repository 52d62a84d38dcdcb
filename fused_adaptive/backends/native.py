"""The native backend: C++ on the CPU, CUDA on NVIDIA GPUs. A step reads the gradients and calls a cached plan once.

The plan (``csrc/plan/plan.h``) holds the parameters and their state by address. It is built when the tensors of a step
are collected anew, and lives as long as they do.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core import declarations, library, python_calls
from ..core.declarations import ROLES, STRUCTURES
from ..core.ranks import RowSums
from ..core.view import ParamView
from . import reference
from .plans import (
    POLICIES,
    GroupNumbers,
    collect_state,
    dense_copies,
    dense_gradient,
    parked_members,
    ready,
    views_of_plans,
)
from .plans import end_interval as _end_interval
from .plans import rule_of as _rule_of
from .plans import scalar as _scalar
from .plans import structure as _structure
from .written import Written

if TYPE_CHECKING:
    from ..core.random_rates import RandomRates
    from ..engine.participants import Participants

name = "native"
supports_masters = True
policies = POLICIES


def why_not(devices: Iterable[torch.device]) -> str:
    """Why this backend cannot run on these devices, and what to do; "" if it can."""
    reason = library.why_not()
    if reason:
        return reason
    for device in devices:
        if device.type == "cuda" and not library.has_cuda():
            left_out = library.built().get("left_out", {}).get("cuda", "it was built for the CPU only")
            return f"the native library has no CUDA kernels: {left_out}; then {library.REBUILD}"
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and torch.version.hip):
            return f"there are native kernels for the CPU and for NVIDIA GPUs, not for {device.type}"
        if device.type == "cuda" and (reason := _why_not_on(device.index)):
            return reason
    return ""


def _why_not_on(index: int | None) -> str:
    """Why the library has no machine code for this GPU, nor PTX that its driver compiles; "" if it has."""
    index = torch.cuda.current_device() if index is None else index
    why = _missing_code(index)
    if not why:
        return ""
    own = ".".join(map(str, torch.cuda.get_device_capability(index)))
    built = library.built().get("cuda")
    return (
        f"the native library has CUDA kernels for {built}, and none that run on cuda:{index}, of compute capability "
        f"{own} ({why}); with TORCH_CUDA_ARCH_LIST={own} in the environment, {library.REBUILD}"
    )


@functools.cache
def _missing_code(index: int) -> str:
    return torch.ops.fused_adaptive.why_not_on_gpu(index)


def step(
    participants: Participants, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: RandomRates | None
) -> None:
    """One optimizer step, in place. Arguments and errors are those of :func:`reference.step`.

    On a GPU the host neither waits for the device nor reads from it.
    """
    on_host = found_inf is not None and _is_on_host(found_inf)
    if on_host and bool(found_inf):
        participants.check_gradients()
        return
    plans = ready(participants, _plans, "native")
    if plans is None:
        reference.step(participants, found_inf, grad_scale, random_rates)
        return
    table = None if random_rates is None else random_rates.table_on([plan.device for plan in plans])
    for plan in plans:
        participants.keep(plan.step(found_inf, grad_scale, table))
    if random_rates is not None:
        random_rates.count(None if on_host else found_inf)


def end_interval(participants: Participants) -> None:
    """Ends the running interval of every policy, outside of a step."""
    _end_interval(participants, _plans)


def register_fakes() -> None:
    """Tells torch.compile that ``torch.ops.fused_adaptive.step`` writes what its schema says and returns nothing."""
    library.load()
    torch.library.register_fake("fused_adaptive::step", lambda *_, **__: None, allow_override=True)


def _plans(participants: Participants) -> list[Plan] | None:
    """One plan a device and place of the counters. None where a gain is shared by tensors of several plans."""
    if participants.plans is None:
        views_of = views_of_plans(participants, _on_device)
        if views_of is None:
            return None
        participants.plans = [Plan(views, participants) for views in views_of]
    return participants.plans


def _is_on_host(found_inf: Tensor) -> bool:
    """Whether reading it waits for nothing."""
    return found_inf.device.type == "cpu"


def _on_device(view: ParamView) -> bool:
    """Whether its counters are on a GPU (``capturable`` or ``fused``)."""
    return view.param.device.type != "cpu" and bool(view.group.get("capturable") or view.group.get("fused"))


#: The numbers of what operators take by number.
ROLE_NUMBERS, STRUCTURE_NUMBERS = ({name: i for i, name in enumerate(table)} for table in (ROLES, STRUCTURES))

#: The bits of what a step returns (csrc/bindings/ops.cpp).
CAPTURED, ELSEWHERE = 1, 2


class Plan:
    """The tensors of one device, with the native plan over them.

    Args:
        views: parameters whose state is complete.
        participants: what they are a part of.
    """

    def __init__(self, views: Sequence[ParamView], participants: Participants) -> None:
        self.device = views[0].param.device
        self._views = views
        self._params = [view.param for view in views]
        self._numbers = GroupNumbers(views)
        self._groups = self._numbers.groups
        self._backbone = views[0].backbone
        # A parameter with gaps or overlaps in memory is updated in a dense copy.
        self._parked = parked_members(views)
        self._dense = dense_copies(self._params, self._parked)
        pairs = enumerate(zip(self._params, self._dense, strict=True))
        self._copies = [(p, d) for i, (p, d) in pairs if p is not d and i not in self._parked]
        self._grads: list[Tensor] = []
        self._absent: list[int] = []
        self._build(participants)

    def _build(self, participants: Participants) -> None:
        ops, views = torch.ops.fused_adaptive, self._views
        group_numbers = {id(group): i for i, group in enumerate(self._groups)}
        number = self._number = ops.plan_new(
            self._dense,
            [group_numbers[id(view.group)] for view in views],
            [view.index for view in views],
            [STRUCTURE_NUMBERS[_structure(self._backbone.name, group)] for group in self._groups],
            [not group["decoupled_weight_decay"] for group in self._groups],
            [bool(group["maximize"]) for group in self._groups],
            _on_device(views[0]),
        )
        weakref.finalize(self, ops.plan_free, number)
        ops.plan_seeds(number, [group.get("rounding_seed", 0) for group in self._groups])
        bound, first = collect_state(views, self._dense, self._backbone, self._parked)
        if first:
            ops.plan_first(number, first)
        if self._parked:
            ops.plan_parked(number, list(self._parked))
        for role, members in bound.items():
            ops.plan_bind(number, ROLE_NUMBERS[role], list(members), list(members.values()))
        position = {id(view): i for i, view in enumerate(views)}
        for policy, members in participants.members.items():
            own = [position[id(view)] for view in members if id(view) in position]
            if own and policy.adapts and not policy.naive:
                kind = declarations.POLICIES.index(type(policy).__name__)
                ops.plan_policy(number, kind, own, _rule_of(policy))
        self._share(number)
        ops.plan_finish(number)
        # What the plan has addresses of, and asks for at every step: it owns none of it.
        own = [(p, *(tensors[i] for tensors in bound.values() if i in tensors)) for i, p in enumerate(self._asked())]
        self._held = [tensor for tensors in own for tensor in tensors]
        self._written = Written(self._params, bound.values())

    def _asked(self) -> list[Tensor]:
        """Of each member the tensor that is updated; of one that is parked, the parameter without memory."""
        return [self._params[i] if i in self._parked else dense for i, dense in enumerate(self._dense)]

    def _share(self, number: int) -> None:
        """Where other ranks hold parts of these parameters, the plan calls back for sums of inner products."""
        row_sums = RowSums([view.ranks for view in self._views], self.device)
        self._failures: list[BaseException] = []
        if not row_sums:
            return
        table = torch.zeros(len(self._views), 2, dtype=torch.float64, device=self.device)
        failures = self._failures  # no reference to self, which would free it late

        def sum_up() -> None:
            try:
                row_sums(table)
            except BaseException as error:  # it cannot pass through C++
                failures.append(error)

        self._sum_up = ctypes.CFUNCTYPE(None)(sum_up)
        torch.ops.fused_adaptive.plan_share(number, table, ctypes.cast(self._sum_up, ctypes.c_void_p).value)

    def take_gradients(self, make_dense: bool = False) -> int:
        """Collects this step's gradients and checks them; 0 if the step can be taken. Changes nothing.

        Args:
            make_dense: gives those that are laid out otherwise than their parameters a copy that is not.
        """
        self._grads, self._absent = [], []
        read = None if make_dense or self._copies else python_calls.gradients_reader()
        outcome = -1 if read is None else read(self._number, self._held, self._grads)
        if outcome >= 0:
            if outcome >= 4:
                self._absent = [i for i, p in enumerate(self._params) if p.grad is None]
            return outcome % 4
        self._grads = []
        for i, (p, dense) in enumerate(zip(self._params, self._dense, strict=True)):
            if p.grad is None:
                self._absent.append(i)
            elif make_dense or self._copies:
                # On a GPU also in its parameter's dtype.
                dtype = p.grad.dtype if self.device.type == "cpu" else dense.dtype
                self._grads.append(dense_gradient(p.grad, dense, dtype))
            else:
                self._grads.append(p.grad)
        return torch.ops.fused_adaptive.plan_check.default(self._number, self._held, self._grads, self._absent)

    def holds(self) -> bool:
        """Whether parameters and state are where they were when the plan was built."""
        absent = list(range(len(self._params)))
        return not torch.ops.fused_adaptive.plan_check(self._number, self._held, [], absent)

    def step(self, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: Tensor | None) -> Sequence[Any]:
        """The step with the gradients that were taken. Returns what a CUDA graph points to that it was captured in."""
        self._written.raise_versions(self._absent)
        for param, dense in self._copies:
            dense.copy_(param)
        numbers, rates = self._numbers.read(self.device)
        on_device = [i for i, rate in enumerate(rates) if rate is not None]
        lrs = [_scalar(rates[i], self.device, torch.float64) for i in on_device]
        random_rates = None if random_rates is None else random_rates.to(self.device)
        scale, inf = _scalar(grad_scale, self.device, torch.float64), _scalar(found_inf, self.device)
        traces = torch.ops.fused_adaptive.plan_step.default(
            self._number, numbers, random_rates, scale, inf, lrs, on_device
        )
        self._raise_failure()
        for param, dense in self._copies:
            param.copy_(dense)
        self._grads = []  # a gradient must not live longer than its parameter's .grad
        return self._follow(traces, random_rates, scale, inf, *lrs)

    def end_interval(self) -> Sequence[Any]:
        """Ends the running interval of every policy. Returns what ``step`` does."""
        for param, dense in self._copies:
            dense.copy_(param)
        self._written.raise_versions(range(len(self._params)))
        traces = torch.ops.fused_adaptive.plan_end_interval(self._number, self._numbers.read(self.device)[0])
        self._raise_failure()
        return self._follow(traces)

    def _follow(self, traces: int, *inputs: Tensor | None) -> Sequence[Any]:
        """What follows for memory from where the kernels were launched, see ``Traces`` in csrc/plan/plan.h."""
        if traces & ELSEWHERE:
            for tensor in torch.ops.fused_adaptive.plan_memory(self._number):
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return (self, *inputs) if traces & CAPTURED else ()

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures.pop()
