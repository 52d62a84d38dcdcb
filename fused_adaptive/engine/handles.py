"""Handles of an optimizer: those of Lightning and Fabric, and the wrappers of Accelerate and others.

A handle is an object of a subclass that copies the optimizer's ``__dict__`` or delegates missing attributes to it. An
attribute that is set on a handle must reach the optimizer, so all attributes that change are in one object, which
copies of ``__dict__`` share.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..core.plain import plain_flag
from .clipping import check_max_grad_norm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from ..core.random_rates import RandomRates
    from ..policies import Policy
    from .membership import Memberships
    from .participants import Participants
    from .resolution import Resolutions

#: Attributes that copies and pickles of an optimizer keep, besides param groups and state.
COPIED = (
    "grad_norm",
    "max_grad_norm",
    "skip_nonfinite",
    "_backend_requested",
    "_resolutions",
    "_step_supports_amp_scaling",
)

#: Attributes that torch's constructor sets.
_TORCH_ATTRIBUTES = (
    "defaults",
    "param_groups",
    "state",
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Shared:
    """Attributes that an optimizer shares with its handles. Each is an attribute of the optimizer's class, too."""

    process_group: ProcessGroup | None = None
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    grad_norm: Tensor | None = None
    _backend_requested: str
    _step_backend: Any
    _resolutions: Resolutions
    _kinds: AbstractSet[type[Policy]] = frozenset()
    _devices: AbstractSet[torch.device] = frozenset()
    _step_supports_amp_scaling: bool = False
    _opt_called: bool = False
    _random_rates: RandomRates | None = None
    _participants: Participants | None = None
    _memberships: Memberships = MappingProxyType({})
    _bound: Any = None
    _traced: Sequence[Any] = ()
    _traced_idle: Any = ()
    _release: Any = None
    _lr_owner: weakref.ref[Any] | None = None

    def __init__(self, owner: Handled) -> None:
        self.owner = weakref.ref(owner)
        self.after_step: list[Callable[[], None]] = []
        self.after_end_interval: list[Callable[[], None]] = []
        self._captured: list[Any] = []


