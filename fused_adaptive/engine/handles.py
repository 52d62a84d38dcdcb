"""An optimizer and what it is seen through: the handles of Lightning and Fabric, the wrappers of Accelerate and others.

A handle is an object of a subclass that copies the optimizer's ``__dict__`` or asks it for what it lacks. Whatever is
set on a handle must reach the optimizer, so all that changes is kept in one object, which copies of ``__dict__`` share.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..core.plain import plain_flag
from .clipping import check_max_grad_norm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from ..core.random_rates import RandomRates
    from ..policies import Policy
    from .membership import Memberships
    from .participants import Participants
    from .resolution import Resolutions

#: What copies and pickles of an optimizer keep, besides param groups and state.
COPIED = (
    "grad_norm",
    "max_grad_norm",
    "skip_nonfinite",
    "_backend_requested",
    "_resolutions",
    "_step_supports_amp_scaling",
)

#: What torch's constructor sets.
_TORCHS = (
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
    """What an optimizer has in common with its handles. Each entry is an attribute of the optimizer's class, too."""

    process_group: ProcessGroup | None = None
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    grad_norm: Tensor | None = None
    _backend_requested: str
    _backend: Any
    _resolutions: Resolutions
    _kinds: AbstractSet[type[Policy]] = frozenset()
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
    """An attribute of an optimizer that is kept in its :class:`Shared`. ``check`` returns what is set, or raises."""

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


class _OfInner:
    """Stands for what an object lacks whose ``__init__`` was not an optimizer's: it is that of the one inside."""

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
    """An optimizer whose attributes are the same through all of its handles."""

    _shared: Shared
    process_group: ProcessGroup | None = _attribute()
    max_grad_norm: float | None = _attribute(check_max_grad_norm)
    skip_nonfinite: bool = _attribute(lambda value: bool(plain_flag("skip_nonfinite", value)))
    grad_norm: Tensor | None = _attribute()
    _backend_requested: str = _attribute()
    _backend: Any = _attribute()
    _resolutions: Resolutions = _attribute()
    #: The policies that the backend was chosen for.
    _kinds: AbstractSet[type[Policy]] = _attribute()
    #: Asks GradScaler to hand over grad_scale and found_inf instead of unscaling and skipping itself.
    _step_supports_amp_scaling: bool = _attribute()
    grad_scale: Any = _attribute()
    found_inf: Any = _attribute()
    _opt_called: bool = _attribute()
    # What follows is neither copied nor saved with the optimizer.
    #: Set by ASLR: what each tensor's rate is multiplied by.
    _random_rates: RandomRates | None = _attribute()
    #: Of the last step.
    _participants: Participants | None = _attribute()
    #: How the tensors stood when their state last was complete.
    _memberships: Memberships = _attribute()
    #: Set by release_gradients, which steps in the backward pass.
    _release: Any = _attribute()
    #: The tensors that code compiled by torch.compile has handed to the last step.
    _bound: Any = _attribute()
    #: The param groups as torch.compile sees them, and those that have no state yet.
    _traced: Sequence[Any] = _attribute()
    _traced_idle: Any = _attribute()
    #: The controller that owns the learning rates.
    _lr_owner: Any = _attribute()
    #: What CUDA graphs of its steps point to: tables, state, numbers.
    _captured: list[Any] = _attribute()


for _name in ("_shared", *_TORCHS):
    setattr(Handled, _name, _OfInner(_name))


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside what a trainer or Accelerate has wrapped around it, or that a handle was made of.

    Raises:
        TypeError: if there is none of this package's inside.
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
    """The optimizer that steps, of any package: a wrapper is left aside where it has no param groups of its own.

    Raises:
        TypeError: for what is no optimizer, and holds none.
    """
    attributes = getattr(optimizer, "__dict__", {})
    if isinstance(attributes.get("_shared"), Shared):
        return _owner(attributes["_shared"], optimizer)
    inner = inside(optimizer)
    if isinstance(optimizer, Optimizer) and "_optimizer_step_post_hooks" in attributes:
        return driven(inner) if _same_groups(optimizer, inner) else optimizer
    if inner is not None:
        return driven(inner)
    if isinstance(optimizer, Optimizer):
        raise TypeError(_never_constructed(optimizer))
    raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")


def inside(wrapper: Any) -> Any:
    """What a wrapper holds as ``optimizer``, or the only optimizer among its attributes; None if there is none."""
    inner = getattr(wrapper, "optimizer", None)
    if inner is None:
        held = [value for value in getattr(wrapper, "__dict__", {}).values() if isinstance(value, Optimizer)]
        inner = held[0] if len(held) == 1 else None
    return inner


def _same_groups(optimizer: Optimizer, inner: Any) -> bool:
    own, others = optimizer.param_groups, getattr(inner, "param_groups", ())
    return len(own) == len(others) and all(a is b for a, b in zip(own, others, strict=True))


def _owner(shared: Shared, handle: Any) -> Any:
    owner = shared.owner()
    if owner is None:  # it is gone, and the handle stands for it
        shared.owner, owner = weakref.ref(handle), handle
    return owner


def _never_constructed(wrapper: Any) -> str:
    return (
        f"{type(wrapper).__name__} is an optimizer by its class, but its __init__ has not called super().__init__(): "
        "call it, or pass the optimizer that it wraps (fused_adaptive.integrations.unwrap finds one that is held as "
        ".optimizer)"
    )
