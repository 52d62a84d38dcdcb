"""Restores what a training on trial changes: the model, its optimizer, and random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..core.ranks import reshard
from ..engine.handles import Shared, driven, with_inner
from . import snapshots


@contextmanager
def preserved(model: Module, optimizer: Optimizer, loader: Any) -> Iterator[None]:
    """Restores model, gradients, optimizer and random state on exit. Gradients are None at the beginning."""
    with ExitStack() as stack:
        tensors = snapshots.tensors_of(model)
        held = {id(t) for t in tensors.values()}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        # The loss may have parameters, too.
        tensors |= {f"parameter {i} of the optimizer": p for i, p in enumerate(params) if id(p) not in held}
        stack.enter_context(_modules(model))
        stack.enter_context(_tensors(tensors, model))
        stack.enter_context(_gradients([*model.parameters(), *params]))
        for one in with_inner(driven(optimizer)):
            stack.enter_context(_optimizer(one))
            stack.enter_context(_unobserved(getattr(one, "_shared", None)))
        stack.enter_context(_random_numbers({t.device for t in tensors.values()}, loader))
        yield


@contextmanager
def _modules(model: Module) -> Iterator[None]:
    """Restores modes, and the buffers that a forward pass replaces or adds instead of writing to them."""
    before = {module: (module.training, dict(module._buffers)) for module in model.modules()}
    try:
        yield
    finally:
        for module, (mode, buffers) in before.items():
            module.training = mode
            for name in set(module._buffers.keys()) - buffers.keys():
                delattr(module, name)
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


@contextmanager
def _tensors(tensors: snapshots.Tensors, model: Module) -> Iterator[None]:
    snapshots.check_writable(tensors)
    saved = {name: t.detach().clone() for name, t in tensors.items()}
    try:
        yield
    finally:
        snapshots.restore_(tensors, saved)
        reshard(model)  # the next forward pass gathers the restored parameters


@contextmanager
def _gradients(params: list[Tensor]) -> Iterator[None]:
    grads = {p: p.grad for p in params}
    for p in params:
        p.grad = None  # else the backward pass would add to them
    try:
        yield
    finally:
        for p, grad in grads.items():
            p.grad = grad


@contextmanager
def _optimizer(optimizer: Optimizer) -> Iterator[None]:
    """Restores state and param groups."""
    state = {p: deepcopy(values) for p, values in optimizer.state.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    contents = [(v, v.detach().clone()) for group in groups for v in group.values() if isinstance(v, Tensor)]
    try:
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            for name in group.keys() - before.keys() - {"params"}:
                del group[name]
            group.update(before)
        with torch.no_grad():
            for tensor, content in contents:
                tensor.copy_(content)


@contextmanager
def _unobserved(shared: Any) -> Iterator[None]:
    """Hides the steps of an optimizer of this package from loggers."""
    if not isinstance(shared, Shared):
        yield
        return
    listeners, grad_norm = shared.after_step, shared.grad_norm
    shared.after_step = []
    try:
        yield
    finally:
        shared.after_step, shared.grad_norm = listeners, grad_norm


@contextmanager
def _random_numbers(devices: set[torch.device], loader: Any) -> Iterator[None]:
    held = [getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None))]
    generators = [(g, g.get_state()) for g in held if isinstance(g, torch.Generator)]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device for device in devices if device.type == "cuda"]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in generators:
            generator.set_state(state)
