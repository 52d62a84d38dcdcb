"""Gradient release: steps each parameter in the backward pass as soon as its gradient is complete, then frees it.

Known from LOMO and from PyTorch's "optimizer step in backward". Only the gradients of about one layer are in memory at
a time.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_gradient, check_gradients, describe, make_numbers_plain
from ..core.eager import eager
from ..core.view import ParamView
from ..engine import reference_rates
from ..engine.checkpoint import specs
from ..engine.fingerprint import Fingerprint
from ..engine.handles import unwrap
from ..engine.membership import by_policy, count_idle_calls, join, missing
from ..engine.participants import Participants
from ..optimizers.base import AdaptiveOptimizer
from ..policies import Policy, from_plain


def release_gradients(model: nn.Module, optimizer: AdaptiveOptimizer) -> GradientRelease:
    """Makes ``backward()`` step each parameter as soon as its gradient is complete and free the gradient at once.

    The training loop does not change: ``optimizer.step()`` after the backward finishes the step, for interval counts
    and for parameters without a gradient. The results are those of the usual loop, bit for bit. It saves the memory of
    all gradients except those of the largest layer. It costs one call of the backend per parameter instead of one for
    all parameters.

    A step begins before the backward ends, so it uses the ``lr`` at the time of ``backward()``: change ``lr`` between
    ``step()`` and the next ``backward()``, as schedulers do. ``p.grad`` is None after the backward, so code that reads
    gradients between backward and step finds none: ``clip_grad_norm_`` returns 0 and clips nothing.

    If ``backward()`` raises, the parameters whose gradients were complete have been stepped. ``optimizer.step()`` then
    finishes that step as if the others had no gradient.

    Args:
        model: the module that contains all parameters of the optimizer.
        optimizer: an optimizer of this package, or a trainer's handle of one. Policies with one gain for all tensors
            are not supported, since they need all gradients before any tensor is updated; ActiveLR and
            ``granularity="tensor"`` are.

    Returns:
        A handle: ``remove()`` restores the usual loop, ``with accumulate():`` accumulates the gradients of several
        backward passes.

    Raises:
        TypeError: for an optimizer of another package.
        ValueError: for parameters that are not the model's, models and parameters that are sharded over processes,
            global and naive policies, clipping by the optimizer, or an optimizer that already releases its gradients.
            Nothing has changed then.
        RuntimeError: from ``backward()``, for a second gradient of a parameter before ``step()`` and for gradients
            that ``step()`` refuses; the parameter has not changed. From ``step()``, under GradScaler.
    """
    return GradientRelease(model, optimizer)


class GradientRelease:
    """The handle that :func:`release_gradients` returns."""

    def __init__(self, model: nn.Module, optimizer: AdaptiveOptimizer) -> None:
        try:
            optimizer = unwrap(optimizer)
        except TypeError:
            raise TypeError(
                f"release_gradients takes an optimizer of fused_adaptive, got {type(optimizer).__name__}: for others "
                "use Tensor.register_post_accumulate_grad_hook"
            ) from None
        if optimizer._release is not None:
            raise ValueError("this optimizer already releases its gradients: remove() the earlier handle first")
        _check_model(model, optimizer)
        _check_clipping(optimizer)
        self._weak_optimizer = weakref.ref(optimizer)  # the optimizer owns self; the model's hooks keep neither alive
        self._lock = threading.Lock()  # autograd has one backward thread per GPU
        self._hooks: dict[Tensor, Any] = {}
        self._views: dict[Tensor, ParamView] = {}  # of all parameters
        self._singles: dict[Tensor, _Single] = {}  # of the parameters that have state
        self._fingerprint: Fingerprint | None = None
        # The current step: the parameters stepped so far, and each policy's step count before it.
        self._running = False
        self._stepped: set[Tensor] = set()
        self._calls: dict[Policy, Tensor] = {}
        self._accumulates = False
        self._prepare()
        # GradScaler then passes its scale to step(), which raises an error that says what is wrong.
        self._amp_scaling_before = optimizer._step_supports_amp_scaling
        optimizer._step_supports_amp_scaling = True
        optimizer._drop_participants()  # frees the memory of its plan, which is not used any more
        optimizer._release = self

    @property
    def _optimizer(self) -> AdaptiveOptimizer:
        optimizer = self._weak_optimizer()
        assert optimizer is not None
        return optimizer

    def remove(self) -> None:
        """Restores the usual loop, in which ``step()`` updates all parameters. Call it between steps.

        Raises:
            RuntimeError: after ``backward()`` and before ``step()``.
        """
        if self._running:
            raise RuntimeError("some parameters have moved in this step: call optimizer.step() before remove()")
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._singles.clear()
        optimizer = self._weak_optimizer()
        if optimizer is not None and optimizer._release is self:
            optimizer._release = None
            optimizer._step_supports_amp_scaling = self._amp_scaling_before

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Returns a context in which ``backward()`` accumulates gradients and updates no parameter.

        The next ``backward()`` outside of it adds its gradients and steps. Accumulated gradients stay in memory between
        the passes.
        """
        self._accumulates, before = True, self._accumulates
        try:
            yield
        finally:
            self._accumulates = before

    # ---- called by autograd ----

    @eager
    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        if self._accumulates or self._weak_optimizer() is None:
            return
        with self._lock:
            if not self._running:
                self._begin()
            self._check_not_stepped(param)
            self._move(param)

    # ---- called by optimizer.step() ----

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Finishes the step: updates parameters that still have a gradient, and counts the step for all others."""
        optimizer, loss = self._optimizer, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if hasattr(optimizer, "found_inf") or hasattr(optimizer, "grad_scale"):
            for name in ("found_inf", "grad_scale"):
                vars(optimizer._shared).pop(name, None)
            raise RuntimeError(
                "release_gradients has moved parameters by scaled gradients: they are stepped in the backward, before "
                "GradScaler knows whether all of them are finite. Train in bfloat16 without a GradScaler, or without "
                "release_gradients"
            )
        if not self._running:
            self._begin()
        check_gradients(optimizer.param_groups)
        remaining = [p for p in self._views if p.grad is not None]
        for p in remaining:
            self._check_not_stepped(p)
        for p in remaining:
            self._hook(p)  # a parameter that was frozen has no hook yet
            # After torch.utils.swap_tensors torch calls no hook of the parameter, until its dict of hooks is set.
            p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks  # type: ignore[attr-defined]
            self._move(p)
        for p, single in self._singles.items():
            if p not in self._stepped:
                optimizer._step_backend.step(single, None, None, None)
        self._count_idle_calls()
        if self._fingerprint is None:  # _join has created state
            optimizer._complete_participants()  # records the parameters' memberships
            self._fingerprint = Fingerprint(optimizer.backbone, optimizer.param_groups, optimizer.state)
        self._stepped.clear()
        self._running = False
        return loss

    # ---- the parts of a step ----

    def _begin(self) -> None:
        """Begins a step. Applies or rejects the changes made to the optimizer since the last one."""
        optimizer = self._optimizer
        _check_clipping(optimizer)
        make_numbers_plain(optimizer.param_groups)
        if optimizer._random_rates is not None:
            raise RuntimeError("ASLR draws a rate for each step(): use ASLR(jitter=False) with release_gradients")
        if self._fingerprint is None or not self._fingerprint.matches(optimizer.param_groups, optimizer.state):
            self._prepare()
        self._calls = {}
        if len(self._singles) < len(self._views):  # parameters without state start at the others' current step count
            for single in self._singles.values():
                view = single.views[0]
                for policy in view.policies:
                    if policy.counter and policy not in self._calls:
                        self._calls[policy] = view.state[policy.counter].clone()
        reference_rates.follow(optimizer.param_groups)
        self._running = True

    def _prepare(self) -> None:
        """Builds views and hooks from the current param groups and state. Raises for what gradient release rejects."""
        optimizer = self._optimizer
        optimizer._settle_policies()
        for group in optimizer.param_groups:
            for policy in from_plain(group["policy"]):
                _check_policy(policy)
        optimizer._complete_participants()
        self._views, self._singles = {}, {}
        for group in optimizer.param_groups:
            policies = from_plain(group["policy"])
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                view = self._views[p] = ParamView(p, state, group, optimizer.backbone, policies, len(self._views))
                if state and not missing(specs(optimizer.backbone, group, p.dtype), state):
                    self._singles[p] = _single(view)
                self._hook(p)
        for p in [p for p in self._hooks if p not in self._views]:
            self._hooks.pop(p).remove()
        self._fingerprint = Fingerprint(optimizer.backbone, optimizer.param_groups, optimizer.state)

    def _hook(self, param: Tensor) -> None:
        if param.requires_grad and param not in self._hooks:
            of_release = weakref.WeakMethod(self._on_gradient)
            self._hooks[param] = param.register_post_accumulate_grad_hook(lambda p: _call(of_release, p))

    def _check_not_stepped(self, param: Tensor) -> None:
        if param in self._stepped:
            view = self._views[param]
            raise RuntimeError(
                f"{describe(view.index, param, _name(view))} got a second gradient in one step, and has moved by the "
                "first: call optimizer.step() after each backward(), or add gradients up within release.accumulate(); "
                "after a backward() that raised, optimizer.step() ends its step"
            )

    def _move(self, param: Tensor) -> None:
        single = self._singles.get(param)
        if single is None:
            view = self._views[param]
            check_gradient(view.index, param, _name(view))
            single = self._singles[param] = self._join(view)
        self._optimizer._step_backend.step(single, None, None, None)
        self._stepped.add(param)
        param.grad = None

    def _join(self, view: ParamView) -> _Single:
        """Creates the state of a parameter in its first step. It is new except for the policies' step counts."""
        spec = specs(view.backbone, view.group, view.param.dtype)
        if spec:
            view.state = self._optimizer.state.setdefault(view.param, view.state)
        join([view], [(view, spec)], self._optimizer.param_groups, {}, self._calls)
        self._fingerprint = None
        return _single(view)

    def _count_idle_calls(self) -> None:
        active = {id(single.views[0].group) for single in self._singles.values()}
        idle = []
        for group in self._optimizer.param_groups:
            if id(group) in active:
                group.pop("idle_calls", None)
            elif any(policy.counter for policy in from_plain(group["policy"])):
                idle.append(group)
        count_idle_calls(idle, None)


