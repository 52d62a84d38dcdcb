"""A step inside of ``torch.compile``: one operator that declares what it writes, whatever backbone, policy and backend.

Dynamo calls ``Optimizer._init_group`` in Python, once a compilation, instead of tracing it: there the tensors of a step
are gathered. The compiled graph then hands them to the operator, which runs the backend on them as an ordinary step
does: the same kernels, the same bits, and interval ends decided where they always are, from counters that are tensors.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint import specs
from .gather import Gathered, by_policy
from .slot import Slot

if TYPE_CHECKING:
    from .optimizer import AdaptiveOptimizer

#: The hyperparameters that may change from step to step. Tensors are inputs of the graph, all else is compiled in.
NUMBERS = ("lr", "weight_decay", "betas", "eps", "momentum", "dampening")

_records: weakref.WeakValueDictionary[int, Traced] = weakref.WeakValueDictionary()
_keys = itertools.count(1)


class Traced:
    """What the tensors of one compiled step are. Keeps none of them, but for the aliases of the optimizer's own.

    Args:
        optimizer: whose step is being traced; its state is complete.
        gathered: its tensors.
    """

    def __init__(self, optimizer: AdaptiveOptimizer, gathered: Gathered) -> None:
        self.key = next(_keys)
        self._optimizer = weakref.ref(optimizer)
        self._backend, self._backbone = optimizer._backend, gathered.backbone
        number = {id(group): i for i, group in enumerate(gathered.groups)}
        self._groups = [{k: v for k, v in group.items() if k != "params"} for group in gathered.groups]
        self._sizes = [len(group["params"]) for group in gathered.groups]
        self._members = [
            (number[id(s.group)], s.policies, s.index, tuple(s.state), s.applies) for s in gathered.slots
        ]
        self.tensors = [
            [(s.param, list(s.state.values())) for s in gathered.slots if s.group is g] for g in gathered.groups
        ]
        self.idle = [group["idle_calls"] for group in gathered.idle]
        own = itertools.chain.from_iterable(self.tensors)
        self._addresses = [t.data_ptr() for p, state in own for t in (p, *state)]
        self._bound: Gathered | None = None
        _records[self.key] = self

    def bind(self, params: Sequence[Tensor], grads: Sequence[Tensor], state: Sequence[Tensor]) -> Gathered:
        """The tensors of the graph as those of a step. Functionalization may have made them copies of the optimizer's."""
        remaining, present = iter(state), iter(grads)
        states = [dict(zip(names, remaining, strict=False)) for *_, names, _ in self._members]
        found = [t.data_ptr() for p, s in zip(params, states, strict=True) for t in (p, *s.values())]
        bound = self._bound if found == self._addresses else None
        if bound is None:
            bound = self._gathered(params, states)
        if found == self._addresses:
            self._bound = bound
        for slot, (*_, applies) in zip(bound.slots, self._members, strict=True):
            slot.param.grad = None
            if applies:
                grad = next(present)
                if grad.dtype != slot.param.dtype:
                    slot.param.grad_dtype = None
                slot.param.grad = grad
        return bound

    def _gathered(self, params: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> Gathered:
        groups = [group | {"params": [torch.empty(0)] * n} for group, n in zip(self._groups, self._sizes, strict=True)]
        first = list(itertools.accumulate(self._sizes, initial=0))
        slots = []
        for param, own, (number, policies, index, _, _) in zip(params, states, self._members, strict=True):
            alias = groups[number]["params"][index - first[number]] = param.detach()
            slots.append(Slot(alias, own, groups[number], self._backbone, policies, index))
        return Gathered(slots, by_policy(slots), [s.param for s in slots], groups, self._backbone, [])

    def run(
        self,
        bound: Gathered,
        tensors: Sequence[Tensor],
        floats: Sequence[float],
        draw_step: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The step, with the numbers of this call."""
        remaining = {True: iter(tensors), False: iter(floats)}
        for group, traced in zip(bound.groups, self._groups, strict=True):
            for name in NUMBERS:
                if name == "betas" and name in traced:
                    group[name] = tuple(next(remaining[isinstance(b, Tensor)]) for b in traced[name])
                elif name in traced:
                    group[name] = next(remaining[isinstance(traced[name], Tensor)])
        draw = getattr(self._optimizer(), "_rate_draw", None)
        if draw is not None and draw_step is not None:
            draw = type(draw)(draw.seed, draw.relative_width, draw_step.clone())
        self._backend.step(bound, found_inf, grad_scale, draw)
        if draw is not None and draw_step is not None:
            draw_step.copy_(draw.step)
        for slot in bound.slots:
            slot.param.grad = None  # a gradient must not live longer than its parameter's


def init_group(
    optimizer: AdaptiveOptimizer, group: Any, params: list[Tensor], grads: list[Tensor], state: list[Tensor]
) -> int:
    """Fills the lists with the group's tensors that take part in the step being traced, and returns the step's key.

    Raises:
        RuntimeError: where the step would create what later steps do not.
    """
    number = next(i for i, g in enumerate(optimizer.param_groups) if g is group)
    if number == 0:
        gathered = optimizer._gathered_for_trace()
        missing = any("idle_calls" not in g for g in gathered.idle) or any(
            slot.applies and specs(gathered.backbone, slot.group).keys() - slot.state.keys() for slot in gathered.slots
        )
        if missing:
            raise RuntimeError(
                "this step would create state, which a compiled step cannot: take one step outside of torch.compile "
                "first, with a gradient for every parameter"
            )
        optimizer._traced.append(Traced(optimizer, gathered))
    record = optimizer._traced[-1]
    for param, values in record.tensors[number]:
        params.append(param)
        state.extend(values)
        if param.grad is not None:
            grads.append(param.grad)
    return record.key


def traced_step(optimizer: AdaptiveOptimizer, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """What Dynamo traces of a step: the tensors, the numbers, the norm if gradients are clipped, and one operator."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    state: list[Tensor] = []
    tensors: list[Tensor] = []
    floats: list[float] = []
    key = 0
    for group in optimizer.param_groups:
        own_params: list[Tensor] = []
        own_grads: list[Tensor] = []
        own_state: list[Tensor] = []
        key = optimizer._init_group(group, own_params, own_grads, own_state)
        params += own_params
        grads += own_grads
        state += own_state
        for name in NUMBERS:
            if name in group:
                for value in group[name] if name == "betas" else (group[name],):
                    if isinstance(value, Tensor):
                        tensors.append(value)
                    else:
                        floats.append(float(value))
    if optimizer.max_grad_norm is not None or optimizer.skip_nonfinite:
        grad_scale, found_inf = optimizer._clip(grads, grad_scale, found_inf)
    draw = optimizer._rate_draw
    draw_step = [] if draw is None else [draw.step]
    torch.ops.fused_adaptive.compiled_step(key, params, grads, state, tensors, floats, draw_step, grad_scale, found_inf)


def _compiled_step(
    key: int,
    params: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    tensors: list[Tensor],
    floats: list[float],
    draw_step: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    record = _records[key]
    bound = record.bind(params, grads, state)
    with torch.no_grad():
        record.run(bound, tensors, floats, draw_step[0] if draw_step else None, grad_scale, found_inf)


torch.library.define(
    "fused_adaptive::compiled_step",
    "(int key, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor[] tensors, float[] floats, "
    "Tensor(c!)[] draw_step, Tensor? grad_scale, Tensor? found_inf) -> ()",
)
torch.library.impl("fused_adaptive::compiled_step", "CompositeExplicitAutograd")(_compiled_step)
torch.library.register_fake("fused_adaptive::compiled_step")(lambda *_: None)
