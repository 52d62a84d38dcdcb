"""A step inside of ``torch.compile``: one operator that declares what it writes.

It serves all backbones, policies and backends. Dynamo traces only which tensors and numbers there are. The compiled
graph passes them to the operator, which runs the backend on them as an ordinary step does: with the same kernels and
the same bits. The ends of intervals depend on the same counters, which are tensors.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import reference_rates
from .clipping import clip
from .handles import Handled, unwrap
from .membership import by_policy, count_idle_calls
from .participants import Groups, Participants

#: Hyperparameters that may change from step to step. Tensors are inputs of the graph; other values are constants.
NUMBERS = ("lr", "weight_decay", "betas", "eps", "momentum", "dampening", "momentum_decay")

NO_STATE = (
    "this step would create state, which a compiled step cannot: take one step outside of torch.compile first, with a "
    "gradient for every parameter"
)

NAIVE = "TrainableLR(naive=True) evaluates the loss twice, which torch.compile cannot trace: leave step() out of it"

#: Last participants of each optimizer, by the key that compiled code passes.
_participants: weakref.WeakValueDictionary[int, Participants] = weakref.WeakValueDictionary()


def announce(optimizer: Handled, participants: Participants) -> None:
    """Makes the optimizer's participants available to compiled code."""
    participants.owner = weakref.ref(unwrap(optimizer))
    _participants[participants.key] = participants
    optimizer._traced = [Attributes(group) for group in participants.groups]
    optimizer._traced_idle = [Attributes(group) for group in participants.idle]


class Attributes:
    """Param group whose entries are attributes.

    Of an object, Dynamo guards only the attributes that are read. Of a dict it guards every entry, and from Python 3.12
    on it crashes the process if an entry that was a dict, such as a policy, has become something else.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self.__dict__ = group

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)


class Bound:
    """Tensors that a compiled graph passes, as the participants of a step.

    Args:
        participants: the optimizer's participants.
        params, state: tensors of the graph: those of the participants, or copies that functionalization has made.
    """

    def __init__(self, participants: Participants, params: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        self.of = participants
        # New dicts, since numbers are those of the call. Empty tensors keep the positions of parameters without state.
        groups = [g | {"params": [torch.empty(0) for _ in g["params"]]} for g in participants.groups]
        group_index = {id(group): i for i, group in enumerate(participants.groups)}
        first_index = list(itertools.accumulate((len(g["params"]) for g in groups), initial=0))
        remaining, views = iter(state), []
        for view, param in zip(participants.views, params, strict=True):
            i = group_index[id(view.group)]
            alias = groups[i]["params"][view.index - first_index[i]] = param.detach()
            values = dict(zip(view.state, remaining, strict=False))
            scale_groups = tuple(groups[group_index[id(g)]] for g in view.scale_groups)
            views.append(replace(view, param=alias, state=values, group=groups[i], scale_groups=scale_groups))
        self.participants = Participants(
            views, by_policy(views), [s.param for s in views], groups, participants.backbone, idle=[]
        )
        self.participants.captured = participants.captured

    def set_gradients(self, grads: Sequence[Tensor], applies: Sequence[bool]) -> None:
        present = iter(grads)
        for view, has_grad in zip(self.participants.views, applies, strict=True):
            grad = next(present) if has_grad else None
            if grad is not None and grad.dtype != view.param.dtype:
                view.param.grad_dtype = None
            view.param.grad = grad

    def set_numbers(self, tensors: Sequence[Tensor], floats: Sequence[float]) -> None:
        """Sets the numbers of the groups in this step.

        Raises:
            RuntimeError: if groups shared a tensor when the step was compiled and do not any more. torch.compile passes
                one tensor in place of both then.
        """
        remaining = {True: iter(tensors), False: iter(floats)}
        for group, original in zip(self.participants.groups, self.of.groups, strict=True):
            for name in NUMBERS:
                if name == "betas" and name in original:
                    group[name] = tuple(next(remaining[isinstance(beta, Tensor)]) for beta in original[name])
                elif name in original:
                    group[name] = next(remaining[isinstance(original[name], Tensor)])
        self._check_shared()
        reference_rates.follow(self.participants.groups)
        for group, original in zip(self.participants.groups, self.of.groups, strict=True):
            if "lr_ref" in original:
                original["lr_ref"] = group["lr_ref"] = max(original["lr_ref"], group["lr_ref"])

    def _check_shared(self) -> None:
        originals: dict[int, Any] = {}
        for group, original in zip(self.participants.groups, self.of.groups, strict=True):
            for name in NUMBERS:
                passed = group.get(name)
                if (
                    isinstance(passed, Tensor)
                    and originals.setdefault(id(passed), original[name]) is not original[name]
                ):
                    raise RuntimeError(
                        f"param groups shared a tensor as their {name!r} when this step was compiled, and do not any "
                        "more: write to it with fill_(), or build each group with a tensor of its own"
                    )


def traced_step(optimizer: Handled, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Runs what Dynamo traces of a step: tensors, numbers, the norm if gradients are clipped, and one operator.

    Raises:
        RuntimeError: if the step would create state, or its policy is naive. With fullgraph=True the user gets this
            error; else Dynamo runs the step in Python.
    """
    participants = optimizer._participants
    # Lists, no generators: Dynamo keeps traced generators in reference cycles with everything that it traces here.
    without_state = [] if participants is None else [*participants._waiting, *participants.incomplete]
    if participants is None or any([p.grad is not None for p in without_state]):  # noqa: C419
        _NO_GRAPH(NO_STATE)
        raise RuntimeError(NO_STATE)
    if any([policy.naive for policy in participants.members]):  # noqa: C419
        _NO_GRAPH(NAIVE)
        raise RuntimeError(NAIVE)
    params: list[Tensor] = []
    grads: list[Tensor] = []
    state: list[Tensor] = []
    applies: list[bool] = []
    tensors: list[Tensor] = []
    floats: list[float] = []
    for view in participants.views:
        grad = view.param.grad
        params.append(view.param)
        state += view.state.values()
        applies.append(grad is not None)
        if grad is not None:
            grads.append(grad)
    for group in optimizer._traced:
        for name in NUMBERS:
            value = group.get(name)
            if value is not None:
                for number in value if name == "betas" else (value,):
                    if isinstance(number, Tensor):
                        tensors.append(number)
                    else:
                        floats.append(float(number))
    if optimizer.max_grad_norm is not None or optimizer.skip_nonfinite:
        norm, grad_scale, found_inf = clip(
            grads, optimizer.max_grad_norm, optimizer.skip_nonfinite, grad_scale, found_inf
        )
        if optimizer.grad_norm is None:
            _NO_GRAPH(NO_STATE)
            raise RuntimeError(NO_STATE)
        optimizer.grad_norm.copy_(norm)  # not assigned: a graph loses attributes that are set in it
    random_rates = optimizer._random_rates
    tables = [] if random_rates is None else [random_rates.table]
    _COMPILED_STEP(participants.key, params, grads, state, applies, tensors, floats, tables, grad_scale, found_inf)
    count_idle_calls(optimizer._traced_idle, found_inf)


