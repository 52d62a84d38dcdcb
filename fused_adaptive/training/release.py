"""Gradient release: each parameter is stepped in the backward pass, when its gradient is there, which is then freed.

Known from LOMO and from PyTorch's "optimizer step in backward". So never are all gradients alive, but those of about
one layer.
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

from ..core.checks import check_gradient, check_gradients, describe
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
    """Makes ``backward()`` step each parameter when its gradient is complete, and free the gradient at once.

    The training loop stays as it is: ``optimizer.step()`` after the backward finishes the step, for interval counts and
    for parameters that got no gradient. The results are those of the usual loop, bit for bit. What it saves is the
    memory of the gradients, but for those of the largest layer; what it costs is a call of the backend for each
    parameter instead of one for all.

    Since a step begins before the backward ends, the rate that counts is that of ``backward()``: change ``lr`` between
    ``step()`` and the next ``backward()``, as schedulers do. ``p.grad`` is None afterwards, so whatever reads gradients
    between backward and step finds none: ``clip_grad_norm_`` returns 0 and clips nothing.

    If ``backward()`` raises, the parameters that it had reached have moved. ``optimizer.step()`` finishes that step, as
    one in which the others had no gradient.

    Args:
        model: the module whose parameters the optimizer holds, all of them.
        optimizer: one of this package's, or a trainer's handle of one. Policies whose gain is one for all tensors need
            all gradients before any tensor moves, and are refused: ActiveLR and ``granularity="tensor"`` work.

    Returns:
        A handle: ``remove()`` ends it, ``with accumulate():`` adds gradients of several backward passes up.

    Raises:
        TypeError: for an optimizer of another package.
        ValueError: for parameters that are not the model's, models and parameters that are sharded over processes,
            global and naive policies, clipping by the optimizer, an optimizer that already releases. Nothing has
            changed then.
        RuntimeError: from ``backward()``, for a second gradient of a parameter before ``step()``, and for gradients
            that ``step()`` would refuse; the parameter has not moved. From ``step()``, under GradScaler.
    """
    return GradientRelease(model, optimizer)


class GradientRelease:
    """The handle of :func:`release_gradients`, which see."""

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
        self._weak_optimizer = weakref.ref(optimizer)  # which owns this: hooks in the model keep neither alive
        self._lock = threading.Lock()  # with several GPUs each has a backward thread of its own
        self._hooks: dict[Tensor, Any] = {}
        self._views: dict[Tensor, ParamView] = {}  # of every parameter; the singles are those that have state
        self._singles: dict[Tensor, _Single] = {}
        self._fingerprint: Fingerprint | None = None
        # Of the step under way: whose gradients have come; and of each policy, the count of calls before it.
        self._running = False
        self._stepped: set[Tensor] = set()
        self._calls: dict[Policy, Tensor] = {}
        self._accumulates = False
        self._prepare()
        # GradScaler then hands its scale to step(), which can say what is wrong; else it fails with a riddle.
        self._took_scale = optimizer._step_supports_amp_scaling
        optimizer._step_supports_amp_scaling = True
        optimizer._participants = None  # its plan holds memory, and would be of no use
        optimizer._release = self

    @property
    def _optimizer(self) -> AdaptiveOptimizer:
        optimizer = self._weak_optimizer()
        assert optimizer is not None
        return optimizer

    def remove(self) -> None:
        """Back to the usual loop, in which ``step()`` moves all parameters. Call it between steps.

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
            optimizer._step_supports_amp_scaling = self._took_scale

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within it, ``backward()`` keeps gradients and moves nothing; the next one outside adds its own and steps.

        Gradients that are accumulated have to live: their memory is not saved between the passes.
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
            self._check_first(param)
            self._move(param)

    # ---- called by optimizer.step() ----

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The rest of the step: gradients that came in another way, parameters without one, counts."""
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
        left = [p for p in self._views if p.grad is not None]
        for p in left:
            self._check_first(p)
        for p in left:
            self._hook(p)  # if it was frozen until now
            self._move(p)
        for p, single in self._singles.items():
            if p not in self._stepped:
                optimizer._backend.step(single, None, None, None)
        self._count_idle_calls()
        if self._fingerprint is None:  # there are newcomers
            optimizer._complete()  # remembers how they stand
            self._fingerprint = Fingerprint(optimizer.backbone, optimizer.param_groups, optimizer.state)
        self._stepped.clear()
        self._running = False
        return loss

    # ---- the parts of a step ----

    def _begin(self) -> None:
        """A step begins: whatever has changed since the last one is taken up, or refused."""
        optimizer = self._optimizer
        if optimizer._random_rates is not None:
            raise RuntimeError("ASLR draws a rate for each step(): use ASLR(jitter=False) with release_gradients")
        if self._fingerprint is None or not self._fingerprint.matches(optimizer.param_groups, optimizer.state):
            self._prepare()
        self._calls = {}
        if len(self._singles) < len(self._views):  # newcomers take up the count that the others have now
            for single in self._singles.values():
                view = single.views[0]
                for policy in view.policies:
                    if policy.counter and policy not in self._calls:
                        self._calls[policy] = view.state[policy.counter].clone()
        reference_rates.follow(optimizer.param_groups)
        self._running = True

    def _prepare(self) -> None:
        """Takes in param groups and state as they are now, and refuses what cannot work."""
        optimizer = self._optimizer
        if optimizer.max_grad_norm is not None or optimizer.skip_nonfinite:
            raise ValueError(
                "release_gradients: max_grad_norm and skip_nonfinite need the gradients of all tensors before any of "
                "them moves; leave them out"
            )
        optimizer._settle_policies()
        for group in optimizer.param_groups:
            for policy in from_plain(group["policy"]):
                _check_policy(policy)
        optimizer._complete()
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

    def _check_first(self, param: Tensor) -> None:
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
        self._optimizer._backend.step(single, None, None, None)
        self._stepped.add(param)
        param.grad = None

    def _join(self, view: ParamView) -> _Single:
        """A newcomer with its state, which is as new but for the counts of calls."""
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
    """One parameter as a whole step sees many: it has a plan of its own."""

    def check_gradients(self) -> None:
        view = self.views[0]
        check_gradient(view.index, view.param, _name(view))


def _single(view: ParamView) -> _Single:
    return _Single([view], by_policy([view]), [view.param], [view.group], view.backbone, [])


def _name(view: ParamView) -> str | None:
    names, params = view.group.get("param_names"), view.group["params"]
    return None if names is None else next(n for n, p in zip(names, params, strict=True) if p is view.param)


def _check_policy(policy: Policy) -> None:
    if policy.naive:
        raise ValueError(
            "release_gradients: TrainableLR(naive=True) evaluates the whole model's gradients twice before it moves; "
            "use TrainableLR(interval=…, granularity='tensor')"
        )
    if "gain" in policy.shared_names():
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
    own = set(model.parameters())
    distributed = sys.modules.get("torch.distributed.tensor")
    index = 0
    for group in optimizer.param_groups:
        names = group.get("param_names", [None] * len(group["params"]))
        for name, p in zip(names, group["params"], strict=True):
            if p not in own:
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
