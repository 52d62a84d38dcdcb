"""Plan of the tensors of one device: launches and their order, over tables on the device.

A step uploads inputs that have changed (addresses of gradients, hyperparameters, counts that other code has set) and
launches ``prepare``, one update per bucket, and the measurements of policies. If counts are on the host, the host also
counts and leaves out launches without work.
"""

# pyright: reportArgumentType=false
# (Launches pass plain values for Triton's compile-time arguments.)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import eq
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...core.view import ParamView
from ...policies import Hypergradient, Policy, TrainableLR
from .. import plans
from ..written import Written
from .checks import check_state
from .counts import COUNTERS, HostCounts
from .interpreter import is_interpreted
from .kernels import end_active, update
from .prepare import prepare
from .reduce import finish, measure, slope
from .sizes import THREADS, Sizes, lanes_options, options, sizes_of
from .tables import SOURCES, STORED, Tables, Unit
from .uploads import Uploader

if TYPE_CHECKING:
    from ...engine.participants import Participants


def on_device(view: ParamView) -> bool:
    """Returns whether the counters of the parameter are on the GPU (``capturable`` or ``fused``)."""
    may_be = view.param.device.type != "cpu" or is_interpreted()
    return may_be and bool(view.group.get("capturable") or view.group.get("fused"))