def traced_zero_grad(groups: Groups, set_to_none: bool) -> None:
    """Runs ``zero_grad()`` in a form that Dynamo traces."""
    for group in groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad = None if set_to_none else torch.zeros_like(p.grad)


def _compiled_step(
    key: int,
    params: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    applies: list[bool],
    tensors: list[Tensor],
    floats: list[float],
    random_rates_table: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    participants = _participants.get(key)
    optimizer = None if participants is None or participants.owner is None else participants.owner()
    if optimizer is None or participants is None or optimizer._current_participants() is not participants:
        raise RuntimeError(
            "param groups, policies or state have changed since this step was compiled: take one step outside of "
            "torch.compile, which collects them anew"
        )
    optimizer._opt_called = True  # torch's schedulers read it
    bound = optimizer._bound
    if bound is None or bound.of is not participants or not _is_bound_to(bound, params, state):
        if any(plan.unfilled() for plan in participants.plans or ()):  # AMP has skipped every step
            raise RuntimeError(NO_STATE)
        bound = Bound(participants, params, state)
        # Copies exist during this call only.
        optimizer._bound = bound if all(map(_same, params, participants.params)) else None
    bound.set_gradients(grads, applies)
    bound.set_numbers(tensors, floats)
    random_rates = optimizer._random_rates
    if random_rates is not None:
        random_rates = random_rates.over(random_rates_table[0])
    try:
        with torch.no_grad():
            optimizer._step_backend.step(bound.participants, found_inf, grad_scale, random_rates)
            if random_rates is not None and random_rates.table is not random_rates_table[0]:
                random_rates_table[0].copy_(random_rates.table)
    finally:
        bound.set_gradients([], [False] * len(params))  # else they would outlive the parameters' gradients


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def _is_bound_to(bound: Bound, params: Sequence[Tensor], state: Sequence[Tensor]) -> bool:
    views = bound.participants.views
    bound_state = itertools.chain.from_iterable(view.state.values() for view in views)
    return all(map(_same, params, bound.participants.params)) and all(map(_same, state, bound_state))


def _no_graph(why: str) -> None:
    """Raises Dynamo's error with ``why`` as first line if tracing must give one graph.

    Dynamo would report another exception in traced code far below its own text about exceptions.
    """
    from torch._dynamo import exc, symbolic_convert

    tracer = symbolic_convert.InstructionTranslator.current_tx()
    if getattr(tracer, "one_graph", False) or getattr(tracer, "error_on_graph_break", False):
        raise exc.Unsupported(why)


def _define(name: str, schema: str, run: Callable[..., None], fake: Callable[..., None]) -> Any:
    """Defines an operator for this import of the package.

    A process may import the package again (notebooks reload, workers clear modules). Each import needs its own
    operators, since it has its own participants.
    """
    operators = torch.ops.fused_adaptive
    name = next(n for n in (f"{name}{i or ''}" for i in itertools.count()) if not hasattr(operators, n))
    torch.library.define(f"fused_adaptive::{name}", schema)
    torch.library.impl(f"fused_adaptive::{name}", "CompositeExplicitAutograd")(run)
    torch.library.register_fake(f"fused_adaptive::{name}")(fake)
    return getattr(operators, name)


_NO_GRAPH = _define("no_graph", "(str why) -> ()", lambda why: None, _no_graph)
_COMPILED_STEP = _define(
    "compiled_step",
    "(int key, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, bool[] applies, Tensor[] tensors, "
    "float[] floats, Tensor(c!)[] random_rates_table, Tensor? grad_scale, Tensor? found_inf) -> ()",
    _compiled_step,
    lambda *_: None,
)
