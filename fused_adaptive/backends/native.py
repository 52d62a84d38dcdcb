"""The native backend: C++ on the CPU, CUDA on NVIDIA GPUs. A step reads the gradients and calls a cached plan once.

The plan (``csrc/plan/plan.h``) holds the addresses of the parameters and their state. It is built when participants
are collected and lives as long as they do.
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
    Unfilled,
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
    """Returns why this backend cannot run on these devices and what to do about it; "" if it can run."""
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
    """Returns why the library has neither machine code for this GPU nor PTX that the driver compiles; "" if it has."""
    index = torch.cuda.current_device() if index is None else index
    why = _missing_code(index)
    if not why:
        return ""
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    built = library.built().get("cuda")
    return (
        f"the native library has CUDA kernels for {built}, and none that run on cuda:{index}, of compute capability "
        f"{capability} ({why}); with TORCH_CUDA_ARCH_LIST={capability} in the environment, {library.REBUILD}"
    )


@functools.cache
def _missing_code(index: int) -> str:
    return torch.ops.fused_adaptive.why_not_on_gpu(index)


def step(
    participants: Participants, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: RandomRates | None
) -> None:
    """Performs one optimizer step in place. Arguments and errors are those of :func:`reference.step`.

    On a GPU the host neither waits for the device nor reads from it.
    """
    on_host = found_inf is not None and _is_on_host(found_inf)
    if on_host:
        if bool(found_inf):
            participants.check_gradients()
            return
        found_inf = None
    plans = ready(participants, _plans, "native")
    if plans is None:
        reference.step(participants, found_inf, grad_scale, random_rates)
        return
    table = None if random_rates is None else random_rates.table_on([plan.device for plan in plans])
    for plan in plans:
        participants.keep(plan.step(found_inf, grad_scale, table))
    if random_rates is not None:
        random_rates.count(found_inf)


def end_interval(participants: Participants) -> None:
    """Ends the running interval of every policy, outside of a step."""
    _end_interval(participants, _plans)


def register_fakes() -> None:
    """Registers the fake of ``torch.ops.fused_adaptive.step`` for torch.compile. The operator returns nothing."""
    library.load()
    torch.library.register_fake("fused_adaptive::step", lambda *_, **__: None, allow_override=True)


def _plans(participants: Participants, for_step: bool) -> list[NativePlan] | None:
    """Returns one plan per device and location of the counters; None if one gain is shared by several plans."""
    if participants.plans is None:
        views_of = views_of_plans(participants, _on_device)
        if views_of is None:
            return None
        participants.plans = [NativePlan(views, participants, for_step) for views in views_of]
    return participants.plans


def _is_on_host(found_inf: Tensor) -> bool:
    """Checks whether reading ``found_inf`` does not wait for a device."""
    return found_inf.device.type == "cpu"


def _on_device(view: ParamView) -> bool:
    """Checks whether the counters of a view are on a GPU (``capturable`` or ``fused``)."""
    return view.param.device.type != "cpu" and bool(view.group.get("capturable") or view.group.get("fused"))


def _objects_of(tensors: Sequence[Tensor]) -> list[int]:
    """Returns the addresses of each tensor's TensorImpl and StorageImpl, to be prefetched; [] if torch hides them."""
    storage_of = getattr(torch._C, "_storage_address", None)
    return [] if storage_of is None else [address for t in tensors for address in (t._cdata, storage_of(t))]


#: Roles and structures by the numbers that the operators take.
ROLE_NUMBERS, STRUCTURE_NUMBERS = ({name: i for i, name in enumerate(table)} for table in (ROLES, STRUCTURES))

#: The bits of a step's return value (csrc/bindings/ops.cpp).
CAPTURED, ELSEWHERE = 1, 2