class _Attribute:
    """Attribute of an optimizer, stored in its :class:`Shared`. ``check`` returns the value to store, or raises."""

    def __init__(self, check: Callable[[Any], Any] | None) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else getattr(optimizer._shared, self._name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        setattr(optimizer._shared, self._name, value if self._check is None else self._check(value))

    def __delete__(self, optimizer: Any) -> None:
        delattr(optimizer._shared, self._name)


class _InnerAttribute:
    """Attribute that a wrapper lacks if it did not call an optimizer's ``__init__``: that of the optimizer inside."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, handle: Any, owner: type) -> Any:
        if handle is None:
            return self
        inner = inside(handle)
        if inner is None:
            raise TypeError(_never_constructed(handle))
        return getattr(inner, self._name)


def _attribute(check: Callable[[Any], Any] | None = None) -> Any:
    return _Attribute(check)


class Handled(Optimizer):
    """Optimizer whose attributes are the same through all of its handles."""

    _shared: Shared
    process_group: ProcessGroup | None = _attribute()
    max_grad_norm: float | None = _attribute(check_max_grad_norm)
    skip_nonfinite: bool = _attribute(lambda value: bool(plain_flag("skip_nonfinite", value)))
    grad_norm: Tensor | None = _attribute()
    _backend_requested: str = _attribute()
    _step_backend: Any = _attribute()
    _resolutions: Resolutions = _attribute()
    #: Classes of the policies, and devices, that the backend was chosen for.
    _kinds: AbstractSet[type[Policy]] = _attribute()
    _devices: AbstractSet[torch.device] = _attribute()
    #: Whether GradScaler passes grad_scale and found_inf to the step, instead of unscaling and skipping itself.
    _step_supports_amp_scaling: bool = _attribute()
    grad_scale: Any = _attribute()
    found_inf: Any = _attribute()
    _opt_called: bool = _attribute()
    # The attributes below are neither copied nor saved with the optimizer.
    #: Set by ASLR: random factors of the tensors' rates.
    _random_rates: RandomRates | None = _attribute()
    #: Participants of the last step.
    _participants: Participants | None = _attribute()
    #: Memberships of the tensors when their state was last complete.
    _memberships: Memberships = _attribute()
    #: Set by release_gradients, which steps in the backward pass.
    _release: Any = _attribute()
    #: Tensors that code compiled by torch.compile passed to the last step.
    _bound: Any = _attribute()
    #: The param groups for torch.compile, and those of them that have no state yet.
    _traced: Sequence[Any] = _attribute()
    _traced_idle: Any = _attribute()
    #: The controller that owns the learning rates.
    _lr_owner: Any = _attribute()
    #: Memory that CUDA graphs of its steps point to: tables, state, numbers.
    _captured: list[Any] = _attribute()


for _name in ("_shared", *_TORCH_ATTRIBUTES):
    setattr(Handled, _name, _InnerAttribute(_name))


def unwrap(optimizer: Any) -> Any:
    """Returns the optimizer inside the wrapper of a trainer or of Accelerate, or behind a handle.

    Raises:
        TypeError: if there is no optimizer of this package inside.
    """
    inner, seen = optimizer, set()
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        shared = getattr(inner, "__dict__", {}).get("_shared")
        if isinstance(shared, Shared):
            return _owner(shared, inner)
        inner = inside(inner)
    is_constructed = "_optimizer_step_post_hooks" in getattr(optimizer, "__dict__", {})
    if isinstance(optimizer, Optimizer) and not is_constructed and inside(optimizer) is None:
        raise TypeError(_never_constructed(optimizer))
    raise TypeError(f"{type(optimizer).__name__} is no optimizer of fused_adaptive, and holds none")


def driven(optimizer: Any) -> Optimizer:
    """Returns the optimizer that steps, of any package. A wrapper without param groups of its own is skipped.

    Raises:
        TypeError: for an object that is not an optimizer and has none inside, and for a wrapper whose param groups are
            not those of the optimizer inside, if that is one of this package.
    """
    given, seen = optimizer, set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        attributes = getattr(optimizer, "__dict__", {})
        if isinstance(attributes.get("_shared"), Shared):
            return _owner(attributes["_shared"], optimizer)
        inner = inside(optimizer)
        is_constructed = isinstance(optimizer, Optimizer) and "_optimizer_step_post_hooks" in attributes
        if is_constructed and not _same_groups(optimizer, inner):
            _check_own_groups(optimizer, inner)
            return optimizer
        if inner is None:
            break
        optimizer = inner
    if isinstance(optimizer, Optimizer):
        raise TypeError(_never_constructed(optimizer))
    raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(given).__name__}")


def inside(wrapper: Any) -> Any:
    """Returns ``optimizer`` of a wrapper, or the only optimizer among its attributes; None if there is none."""
    inner = getattr(wrapper, "optimizer", None)
    if inner is None or isinstance(inner, str):  # a name, as configurations have it
        held = [value for value in getattr(wrapper, "__dict__", {}).values() if isinstance(value, Optimizer)]
        inner = held[0] if len(held) == 1 else None
    return inner


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizer and those inside, which have state of their own: under ZeroRedundancyOptimizer, e.g."""
    found: list[Optimizer] = []
    waiting: list[Any] = [optimizer]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, Optimizer) and all(one is not other for other in found):
            found.append(one)
            lists = [value for value in vars(one).values() if isinstance(value, (list, tuple))]
            waiting += [inside(one), *chain.from_iterable(lists)]
    return found


def _check_own_groups(wrapper: Any, inner: Any) -> None:
    """Raises TypeError for a wrapper with the parameters of an optimizer of this package in groups of its own."""
    if not isinstance(getattr(inner, "__dict__", {}).get("_shared"), Shared):
        return
    own, inner_groups = wrapper.param_groups, inner.param_groups
    params, inner_params = ({id(p) for group in groups for p in group["params"]} for groups in (own, inner_groups))
    if params == inner_params and not {id(group) for group in own} & {id(group) for group in inner_groups}:
        raise TypeError(
            f"{type(wrapper).__name__} has param groups of its own, and the {type(inner).__name__} inside has others: "
            "pass the optimizer inside, or give both the same groups"
        )


def _same_groups(optimizer: Optimizer, inner: Any) -> bool:
    groups, inner_groups = optimizer.param_groups, getattr(inner, "param_groups", ())
    return len(groups) == len(inner_groups) and all(a is b for a, b in zip(groups, inner_groups, strict=True))


def _owner(shared: Shared, handle: Any) -> Any:
    owner = shared.owner()
    if owner is None:  # it was deleted: the handle takes its place
        shared.owner, owner = weakref.ref(handle), handle
    return owner


def _never_constructed(wrapper: Any) -> str:
    return (
        f"{type(wrapper).__name__} is an optimizer by its class, but its __init__ has not called super().__init__(): "
        "call it, or pass the optimizer that it wraps (fused_adaptive.integrations.unwrap finds one that is held as "
        ".optimizer)"
    )
