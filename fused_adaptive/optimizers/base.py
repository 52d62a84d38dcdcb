"""The base class of the optimizers: a ``torch.optim.Optimizer`` that collects parameters and passes them to a backend.

The path of a step: ``step()`` → policies and backbone of each group → ``backend.step`` → kernel. No code here reads a
tensor's value during a step, except for the naive TrainableLR.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar, cast, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .. import backends
from ..backends import fake
from ..core import checks
from ..core.backbone import Backbone
from ..core.eager import eager
from ..core.plain import make_plain
from ..core.shards import check_split, floats_of_flat
from ..engine import reference_rates, torch_compile
from ..engine.checkpoint import restore
from ..engine.clipping import clip
from ..engine.handles import COPIED, Handled, Shared, unwrap
from ..engine.membership import count_idle_calls, forget_idle_calls, memberships_of_groups
from ..engine.participants import Participants, collect, moves_nothing
from ..engine.rates import learning_rates
from ..engine.resolution import Resolutions
from ..engine.trial import Trial, check_naive, evaluate_trial, trial_policy
from ..policies import from_plain, kinds_of, parse
from .options import OF_GROUPS, OF_OPTIMIZER, Options, Params


class AdaptiveOptimizer(Handled):
    """Base class of the optimizers: ``p ← p − lr·γ·u``, with ``u`` from a backbone and ``γ`` from a policy.

    Args:
        params: parameters, named parameters or param groups, as in torch; a group may have its own ``policy``.
        defaults: hyperparameters of the torch namesake.
        options: see :class:`~fused_adaptive.optimizers.options.Options`.

    Attributes:
        grad_norm: the 2-norm of the unscaled, unclipped gradients of the last step with ``max_grad_norm`` or
            ``skip_nonfinite``: a 0-dim tensor on the gradients' device, float32 (float64 for float64 gradients); None
            before such a step. A compiled step or a captured graph overwrites the same tensor.

    Raises:
        TypeError, ValueError: for invalid hyperparameters, parameters or combinations of backbone and policy.
        RuntimeError: if the requested backend cannot run here; from ``step()``, for gradients that cannot be used.
            Nothing has changed then.
    """

    backbone: ClassVar[Backbone]
    #: Flags that loading a ``torch.optim`` checkpoint does not change, because torch's class has them fixed.
    _own_flags: ClassVar[tuple[str, ...]] = ()

    @eager
    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        **options: Unpack[Options],
    ) -> None:
        if unknown := options.keys() - OF_GROUPS.keys() - OF_OPTIMIZER.keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {min(unknown)!r}")
        own_options = {**OF_OPTIMIZER, **{name: value for name, value in options.items() if name in OF_OPTIMIZER}}
        defaults = {**defaults, **OF_GROUPS, **{name: value for name, value in options.items() if name in OF_GROUPS}}
        defaults |= checks.check_hyperparameters(defaults, is_new=True)
        self._shared = Shared(self)
        self.process_group, self._backend_requested = own_options["process_group"], own_options["backend"]
        self.max_grad_norm, self.skip_nonfinite = own_options["max_grad_norm"], own_options["skip_nonfinite"]
        self._step_backend = backends.select(own_options["backend"], ())
        self._resolutions = Resolutions(self.backbone)
        given: Any = params if isinstance(params, Tensor) else list(params)  # torch raises its own error for a tensor
        super().__init__(given, {**defaults, "policy": self._resolutions.of_all(given, defaults)})
        self._step_supports_amp_scaling = bool(defaults.get("fused"))

    @eager
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, at construction or during training; its parameters start with new state.

        Raises:
            ValueError, TypeError: as the constructor does; the optimizer has not changed then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict with 'params' and options, got {type(param_group).__name__}")
        if not isinstance(param_group["params"], (Tensor, set)):  # torch raises its own error for a set
            param_group["params"] = list(param_group["params"])
            checks.check_parameters(param_group["params"], sum(len(group["params"]) for group in self.param_groups))
        group = {**self.defaults, **param_group}
        numbers = checks.check_hyperparameters(group, is_new=True)
        policy = self._resolutions.plain(group["policy"], [group])
        check_naive([*(parse(g["policy"]) for g in self.param_groups[:1]), from_plain(policy)])
        backend = self._backend_for({**group, "policy": policy})
        param_group.update(numbers, policy=policy)
        super().add_param_group(param_group)
        reference_rates.meet(param_group)
        self._drop_participants()
        self._step_backend = backend

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimizer step over all parameters that have a gradient.

        Args:
            closure: clears the gradients, evaluates the loss, calls ``backward()`` and returns the loss. Required for
                ``TrainableLR(naive=True)``, which calls it twice; optional otherwise.

        Returns:
            The closure's first return value; None without a closure.

        Raises:
            RuntimeError: for a gradient that is sparse, not floating-point, or of another shape or device than its
                parameter. No parameter and no state has changed then.
        """
        if not torch.compiler.is_compiling():  # some versions of torch cannot trace it; a compiled step sets it itself
            self._opt_called = True  # torch's schedulers check it
        loss = self._step_once(closure) if self._release is None else self._release.step(closure)
        for listener in self._shared.after_step:  # torch's hooks run twice if a subclass calls super().step()
            listener()
        return loss

    # Without this, torch's schedulers wrap step() in a function that torch.compile refuses to trace.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _step_once(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            torch_compile.traced_step(self, *self._amp_inputs())
        elif (trial := self._collect_and_step(closure)) is not None and closure is not None:
            self._finish_trial(trial, closure)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as ``torch.optim.Optimizer.zero_grad`` does, which torch.compile refuses to trace."""
        if torch.compiler.is_compiling():
            torch_compile.traced_zero_grad(self.param_groups, set_to_none)
        else:
            super().zero_grad(set_to_none)

    @eager
    @torch.no_grad()
    def end_interval(self) -> None:
        """Ends the running interval of every policy now and restarts its step count.

        With ``interval=None`` no interval ends in any other way. The call is always allowed. Tensors without a
        gradient since the last end keep their gains.
        """
        complete = self._complete_participants()
        self._step_backend.end_interval(complete)
        complete.write_back()
        forget_idle_calls(self.param_groups)
        for listener in self._shared.after_end_interval:
            listener()

    @torch.no_grad()
    def restart_interval(self) -> None:
        """Restarts the running interval, for weights that were changed outside of ``step()``.

        Keeps the gains. Drops running sums, counts and the values kept from earlier intervals and directions.
        """
        for policy, views in self._complete_participants().members.items():
            policy.restart_interval(views)
        forget_idle_calls(self.param_groups)

    @torch.no_grad()
    def learning_rates(self, per_tensor: bool = False) -> list[dict[str, Any]]:
        """Returns the local learning rates ``lr·γ``.

        Copies them from the device in one transfer and waits for it, so do not call it in every step.

        Args:
            per_tensor: adds ``"tensors"``: the same numbers for each parameter of the group, in the group's order,
                with its name if the parameters are named. For a parameter that is sharded over ranks, they are over
                this rank's elements: the call communicates nothing, so a single rank may make it.

        Returns:
            For each group ``{"min", "mean", "max"}``, floats; means are over elements.
        """
        return learning_rates(self.param_groups, self.state, self._complete_participants().members, per_tensor)

    @eager
    def state_dict(self) -> dict[str, Any]:
        """Returns a checkpoint, as ``torch.optim.Optimizer.state_dict`` does.

        Converts numpy numbers in the groups to Python numbers, so that it loads with ``weights_only=True``. State of
        FullyShardedDataParallel's flat parameters is floating-point, since FullyShardedDataParallel flattens no other.
        """
        self._apply_changes()
        for group in self.param_groups:
            make_plain(group)
        return floats_of_flat(super().state_dict(), self.param_groups)

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of its ``torch.optim`` namesake (policies start with new state).

        The checkpoint's hyperparameters replace the current ones, the policy included: to continue with another
        policy, set ``group["policy"]`` after loading. State is not cast to the parameters' dtypes. As in torch, tensors
        that need no conversion are shared with ``state_dict``.

        Raises:
            ValueError: if the groups do not match, or state is missing or has the wrong shape. Nothing has changed
                then.
        """
        owner = unwrap(self)
        if owner is not self:  # the hooks of a handle are registered with its owner
            owner.load_state_dict(state_dict)
            return
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state, param_groups = restore(self.backbone, self.param_groups, state_dict, self.defaults, self._own_flags)
        check_naive([from_plain(group["policy"]) for group in param_groups])
        self._choose_backend(param_groups)
        # In place, since handles hold references to these two attributes.
        self.param_groups[:] = param_groups
        self.state.clear()
        self.state.update(state)
        self.__setstate__({"state": self.state, "param_groups": self.param_groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "an optimizer with process_group= cannot be copied or pickled, since the group cannot: build another "
                "and load this one's state_dict() into it"
            )
        self._apply_changes()
        return {**super().__getstate__(), **{name: getattr(self, name) for name in COPIED}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name not in COPIED})
        if "_shared" not in vars(self):  # self is a copy
            self._shared = Shared(self)
        for name in COPIED:
            if name in state:
                setattr(self, name, state[name])
        self._participants = self._bound = None
        self._resolutions.settle(self.param_groups)
        self._step_backend = self._choose_backend(self.param_groups)
        self._memberships = memberships_of_groups(self.backbone, self.param_groups, self.state)

    def _settle_policies(self) -> None:
        """Applies policies that were set in the param groups. Selects the backend again for other kinds or devices."""
        self._resolutions.settle(self.param_groups)
        if (kinds_of(self.param_groups), checks.devices_of(self.param_groups)) != (self._kinds, self._devices):
            self._step_backend = self._choose_backend(self.param_groups)

    def _backend_for(self, group: dict[str, Any]) -> backends.Backend:
        """Returns the backend for one more group: if possible the current one, so that many groups are added fast."""
        is_like = kinds_of([group]) <= self._kinds and checks.devices_of([group]) <= self._devices
        if is_like and not any(map(fake.is_fake, checks.tensors_of(group["params"]))):
            backends.check_masters(self._step_backend, [group])
            return self._step_backend
        self._settle_policies()
        return self._choose_backend([*self.param_groups, group])

    def _choose_backend(self, groups: Sequence[dict[str, Any]]) -> backends.Backend:
        policies = [policy for group in groups for policy in from_plain(group["policy"])]
        backend = backends.select(self._backend_requested, checks.devices_of(groups), policies)
        if any(fake.is_fake(p) for group in groups for p in checks.tensors_of(group["params"])):
            backend = cast(backends.Backend, fake)
        backends.check_masters(backend, groups)
        self._kinds, self._devices = kinds_of(groups), checks.devices_of(groups)
        return backend

    # ---- collecting participants: compares objects by identity, so torch.compile does not trace it ----

    @eager
    def _collect_and_step(self, closure: Callable[[], Any] | None) -> Trial | None:
        """Performs the step and returns None. If a trial must come before the update, only returns the trial."""
        grad_scale, found_inf = self._amp_inputs()
        checks.make_numbers_plain(self.param_groups)
        participants = self._current_participants()
        only_makes_state = False
        if participants is None or participants.has_newcomers():
            # All checks run before state is created. In later steps only the backend checks.
            checks.check_names(self.param_groups, self.defaults)
            checks.check_gradients(self.param_groups)
            self._settle_policies()
            policies = [from_plain(group["policy"]) for group in self.param_groups]
            check_naive(policies)
            check_split(self.param_groups, policies, self.process_group)
            checks.check_in_backward(unwrap(self), policies)
            checks.warn_of_parts(self, self._participants.groups if self._participants else (), policies)
            only_makes_state = not self.state and moves_nothing(self.param_groups, self.process_group)
            naive = trial_policy(chain.from_iterable(policies), self.param_groups, closure, self.process_group)
            participants = self._collect_participants()
        else:
            naive = trial_policy(participants.members, self.param_groups, closure, self.process_group)
        reference_rates.follow(self.param_groups)
        grad_norm = self.grad_norm
        if self.max_grad_norm is not None or self.skip_nonfinite:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            try:
                grad_norm, grad_scale, found_inf = clip(
                    grads, self.max_grad_norm, self.skip_nonfinite, grad_scale, found_inf
                )
            except RuntimeError:
                participants.check_gradients()  # raises an error that names the parameter, of a sparse gradient, say
                raise
        if naive is None:
            self._update_tensors(participants, found_inf, grad_scale, only_makes_state)
        self.grad_norm = grad_norm
        return None if naive is None else Trial(naive, participants, found_inf, grad_scale)

    def _amp_inputs(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns ``grad_scale`` and ``found_inf``, each None unless GradScaler has set it."""
        return getattr(self._shared, "grad_scale", None), getattr(self._shared, "found_inf", None)

    @eager
    def _finish_trial(self, trial: Trial, closure: Callable[[], Any]) -> None:
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        evaluate_trial(trial, params, closure, self._random_rates)
        self._update_tensors(trial.participants, trial.found_inf, trial.grad_scale)

    def _update_tensors(
        self,
        participants: Participants,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        only_makes_state: bool = False,
    ) -> None:
        """Performs the update. Updates this rank's shards of DTensors."""
        participants.localize_gradients()
        calls = [count.clone() for count in participants.counts()] if only_makes_state else []
        self._step_backend.step(participants, found_inf, grad_scale, None if only_makes_state else self._random_rates)
        if only_makes_state:  # torch.distributed.checkpoint steps like this to create state, which is no call
            for policy, views in participants.members.items():
                policy.restart_interval(views)
            for count, number in zip(participants.counts(), calls, strict=True):
                count.copy_(number)
        else:
            count_idle_calls(participants.idle, found_inf)
        participants.write_back()
        if any(p.grad is not None for p in participants.incomplete):  # the update has created SGD's buffers
            self._bound = None
            participants.renew(self.state)

    def _current_participants(self) -> Participants | None:
        """Returns the participants of the last step if nothing has changed since, else None."""
        last = self._participants
        return last if last is not None and last.is_current(self.param_groups, self.state) else None

    @torch.no_grad()
    def _collect_participants(self, in_step: bool = True) -> Participants:
        backends.check_masters(self._step_backend, self.param_groups)
        # Before collecting, so that state which the user has dropped is freed before new state is created.
        self._drop_participants()
        participants = collect(
            self.backbone, self.param_groups, self.state, self._memberships, self.process_group, in_step
        )
        self._memberships = participants.memberships()
        participants.captured = self._captured
        if in_step:
            self._participants = participants
            torch_compile.announce(self, participants)
        return participants

    def _drop_participants(self) -> None:
        if self._participants is not None:
            self._participants.drop_unfilled()
        self._participants = self._bound = None

    @eager
    def _complete_participants(self) -> Participants:
        """Returns the participants outside of a step, after applying changes made to the param groups."""
        if (current := self._current_participants()) is not None:
            return current
        checks.check_names(self.param_groups, self.defaults)
        self._settle_policies()
        return self._collect_participants(in_step=False)

    def _apply_changes(self) -> None:
        """Adapts state to policies and structure that were set in the param groups; drops momentum without a value."""
        if (last := self._participants) is not None:
            last.drop_unfilled()
        if self._current_participants() is None:
            self._settle_policies()
            memberships = memberships_of_groups(self.backbone, self.param_groups, self.state)
            if any(self._memberships.get(p, membership) != membership for p, membership in memberships.items()):
                self._collect_participants(in_step=False)