def _call(method: weakref.WeakMethod[Callable[[Tensor], None]], param: Tensor) -> None:
    on_gradient = method()
    if on_gradient is not None:
        on_gradient(param)


class _Single(Participants):
    """The participants of a step of one parameter, with a plan of its own."""

    def check_gradients(self) -> None:
        view = self.views[0]
        check_gradient(view.index, view.param, _name(view))


def _single(view: ParamView) -> _Single:
    return _Single([view], by_policy([view]), [view.param], [view.group], view.backbone, [])


def _name(view: ParamView) -> str | None:
    names, params = view.group.get("param_names"), view.group["params"]
    return None if names is None else next(n for n, p in zip(names, params, strict=True) if p is view.param)


def _check_clipping(optimizer: AdaptiveOptimizer) -> None:
    if optimizer.max_grad_norm is not None or optimizer.skip_nonfinite:
        raise ValueError(
            "release_gradients: max_grad_norm and skip_nonfinite need the gradients of all tensors before any of them "
            "moves; leave them out"
        )


def _check_policy(policy: Policy) -> None:
    if policy.naive:
        raise ValueError(
            "release_gradients: TrainableLR(naive=True) evaluates the whole model's gradients twice before it moves; "
            "use TrainableLR(interval=…, granularity='tensor')"
        )
    if policy.shares_gain:
        raise ValueError(
            f"release_gradients: {type(policy).__name__}(granularity='global') needs the gradients of all tensors "
            "before any of them moves; use granularity='tensor', or ActiveLR"
        )


def _check_model(model: nn.Module, optimizer: AdaptiveOptimizer) -> None:
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "release_gradients: DistributedDataParallel averages gradients after they have been used in the "
                "backward; it is for training in one process"
            )
    params = set(model.parameters())
    distributed = sys.modules.get("torch.distributed.tensor")
    index = 0
    for group in optimizer.param_groups:
        names = group.get("param_names", [None] * len(group["params"]))
        for name, p in zip(names, group["params"], strict=True):
            if p not in params:
                raise ValueError(
                    f"release_gradients: {describe(index, p, name)} of the optimizer is not the model's: pass the "
                    "module that holds all of the optimizer's parameters"
                )
            if distributed is not None and isinstance(p, distributed.DTensor):
                raise ValueError(
                    f"release_gradients: {describe(index, p, name)} is a DTensor, whose gradient is reduced after the "
                    "backward; it is for training in one process"
                )
            index += 1
