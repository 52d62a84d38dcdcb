"""Detects changes of param groups and state. A step keeps its participants until something changes.

Any code may change ``param_groups`` and ``state`` between two steps. So every step compares them with a copy, entry by
entry, in C loops: this takes 0.1 µs per tensor, whereas collecting the participants again takes several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core import python_calls
from ..core.backbone import Backbone


class Fingerprint:
    """Snapshot of ``groups`` and ``states`` at construction.

    Args:
        backbone: provides the hyperparameters that decide which state exists and which kernel runs. All others (lr,
            betas, eps, …) are read at every step and are not compared.
        groups: the param groups.
        states: ``optimizer.state``, including entries whose keys are not parameters.
    """

    def __init__(self, backbone: Backbone, groups: Sequence[dict[str, Any]], states: Mapping[Any, Any]) -> None:
        self._backbone = backbone
        self._groups = [
            _Group(g, frozenset(g), list(g["params"]), _seen(_policies(g)), backbone.static_options(g)) for g in groups
        ]
        self._states = _seen(states)

    def matches(self, groups: Sequence[dict[str, Any]], states: Mapping[Any, Any]) -> bool:
        """Returns whether these are the same objects, with the same parameters, policies, options and state tensors."""
        try:
            return (
                len(groups) == len(self._groups)
                and all(map(self._is_same, groups, self._groups))
                and self._states.matches(states)
            )
        except Exception:  # an entry was replaced by an object that cannot be compared
            return False

    def _is_same(self, group: dict[str, Any], seen: _Group) -> bool:
        params = group["params"]
        return (
            group is seen.group
            and seen.names <= group.keys()
            and self._backbone.static_options(group) == seen.options
            and seen.policies.matches(_policies(group))
            and _same_items(params, seen.params)
        )


class _Group(NamedTuple):
    group: dict[str, Any]
    names: frozenset[str]
    params: list[Tensor]
    policies: _Objects | _Copies
    options: tuple[Any, ...]


def _policies(group: dict[str, Any]) -> dict[int, Any]:
    policy = group["policy"]
    return dict(enumerate(policy)) if isinstance(policy, list) else {0: policy}


def _same_items(items: Any, seen: list[Any]) -> bool:
    same_items = python_calls.same_items() if isinstance(items, list) else None
    if same_items is None:
        return len(items) == len(seen) and all(map(is_, items, seen))
    return bool(same_items(items, seen))


def _seen(dicts: Mapping[Any, Any]) -> _Objects | _Copies:
    same_objects = python_calls.same_objects() if isinstance(dicts, dict) else None
    return _Copies(dicts) if same_objects is None else _Objects(dicts, same_objects)


class _Objects:
    """Snapshot of a dict of dicts, compared by the native library: by identity of the objects in it."""

    def __init__(self, dicts: Mapping[Any, Any], same_objects: Callable[[Any, list[Any]], int]) -> None:
        self._objects, self._same_objects = python_calls.objects_of(dicts), same_objects

    def matches(self, dicts: Mapping[Any, Any]) -> bool:
        return isinstance(dicts, dict) and bool(self._same_objects(dicts, self._objects))


class _Copies:
    """Snapshot of a dict of dicts, compared by Python: in C, which does not call ``__eq__`` of identical values."""

    def __init__(self, dicts: Mapping[Any, Any]) -> None:
        self._values = list(dicts.values())
        self._copies = {key: dict(value) if isinstance(value, dict) else value for key, value in dicts.items()}

    def matches(self, dicts: Mapping[Any, Any]) -> bool:
        with _SameTensor():
            return dicts == self._copies and all(map(is_, dicts.values(), self._values))


class _SameTensor(TorchFunctionMode):
    """Context in which different tensor objects are unequal: no kernel runs, and the host does not wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False