class TritonPlan:
    """Tensors of one device and their tables.

    Args:
        views: parameters with complete state.
        participants: participants to which the views belong.
        for_step: whether it is built for a step, which creates momentum buffers.
    """

    def __init__(self, views: Sequence[ParamView], participants: Participants, for_step: bool) -> None:
        self.device = views[0].param.device
        self.on_device = on_device(views[0])
        self._views = views
        self._params = [view.param for view in views]
        self._numbers = plans.GroupNumbers(views)
        self._groups = self._numbers.groups
        self._parked = plans.parked_members(views)
        self._dense = plans.dense_copies(self._params, self._parked)
        pairs = enumerate(zip(self._params, self._dense, strict=True))
        self._copies = [(p, d) for i, (p, d) in pairs if p is not d and i not in self._parked]
        self._of_one = [i for i, p in enumerate(self._params) if p.numel() == 1]
        self._bound, first = plans.collect_state(views, self._dense, views[0].backbone, self._parked, for_step)
        self._unfilled = plans.Unfilled(views, first)
        check_state(self._bound, views, self._dense, self._parked, self.on_device)
        position = {id(view): i for i, view in enumerate(views)}
        parted = {
            policy: [position[id(s)] for s in members if id(s) in position]
            for policy, members in participants.members.items()
        }
        self._members: dict[Policy, list[int]] = {policy: own for policy, own in parted.items() if own}
        # The tables are valid as long as these addresses do not change. Counts on the host have no address in a table.
        states = [
            t for role, own in self._bound.items() if role not in COUNTERS or self.on_device for t in own.values()
        ]
        self._watched = [*self._dense, *self._params, *states]
        self._addresses = [t.data_ptr() for t in self._watched]
        self._forms = _forms(self._dense)
        self._sizes: dict[torch.dtype, Sizes] = {p.dtype: sizes_of(p.dtype, self.device) for p in self._dense}
        some = next(iter(self._sizes.values()))
        self._lanes_of = partial(lanes_options, some.is_cuda, some.tail // some.warps)
        self._lanes = self._lanes_of()
        self._counts = HostCounts(self._bound, self._members)
        self._grads: list[Tensor | None] = []
        self._pointers: list[int] = []
        self._tables: Tables | None = None
        self._couples: list[bool] = []
        self._uploader = Uploader(self.device)
        # Device copies of counts on the host. They are kept when the tables are rebuilt.
        self._mirrors = torch.zeros(len(views) * len(COUNTERS), dtype=torch.int64, device=self.device)
        self._has_mirrors = False
        self._streams: list[int] = []  # streams that have used the tables
        self._written = Written(self._params, self._bound.values())

    def holds(self) -> bool:
        """Returns whether parameters and state have the addresses and layouts that they had when the plan was built."""
        return [t.data_ptr() for t in self._watched] == self._addresses and _forms(self._dense) == self._forms

    def take_gradients(self, make_dense: bool = False) -> int:
        """Collects and checks the gradients of this step. Returns plans.READY if the step can be taken.

        It does not change parameters or state.

        Args:
            make_dense: whether gradients with another layout or dtype than their parameters are copied.
        """
        if not self.holds():
            return plans.STALE
        self._grads = [p.grad for p in self._params]
        if make_dense or self._copies:
            self._grads = [
                None if g is None else plans.dense_gradient(g, d, d.dtype)
                for g, d in zip(self._grads, self._dense, strict=True)
            ]
        present = [g for g in self._grads if g is not None]
        forms = self._forms
        if len(present) != len(self._grads):
            forms = [f for f, g in zip(forms, self._grads, strict=True) if g is not None]
        if any(g.layout != torch.strided for g in present) or _forms(present) != forms:
            return plans.GRADIENTS
        # Lazy tensors with more than one element are views of complex tensors, so they are not dense.
        if any(plans.is_lazy(g) for i in self._of_one if (g := self._grads[i]) is not None):
            return plans.GRADIENTS
        # An empty gradient has no address, but 0 means that there is no gradient.
        self._pointers = [0 if g is None else g.data_ptr() or 16 for g in self._grads]
        if any(map(eq, self._pointers, self._addresses)):  # the first addresses are those of the parameters
            for view, pointer, address in zip(self._views, self._pointers, self._addresses, strict=False):
                if pointer == address != 0:
                    raise RuntimeError(
                        f"the gradient of parameter {view.index} is the parameter itself: it would be overwritten "
                        "while it is read; clone it"
                    )
        if self._views[0].backbone.name == "SGD":  # a momentum buffer must be in the tables before its first update
            for i, pointer in enumerate(self._pointers):
                if pointer and self._views[i].group["momentum"] != 0 and i not in self._bound.get("state0", {}):
                    return plans.STALE
        return plans.READY

    def step(self, found_inf: Tensor | None, grad_scale: Tensor | None, random_rates: Tensor | None) -> Sequence[Any]:
        """Takes a step with the collected gradients. Returns the objects to which a CUDA graph points if capturing."""
        if found_inf is not None and not self.on_device:
            raise RuntimeError("found_inf on the device needs counters on the device: use fused=True")
        for param, dense in self._copies:
            dense.copy_(param)
        moved = [i for i, pointer in enumerate(self._pointers) if pointer]
        absent = [i for i, pointer in enumerate(self._pointers) if not pointer]
        with _launching(self.device):
            tables = self._begin()
            inputs = self._prepare(tables, found_inf, grad_scale, random_rates)
            ending = self._ending(tables)
            for unit in tables.units:
                if _measures_before(unit.policy) and ending[unit.policy]:
                    self._measure(tables, unit)
            for kind, chunks in tables.buckets:
                sizes = self._sizes[kind.dtype]
                update[(len(chunks),)](
                    chunks,
                    tables.tensors,
                    tables.scalars,
                    tables.flags,
                    self._uploader.grads,
                    **kind.constants(),
                    BLOCK=sizes.block,
                    TAIL=sizes.tail,
                    **options(sizes, arrays=kind.arrays),
                )
            for unit in tables.units:
                if not _measures_before(unit.policy) and ending[unit.policy]:
                    self._measure(tables, unit)
        if found_inf is None:
            self._unfilled.follow_step(absent)
        if not self.on_device:
            for i in self._bound.get("mu_product", {}).keys() & set(moved):
                view = self._views[i]
                view.state["mu_product"] *= view.backbone.momentum(view.state["step"].item() + 1, view.group)
            resting = [i for i in moved if id(self._views[i].group) in self._numbers.resting]
            self._counts.step(ending, moved, resting)
        for param, dense in self._copies:
            param.copy_(dense)
        self._grads = []  # the plan must not keep gradients alive between steps
        self._written.raise_versions(absent)
        return self._captured(inputs)

    def unfilled(self) -> list[ParamView]:
        """Returns the views whose momentum buffer the plan has created and no step has filled."""
        return self._unfilled.views(self._uncounted)

    def _uncounted(self) -> list[int]:
        counts = self._mirrors.view(torch.float64).view(len(self._views), -1)[:, COUNTERS.index("step")]
        return (counts == 0).nonzero().flatten().tolist()

    def end_interval(self) -> Sequence[Any]:
        """Ends the running interval of every policy. Returns the same as ``step``."""
        for param, dense in self._copies:
            dense.copy_(param)
        with _launching(self.device):
            tables = self._begin()
            inputs = self._prepare(tables, None, None, None, now=True)
            for kind, chunks in tables.buckets:
                if kind.scales:
                    sizes = self._sizes[kind.dtype]
                    end_active[(len(chunks),)](
                        chunks,
                        tables.tensors,
                        tables.scalars,
                        tables.flags,
                        TYPE=STORED[kind.dtype][1],
                        BLOCK=sizes.tail,
                        **options(sizes),
                    )
            for unit in tables.units:
                if isinstance(unit.policy, TrainableLR):
                    self._measure(tables, unit)
        if not self.on_device:
            self._counts.restart(self._members)
        self._written.raise_versions(range(len(self._params)))
        return self._captured(inputs)

    def _captured(self, inputs: Sequence[Any]) -> Sequence[Any]:
        return (self, self._tables, *self._uploader.memory(), *inputs) if self._capturing else ()

    # ---- uploads ----

    def _begin(self) -> Tables:
        """Returns the tables after uploading gradients, hyperparameters and counts that differ from the host's."""
        capturing = self._capturing = plans.is_capturing(self.device)
        if capturing and not self.on_device:
            raise RuntimeError(
                "this optimizer counts on the host and cannot be captured in a CUDA graph: construct it with "
                "capturable=True"
            )
        couples = [not g["decoupled_weight_decay"] and float(g["weight_decay"]) != 0 for g in self._groups]
        if self._tables is None or couples != self._couples:
            if capturing:
                raise RuntimeError(
                    "parameters, state, their number or whether there is weight decay have changed, and the tables "
                    "cannot be rebuilt while a CUDA graph is being captured: take one step before the capture"
                )
            by_group = {id(group): one for group, one in zip(self._groups, couples, strict=True)}
            own = [by_group[id(view.group)] for view in self._views]
            chunk_size = {dtype: sizes.chunk for dtype, sizes in self._sizes.items()}
            self._tables = Tables(
                self._views, self._dense, self._bound, self._members, own, self._mirrors, self.on_device, chunk_size
            )
            self._uploader.resize(len(self._views), len(self._groups))
            self._couples, self._streams = couples, []
        self._note_stream(self._tables)
        self._uploader.send(self._pointers or [0] * len(self._views), self._numbers, capturing)
        if not self._has_mirrors or (not self.on_device and self._counts.have_changed()):
            rows = self._counts.rows(self._unfilled.members, len(self._views), self.on_device)
            self._uploader.copy(rows, self._mirrors)
            self._counts.remember()
            self._has_mirrors = True
        return self._tables

    def _note_stream(self, tables: Tables) -> None:
        """Registers the current stream with torch's allocator, which only knows the stream of each allocation."""
        stream = None if self.device.type != "cuda" else torch.cuda.current_stream()
        if stream is None or stream.cuda_stream in self._streams:
            return
        self._streams.append(stream.cuda_stream)
        for tensor in (self._mirrors, *tables.memory(), *self._uploader.memory()):
            if tensor.device.type == "cuda":
                tensor.record_stream(stream)

    # ---- launches ----

    def _prepare(
        self,
        tables: Tables,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        random_rates: Tensor | None,
        now: bool = False,
    ) -> tuple[Tensor, ...]:
        scale, inf = plans.scalar(grad_scale, self.device, torch.float64), plans.scalar(found_inf, self.device)
        inputs = (
            self._mirrors if random_rates is None else random_rates.to(self.device),
            tables.single_one if scale is None else scale,
            tables.single_zero if inf is None else inf,
        )
        prepare[(-(-len(self._views) // THREADS),)](
            tables.tensors,
            len(self._views),
            self._uploader.grads,
            self._uploader.hypers,
            tables.rules,
            *inputs,
            tables.scalars,
            tables.flags,
            RANDOM_RATES=random_rates is not None,
            NOW=now,
            BLOCK=THREADS,
            **self._lanes,
        )
        return inputs

    def _measure(self, tables: Tables, unit: Unit) -> None:
        """Measures the inner products of a policy and adapts its gains."""
        for launch in unit.measurements:
            stored, computed = STORED[launch.dtype]
            lanes = self._lanes_of(launch.dtype.itemsize)
            common = (launch.chunks, tables.tensors, tables.scalars, tables.flags, self._uploader.grads)
            partials = tables.partials[2 * launch.first_partial :]
            grid = (len(launch.chunks),)
            if isinstance(unit.policy, Hypergradient):
                structure = launch.structure
                slope[grid](
                    *common,
                    partials,
                    DIRECTION=structure.direction,
                    STATES=structure.states if structure.direction is not None else 0,
                    STORED=stored,
                    TYPE=computed,
                    **lanes,
                )
            else:
                source = SOURCES[_source(unit.policy)]
                measure[grid](*common, partials, SOURCE_OF=source.value, STORED=stored, TYPE=computed, **lanes)
        finish[(1,)](
            tables.tensors,
            tables.scalars,
            tables.flags,
            unit.rule,
            tables.partials,
            unit.groups,
            len(unit.groups),
            tables.group_sums,
            unit.shares,
            len(unit.shares),
            tables.outcomes,
            BLOCK=THREADS,
            **self._lanes,
        )

    def _ending(self, tables: Tables) -> dict[Policy, bool]:
        """Returns for each policy whether this step may end its interval. Counters on the device are not read."""
        ending = {}
        for policy in tables.policies:
            if isinstance(policy, Hypergradient):
                ending[policy] = True
            elif policy.interval is None:
                ending[policy] = False
            elif self.on_device:
                ending[policy] = True
            else:
                ending[policy] = policy.ends([self._views[self._members[policy][0]]])
        return ending


def _forms(tensors: Sequence[Tensor]) -> list[Any]:
    return [(t.dtype, t.size(), t.stride()) for t in tensors]


def _source(policy: Policy) -> str:
    source = policy.source if isinstance(policy, TrainableLR) else None
    assert source is not None
    return source


def _measures_before(policy: Policy) -> bool:
    return isinstance(policy, Hypergradient) or _source(policy) == "gradient"


@contextmanager
def _launching(device: torch.device) -> Iterator[None]:
    """Makes the device current. In the interpreter, NumPy's warnings on arithmetic are off, as a GPU gives none."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), np.errstate(all="ignore"):
        yield
