"""The base class of the optimizers: a ``torch.optim.Optimizer`` that gathers parameters and hands them to a backend.

The path of a step: ``step()`` → policies and backbone of each group → ``backend.step`` → kernel. Nothing here reads a
tensor's value in a step, but for the naive TrainableLR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor

from . import backends, compiled, reference_rates
from .backbones import Backbone
from .checkpoint import restore
from .checks import check_gradients, check_hyperparameters, check_parameters
from .clipping import check_max_grad_norm, clip
from .distributed import check_not_partitioned, check_split
from .eager import eager
from .gather import Gathered, count_idle_calls, forget_idle_calls, gather, gather_complete
from .policies import Plain, Policy, TrainableLR, from_plain, parse
from .policies.naive import Trial, evaluate_trial, needs_trial
from .rates import learning_rates
from .resolution import Resolutions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .controllers.draws import RateDraw
    from .release import GradientRelease

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class AdaptiveOptimizer(torch.optim.Optimizer):
    """A backbone driven by a learning-rate policy: ``p ← p − lr·γ·u``. Use the subclasses.

    Args:
        params: parameters, named parameters or param groups, as in torch; a group may have its own ``policy``.
        defaults: hyperparameters of the torch namesake.
        policy: a :class:`~fused_adaptive.policies.Policy`, a tuple of one ActiveLR and one TrainableLR, or None
            (:class:`FixedLR`).
        backend: ``"auto"`` (default) or the name of a backend, see :func:`fused_adaptive.backends.available`.
        max_grad_norm: clips gradients as ``torch.nn.utils.clip_grad_norm_`` does, over all groups, devices and shards,
            after unscaling (AMP); ``p.grad`` stays as it is. Default None. May be set between steps, as an attribute.
        skip_nonfinite: skips the step where the norm of all gradients is not finite, as AMP skips one: nothing
            changes, nothing counts. Default False. With the native backend on a GPU it needs ``capturable=True`` or
            ``fused=True``, since only the device knows whether the step counts.
        process_group: the ranks over which a framework has split the parameters without DTensor (flat shards): each
            rank's optimizer has as many parameters in the same order, and holds a part, perhaps empty, of each. Inner
            products are summed over them. None (default): plain parameters are whole. DTensors tell their own.

    Attributes:
        grad_norm: of the last step with ``max_grad_norm`` or ``skip_nonfinite``, the 2-norm of its unscaled,
            unclipped gradients: 0-dim, on their device, float32 (float64 for float64); None before. A compiled step
            or a captured graph writes into the same tensor again.

    Raises:
        TypeError, ValueError: for bad hyperparameters, parameters or combinations of backbone and policy.
        RuntimeError: if the backend that was asked for cannot run here; from ``step()``, for gradients that cannot be
            used. Then nothing has changed.
    """

    backbone: ClassVar[Backbone]
    #: Flags that a checkpoint of ``torch.optim`` does not decide: torch's class has them fixed.
    _own_flags: ClassVar[tuple[str, ...]] = ()
    #: Set by ASLR: what each tensor's rate is multiplied by. Not copied or saved with the optimizer.
    _rate_draw: RateDraw | None = None
    #: What the last step gathered. Not copied or saved with the optimizer either.
    _gathered: Gathered | None = None
    #: Set by release_gradients, which steps in the backward pass; likewise.
    _release: GradientRelease | None = None
    process_group: ProcessGroup | None = None
    #: The tensors that code compiled by torch.compile has handed to the last step. Nor this.
    _bound: compiled.Bound | None = None
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    grad_norm: Tensor | None = None
    #: The param groups as torch.compile sees them, and those that have no state yet. Nor these.
    _traced: Sequence[compiled.Attributes] = ()
    _traced_idle: Any = ()
    #: The policies that the backend was chosen for.
    _kinds: AbstractSet[type[Policy]] = frozenset()

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        policy: Any = None,
        backend: str = "auto",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_hyperparameters(defaults)
        self.process_group = process_group
        self.max_grad_norm, self.skip_nonfinite = check_max_grad_norm(max_grad_norm), bool(skip_nonfinite)
        self._backend_requested = backend
        self._backend = backends.select(backend, ())
        self._resolutions = Resolutions(self.backbone)
        given: Any = params if isinstance(params, Tensor) else list(params)  # torch has its own words for a tensor
        super().__init__(given, {**defaults, "policy": self._resolve_all(given, {**defaults, "policy": policy})})
        # Asks GradScaler to hand over grad_scale and found_inf instead of unscaling and skipping itself.
        self._step_supports_amp_scaling = bool(defaults.get("fused"))

    @eager
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, at construction or in the middle of training; its tensors start fresh.

        Raises:
            ValueError, TypeError: as the constructor; then the optimizer has not changed.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict with 'params' and options, got {type(param_group).__name__}")
        if not isinstance(param_group["params"], (Tensor, set)):  # torch has its own words for a set
            param_group["params"] = list(param_group["params"])
            check_parameters(param_group["params"], sum(len(group["params"]) for group in self.param_groups))
        group = {**self.defaults, **param_group}
        check_hyperparameters(group)
        self._settle_policies()
        policy = self._resolutions.plain(group["policy"], [group])
        self._check_naive([*(from_plain(g["policy"]) for g in self.param_groups), from_plain(policy)])
        check_not_partitioned(from_plain(policy))
        backend = self._choose_backend([*self.param_groups, {**group, "policy": policy}])
        param_group["policy"] = policy
        super().add_param_group(param_group)
        reference_rates.meet(param_group)
        self._gathered = self._bound = None
        self._backend = backend

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step over all parameters that have a gradient.

        Args:
            closure: clears the gradients, evaluates the loss, calls ``backward()`` and returns the loss. Optional, but
                for ``TrainableLR(naive=True)``, which calls it twice.

        Returns:
            What the closure returned at its first call; None without one.

        Raises:
            RuntimeError: for a gradient that is sparse, not floating-point, or of another shape or device than its
                parameter. Then no parameter and no state has changed.
        """
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:  # some versions of torch cannot trace it: a compiled step says it itself
            self._opt_called = True  # for torch's schedulers
        if self._release is not None:
            return self._release.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if is_compiling:
            compiled.traced_step(self, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
            return loss
        trial = self._step(closure)
        if trial is not None and closure is not None:
            params = list(chain.from_iterable(group["params"] for group in self.param_groups))
            evaluate_trial(trial.policy, trial.gathered, params, closure, trial.grad_scale)
            self._finish(trial)
        return loss

    # Else schedulers of torch put a wrapper around it that torch.compile refuses to trace.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as ``torch.optim.Optimizer.zero_grad``, which torch.compile refuses to trace."""
        if not torch.compiler.is_compiling():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad = torch.zeros_like(p.grad)

    @eager
    @torch.no_grad()
    def end_interval(self) -> None:
        """Ends the running interval of every policy here and now, and restarts their counts.

        The only way with ``interval=None``. Always allowed; tensors that had no gradient since the last end keep what
        they have.
        """
        complete = self._complete()
        self._backend.end_interval(complete)
        complete.take_back()
        forget_idle_calls(self.param_groups)

    @torch.no_grad()
    def restart_interval(self) -> None:
        """Begins the interval anew, for weights that were changed from outside.

        Gains stay. Running sums, counts and what is remembered of earlier intervals are dropped; directions that are
        read from the backbone's own state (Hypergradient) stay with it.
        """
        for policy, slots in self._complete().members.items():
            policy.restart_interval(slots)
        forget_idle_calls(self.param_groups)

    @torch.no_grad()
    def learning_rates(self, per_tensor: bool = False) -> list[dict[str, Any]]:
        """The local learning rates ``lr·γ``. Reads them back from the device, all at once: not for every step.

        Args:
            per_tensor: adds ``"tensors"``, the same for each parameter of the group, in its order, with its name
                where the parameters are named. Of a parameter that is spread over ranks, the elements on this one:
                nothing is communicated, so that one rank alone may ask.

        Returns:
            For each group ``{"min", "mean", "max"}``, floats; means are over elements.
        """
        return learning_rates(self.param_groups, self.state, self._complete().members, per_tensor)

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of its ``torch.optim`` namesake (policy state starts fresh).

        The checkpoint's hyperparameters win, its policy included: to go on with another one, set ``group["policy"]``
        after loading. State keeps its own dtypes, whatever the parameters'. As in torch, tensors that need no
        conversion are shared with ``state_dict``.

        Raises:
            ValueError: if groups do not match, or state is missing or of the wrong shape. Then nothing has changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state, param_groups = restore(self.backbone, self.param_groups, state_dict, self._own_flags)
        self._check_naive([from_plain(group["policy"]) for group in param_groups])
        self.__setstate__({"state": state, "param_groups": param_groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "an optimizer with process_group= cannot be copied or pickled, since the group cannot: build another "
                "and load this one's state_dict() into it"
            )
        return {
            **super().__getstate__(),
            "_backend_requested": self._backend_requested,
            "_resolutions": self._resolutions,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
            "max_grad_norm": self.max_grad_norm,
            "skip_nonfinite": self.skip_nonfinite,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._gathered = self._bound = None
        self._resolutions.settle(self.param_groups)
        self._backend = self._choose_backend(self.param_groups)

    def _resolve_all(self, params: Any, defaults: dict[str, Any]) -> Plain:
        """Resolves the policies of all groups that are about to be added, and returns that of the defaults."""
        groups = [{**defaults, **group} for group in params if isinstance(group, dict)]
        for group in groups:
            given = parse(group["policy"])
            self._resolutions.plain(group["policy"], [g for g in groups if parse(g["policy"]) == given])
        return self._resolutions.plain(defaults["policy"], [defaults])

    def _settle_policies(self) -> None:
        """Takes up policies that were set by hand, before anything else may see them."""
        self._resolutions.settle(self.param_groups)
        if _kinds_of(self.param_groups) != self._kinds:
            self._backend = self._choose_backend(self.param_groups)

    def _choose_backend(self, groups: Sequence[dict[str, Any]]) -> backends.Backend:
        devices = set().union(*(devices_of(group["params"]) for group in groups))
        policies = [policy for group in groups for policy in from_plain(group["policy"])]
        backend = backends.select(self._backend_requested, devices, policies)
        backends.check_masters(backend, groups)
        self._kinds = _kinds_of(groups)
        return backend

    # ---- gathering: of objects by their identity, so torch.compile does not trace it ----

    def _check_naive(self, policies: list[tuple[Policy, ...]]) -> None:
        if any(p.naive for group in policies for p in group) and len(set(policies)) > 1:
            raise ValueError(
                "TrainableLR(naive=True) evaluates the loss of the whole model at a trial point: all param groups must "
                "have that same policy"
            )

    def _needs_trial(self, policies: Iterable[Policy], closure: Callable[[], Any] | None) -> TrainableLR | None:
        """The policy whose trial this step needs, if one does. Where nothing can move, the step only creates state."""
        naive = next((p for p in policies if isinstance(p, TrainableLR) and p.naive), None)
        if naive is None:
            return None
        check_gradients(self.param_groups)  # their values are about to be read
        if not needs_trial(self.param_groups, self.process_group):
            return None
        if closure is None:
            raise RuntimeError(
                "TrainableLR(naive=True) evaluates the loss twice: pass step(closure) a function that clears the "
                "gradients, evaluates the loss, calls backward() and returns the loss"
            )
        return naive

    @eager
    def _step(self, closure: Callable[[], Any] | None) -> Trial | None:
        """The step; or, where a trial has to come before the update, what it needs."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        gathered = self._current()
        is_new = gathered is None or gathered.has_newcomers()
        if gathered is None or is_new:
            # Whatever can be refused is refused before state is created. Later steps leave the check to the backend.
            check_gradients(self.param_groups)
            self._settle_policies()
            policies = [from_plain(group["policy"]) for group in self.param_groups]
            self._check_naive(policies)
            check_split(self.param_groups, policies, self.process_group)
            naive = self._needs_trial(chain.from_iterable(policies), closure)
            gathered = self._gather()
        else:
            naive = self._needs_trial(gathered.members, closure)
        reference_rates.follow(self.param_groups)
        if self.max_grad_norm is not None or self.skip_nonfinite:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            try:
                self.grad_norm, grad_scale, found_inf = clip(
                    grads, self.max_grad_norm, self.skip_nonfinite, grad_scale, found_inf
                )
            except RuntimeError:
                gathered.check_gradients()  # a sparse one, say: named, with a remedy
                raise
        if naive is not None:
            return Trial(naive, gathered, is_new, found_inf, grad_scale)
        self._update(gathered, is_new, found_inf, grad_scale)
        return None

    @eager
    def _finish(self, trial: Trial) -> None:
        self._update(trial.gathered, trial.is_new, trial.found_inf, trial.grad_scale)

    def _update(self, gathered: Gathered, is_new: bool, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """The step itself. DTensors lend it what this rank holds of them."""
        gathered.bring_gradients()
        entries = sum(map(len, self.state.values())) if is_new else 0
        self._backend.step(gathered, found_inf, grad_scale, self._rate_draw)
        gathered.take_back()
        count_idle_calls(gathered.idle, found_inf)
        if is_new and entries != sum(map(len, self.state.values())):
            self._gather()  # the update has created state, SGD's buffers: torch.compile traces what is gathered

    def _current(self) -> Gathered | None:
        """What the last step gathered, if that is still how things stand."""
        gathered = self._gathered
        return gathered if gathered is not None and gathered.is_current(self.param_groups, self.state) else None

    def _gather(self) -> Gathered:
        backends.check_masters(self._backend, self.param_groups)
        before = None if self._gathered is None else self._gathered.outline()
        # First, so that state which the user has dropped is freed before there is new one.
        self._gathered = self._bound = None
        self._gathered = gather(self.backbone, self.param_groups, self.state, before, self.process_group)
        compiled.announce(self, self._gathered)
        return self._gathered

    @eager
    def _complete(self) -> Gathered:
        """The tensors whose state is complete, outside of a step."""
        current = self._current()
        if current is None:
            self._settle_policies()
            current = gather_complete(self.backbone, self.param_groups, self.state, self.process_group)
        return current


def _kinds_of(groups: Iterable[dict[str, Any]]) -> set[type[Policy]]:
    """Which policies drive these groups, whatever their arguments."""
    return {type(policy) for group in groups for policy in from_plain(group["policy"])}


def devices_of(params: Iterable[Any]) -> set[torch.device]:
    """The devices of parameters, named parameters or a single tensor."""
    tensors = [params] if isinstance(params, Tensor) else (p[1] if isinstance(p, tuple) else p for p in params)
    return {p.device for p in tensors if isinstance(p, Tensor)}