class NativePlan:
    """The native plan of one device's participants.

    Args:
        views: the device's views, with complete state.
        participants: all participants of the step.
        for_step: whether it is built for a step, which creates momentum buffers.
    """

    def __init__(self, views: Sequence[ParamView], participants: Participants, for_step: bool) -> None:
        self.device = views[0].param.device
        self._views = views
        self._params = [view.param for view in views]
        self._numbers = GroupNumbers(views)
        self._groups = self._numbers.groups
        self._backbone = views[0].backbone
        # A parameter with gaps in memory is updated in a dense copy, which is then copied back.
        self._parked = parked_members(views)
        self._dense = dense_copies(self._params, self._parked)
        pairs = enumerate(zip(self._params, self._dense, strict=True))
        self._copies = [(p, d) for i, (p, d) in pairs if p is not d and i not in self._parked]
        self._grads: list[Tensor] = []
        self._absent: list[int] = []
        self._build(participants, for_step)

    def _build(self, participants: Participants, for_step: bool) -> None:
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
        bound, first = collect_state(views, self._dense, self._backbone, self._parked, for_step)
        self._unfilled = Unfilled(views, first)
        if first:
            ops.plan_first(number, first)
        if self._parked:
            ops.plan_parked(number, list(self._parked))
        for role, members in bound.items():
            ops.plan_bind(number, ROLE_NUMBERS[role], list(members), list(members.values()))
        position = {id(view): i for i, view in enumerate(views)}
        for policy, members in participants.members.items():
            positions = [position[id(view)] for view in members if id(view) in position]
            if positions and policy.adapts and not policy.naive:
                kind = declarations.POLICIES.index(type(policy).__name__)
                ops.plan_policy(number, kind, positions, _rule_of(policy))
        self._share(number)
        ops.plan_finish(number)
        # Keeps the tensors alive whose addresses the plan holds, since it does not own them; each step checks them.
        held = [(p, *(tensors[i] for tensors in bound.values() if i in tensors)) for i, p in enumerate(self._updated())]
        self._held = [tensor for tensors in held for tensor in tensors]
        if addresses := _objects_of(self._held):
            ops.plan_prefetch_from(number, addresses)
        self._written = Written(self._params, bound.values())

    def _updated(self) -> list[Tensor]:
        """Returns the tensor that is updated of each member; for a parked member, the parameter itself."""
        return [self._params[i] if i in self._parked else dense for i, dense in enumerate(self._dense)]

    def _share(self, number: int) -> None:
        """Gives the plan a callback that sums inner products over ranks, if other ranks hold shards of parameters."""
        row_sums = RowSums([view.ranks for view in self._views], self.device)
        self._failures: list[BaseException] = []
        if not row_sums:
            return
        table = torch.zeros(len(self._views), 2, dtype=torch.float64, device=self.device)
        failures = self._failures  # a reference to self in the callback would delay freeing it

        def sum_up() -> None:
            try:
                row_sums(table)
            except BaseException as error:  # an exception cannot pass through C++
                failures.append(error)

        self._sum_up = ctypes.CFUNCTYPE(None)(sum_up)
        torch.ops.fused_adaptive.plan_share(number, table, ctypes.cast(self._sum_up, ctypes.c_void_p).value)

    def take_gradients(self, make_dense: bool = False) -> int:
        """Collects and checks this step's gradients. Changes no tensor.

        Args:
            make_dense: copies gradients whose memory layout differs from their parameters' to that layout.

        Returns:
            ``READY`` (0), ``GRADIENTS`` or ``STALE`` of :mod:`~fused_adaptive.backends.plans`.
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
                # CUDA kernels take gradients in the parameter's dtype only.
                dtype = p.grad.dtype if self.device.type == "cpu" else dense.dtype
                self._grads.append(dense_gradient(p.grad, dense, dtype))
            else:
                self._grads.append(p.grad)
        return torch.ops.fused_adaptive.plan_check.default(self._number, self._held, self._grads, self._absent)

    def holds(self) -> bool:
        """Checks whether parameters and state are still at the addresses that the plan was built with."""
        absent = list(range(len(self._params)))
        return not torch.ops.fused_adaptive.plan_check(self._number, self._held, [], absent)

    def step(self, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: Tensor | None) -> Sequence[Any]:
        """Performs the step with the gradients of ``take_gradients``.

        Returns:
            The objects that a CUDA graph which captured the step points to; () without a capture.
        """
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
        self._grads = []  # so that a gradient does not outlive its parameter's .grad
        if found_inf is None:
            self._unfilled.follow_step(self._absent)
        return self._follow(traces, random_rates, scale, inf, *lrs)

    def end_interval(self) -> Sequence[Any]:
        """Ends the running interval of every policy. Returns the same as ``step``."""
        for param, dense in self._copies:
            dense.copy_(param)
        self._written.raise_versions(range(len(self._params)))
        traces = torch.ops.fused_adaptive.plan_end_interval(self._number, self._numbers.read(self.device)[0])
        self._raise_failure()
        return self._follow(traces)

    def unfilled(self) -> list[ParamView]:
        """Returns the views whose momentum buffer the plan has created and no step has filled."""
        return self._unfilled.views(lambda: torch.ops.fused_adaptive.plan_unfilled(self._number))

    def _follow(self, traces: int, *inputs: Tensor | None) -> Sequence[Any]:
        """Records the stream for memory used on it, and returns the objects to keep (``Traces``, csrc/plan/plan.h)."""
        if traces & ELSEWHERE:
            for tensor in torch.ops.fused_adaptive.plan_memory(self._number):
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return (self, *inputs) if traces & CAPTURED else ()

    def _raise_failure(self) -> None:
        if self._failures:
            raise self._failures.pop()
