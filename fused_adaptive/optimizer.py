"""The base class of the optimizers: a ``torch.optim.Optimizer`` that gathers parameters and hands them to a backend.

The path of a step: ``step()`` → policies and backbone of each group → ``backend.step`` → kernel. This is the only place
that walks over param groups, and it never reads a tensor's value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor

from . import backends
from .backbones import Backbone
from .checkpoint import restore, specs
from .checks import check_gradient, check_hyperparameters, check_parameters
from .policies import Policy, TrainableLR, from_plain, to_plain
from .policies.naive import evaluate_trial, needs_trial
from .rates import group_rates
from .slot import Slot
from .state import State

_F = TypeVar("_F", bound=Callable[..., Any])

if TYPE_CHECKING:
    from .controllers.draws import RateDraw

if TYPE_CHECKING:

    def _eager(function: _F) -> _F: ...

else:
    # torch.compile does not trace what runs once. torch.compiler.disable would import all of dynamo here, 2 s.
    _eager = torch._disable_dynamo

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Members = dict[Policy, list[Slot]]


class AdaptiveOptimizer(torch.optim.Optimizer):
    """A backbone driven by a learning-rate policy: ``p ← p − lr·γ·u``. Use the subclasses.

    Args:
        params: parameters, named parameters or param groups, as in torch; a group may have its own ``policy``.
        defaults: hyperparameters of the torch namesake.
        policy: a :class:`~fused_adaptive.policies.Policy`, a tuple of one ActiveLR and one TrainableLR, or None
            (:class:`FixedLR`).
        backend: ``"auto"`` (default) or the name of a backend, see :func:`fused_adaptive.backends.available`.

    Raises:
        TypeError, ValueError: for bad hyperparameters, parameters or combinations of backbone and policy.
        RuntimeError: if the backend that was asked for cannot run here; from ``step()``, for gradients that cannot be
            used. Then nothing has changed.
    """

    backbone: ClassVar[Backbone]
    #: Set by ASLR: what each tensor's rate is multiplied by. Not copied or saved with the optimizer.
    _rate_draw: RateDraw | None = None

    def __init__(self, params: Params, defaults: dict[str, Any], policy: Any = None, backend: str = "auto") -> None:
        check_hyperparameters(defaults)
        self._backend_requested = backend
        self._backend = backends.select(backend, ())
        super().__init__(params, {**defaults, "policy": to_plain(policy, self.backbone, defaults)})
        # Asks GradScaler to hand over grad_scale and found_inf instead of unscaling and skipping itself.
        self._step_supports_amp_scaling = bool(defaults.get("fused"))

    @_eager
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
        policy = to_plain(group["policy"], self.backbone, group)
        self._check_naive([*(from_plain(g["policy"]) for g in self.param_groups), from_plain(policy)])
        backend = backends.select(self._backend_requested, self._devices() | devices_of(param_group["params"]))
        param_group["policy"] = policy
        super().add_param_group(param_group)
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
        naive = self._naive_policy()
        if naive is not None and closure is None and needs_trial(self.param_groups):
            raise RuntimeError(
                "TrainableLR(naive=True) evaluates the loss twice: pass step(closure) a function that clears the "
                "gradients, evaluates the loss, calls backward() and returns the loss"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        slots, members = self._gather()
        if naive is not None and closure is not None and needs_trial(self.param_groups):
            evaluate_trial(naive, members[naive], closure)
        found_inf, draw = getattr(self, "found_inf", None), self._rate_draw
        if draw is not None:
            draw.assign(slots)
        self._backend.step(slots, members, found_inf)
        if draw is not None:
            draw.count(found_inf)
        return loss

    @torch.no_grad()
    def end_interval(self) -> None:
        """Ends the running interval of every policy here and now, and restarts their counts.

        The only way with ``interval=None``. Always allowed; tensors that had no gradient since the last end keep what
        they have.
        """
        self._backend.end_interval(self._members())
        self._count_idle_calls(None)

    @torch.no_grad()
    def restart_interval(self) -> None:
        """Begins the interval anew, for weights that were changed from outside.

        Gains stay. Running sums, counts and what is remembered of earlier intervals are dropped; directions that are
        read from the backbone's own state (Hypergradient) stay with it.
        """
        for policy, slots in self._members().items():
            policy.restart_interval(slots)
        self._count_idle_calls(None)

    @torch.no_grad()
    def learning_rates(self, per_tensor: bool = False) -> list[dict[str, Any]]:
        """The local learning rates ``lr·γ``. Reads them back from the device, so not for every step.

        Args:
            per_tensor: adds ``"tensors"``, the same for each parameter of the group, in its order, with its name
                where the parameters are named.

        Returns:
            For each group ``{"min", "mean", "max"}``, floats; means are over elements.
        """
        members = self._members()
        return [group_rates(group, self.state, members, per_tensor) for group in self.param_groups]

    @_eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class, or of its ``torch.optim`` namesake (policy state starts fresh).

        The checkpoint's hyperparameters win, its policy included. State keeps its own dtypes, whatever the
        parameters'. As in torch, tensors that need no conversion are shared with ``state_dict``.

        Raises:
            ValueError: if groups do not match, or state is missing or of the wrong shape. Then nothing has changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state, param_groups = restore(self.backbone, self.param_groups, state_dict)
        self.__setstate__({"state": state, "param_groups": param_groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "_backend_requested": self._backend_requested,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._backend = backends.select(self._backend_requested, self._devices())

    # ---- gathering ----

    def _devices(self) -> set[torch.device]:
        return set().union(*(devices_of(group["params"]) for group in self.param_groups))

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        return ((group, p) for group in self.param_groups for p in group["params"])

    def _check_gradients(self) -> None:
        names = chain.from_iterable(g.get("param_names", [None] * len(g["params"])) for g in self.param_groups)
        for index, ((_, p), name) in enumerate(zip(self._parameters(), names, strict=True)):
            check_gradient(index, p, name)

    def _naive_policy(self) -> TrainableLR | None:
        policy = from_plain(self.param_groups[0]["policy"])[0]
        return policy if isinstance(policy, TrainableLR) and policy.naive else None

    def _check_naive(self, policies: list[tuple[Policy, ...]]) -> None:
        if any(p.naive for group in policies for p in group) and len(set(policies)) > 1:
            raise ValueError(
                "TrainableLR(naive=True) evaluates the loss of the whole model at a trial point: all param groups must "
                "have that same policy"
            )

    def _gather(self) -> tuple[list[Slot], Members]:
        """The tensors of this step, their state complete: those with a gradient, and those that have had one."""
        slots, late, positions = [], [], count()
        grad_scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            spec = specs(self.backbone, group)
            required = [name for name, s in spec.items() if not s.optional]
            for p, index in zip(group["params"], positions, strict=False):
                applies = p.grad is not None
                state = self.state.get(p, {})
                complete = all(name in state for name in required)
                if not applies and not (complete and state):
                    continue
                if spec:
                    state = self.state[p]
                slots.append(Slot(p, state, group, self.backbone, applies, grad_scale, index))
                if not complete:
                    late.append((slots[-1], spec))
        self._join(slots, late)
        return slots, _by_policy(slots)

    def _join(self, slots: list[Slot], late: list[tuple[Slot, dict[str, Any]]]) -> None:
        """Gives newcomers their state; what a policy's tensors share, they take from those that were there before."""
        newcomers = {id(slot) for slot, _ in late}
        peers = {policy: old[0] for policy, old in _by_policy(s for s in slots if id(s) not in newcomers).items()}
        for slot, spec in late:
            missing = [name for name, s in spec.items() if name not in slot.state and not s.optional]
            for name in missing:
                slot.state[name] = spec[name].create(slot.param, slot.group)
            for policy in from_plain(slot.group["policy"]):
                peer = peers.setdefault(policy, slot)
                for name in policy.shared_names():
                    if peer is not slot and name in missing:
                        slot.state[name].copy_(peer.state[name])
                    elif name == policy.counter and name in missing:
                        idle = slot.group.get("idle_calls", 0)
                        slot.state[name].fill_(idle % policy.interval if policy.interval else idle)
        self._count_idle_calls({id(slot.group) for slot in slots})

    def _count_idle_calls(self, active: set[int] | None) -> None:
        """Calls that found no state to count in: before the first gradient of a group, the group itself counts.

        Args:
            active: ids of the groups that have state; None: an interval has ended for all.
        """
        for group in self.param_groups:
            if active is None or id(group) in active:
                group.pop("idle_calls", None)
            elif any(policy.counter for policy in from_plain(group["policy"])):
                group["idle_calls"] = group.get("idle_calls", 0) + 1

    def _members(self) -> Members:
        """Of every policy, the tensors that have state, outside of a step."""
        slots = []
        for group in self.param_groups:
            required = [name for name, s in specs(self.backbone, group).items() if not s.optional]
            for p in group["params"]:
                state: State = self.state.get(p, {})
                if state and all(name in state for name in required):
                    slots.append(Slot(p, state, group, self.backbone))
        return _by_policy(slots)


def devices_of(params: Iterable[Any]) -> set[torch.device]:
    """The devices of parameters, named parameters or a single tensor."""
    tensors = [params] if isinstance(params, Tensor) else (p[1] if isinstance(p, tuple) else p for p in params)
    return {p.device for p in tensors if isinstance(p, Tensor)}


def _by_policy(slots: Iterable[Slot]) -> Members:
    members: Members = {}
    for slot in slots:
        for policy in from_plain(slot.group["policy"]):
            members.setdefault(policy, []).append(slot)
    return members
