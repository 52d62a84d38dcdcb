"""Whether param groups and state are still what they were: all that was gathered from them is kept as long as they are.

Anyone may change ``param_groups`` and ``state`` between two steps, and people do. So every step compares them with a
copy, entry by entry, but in C loops: 0.1 µs a tensor, where gathering anew takes several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import python_calls
from .backbones import Backbone


class Fingerprint:
    """What ``groups`` and ``states`` were when this was made.

    Args:
        backbone: names the hyperparameters that decide which state there is and which kernel runs. All others (lr,
            betas, eps, …) are read at every step and are not compared.
        groups: the param groups.
        states: ``optimizer.state``, the entries of other keys than parameters included.
    """

    def __init__(self, backbone: Backbone, groups: Sequence[dict[str, Any]], states: Mapping[Any, Any]) -> None:
        self._backbone = backbone
        self._groups = [
            _Group(group, list(group["params"]), _copy(group["policy"]), backbone.structure(group)) for group in groups
        ]
        self._same_objects = python_calls.same_objects() if isinstance(states, dict) else None
        if self._same_objects is not None:
            self._objects = python_calls.objects_of(states)
            return
        self._dicts = list(states.values())
        self._states = {key: _copy(values) for key, values in states.items()}

    def matches(self, groups: Sequence[dict[str, Any]], states: Mapping[Any, Any]) -> bool:
        """Whether they are still the same objects, with the same parameters, policies, structure and state tensors."""
        try:
            with _SameTensor():
                return (
                    len(groups) == len(self._groups)
                    and all(map(self._is_same, groups, self._groups))
                    and self._are_same(states)
                )
        except Exception:  # what is no tensor has been replaced by something that refuses to be compared
            return False

    def _are_same(self, states: Mapping[Any, Any]) -> bool:
        if self._same_objects is not None:
            return isinstance(states, dict) and bool(self._same_objects(states, self._objects))
        # Dicts are compared in C, which takes identical values for equal without asking them.
        return states == self._states and all(map(is_, states.values(), self._dicts))

    def _is_same(self, group: dict[str, Any], seen: _Group) -> bool:
        params = group["params"]
        return (
            group is seen.group
            and self._backbone.structure(group) == seen.structure
            and group["policy"] == seen.policy
            and len(params) == len(seen.params)
            and all(map(is_, params, seen.params))
        )


class _Group(NamedTuple):
    group: dict[str, Any]
    params: list[Tensor]
    policy: Any
    structure: tuple[Any, ...]


class _SameTensor(TorchFunctionMode):
    """Within it, two tensors that are not the same object are not equal: no kernel runs, and no host waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


def _copy(value: Any) -> Any:
    """Deep enough for a policy and for the state of a parameter: tensors stay the same objects."""
    if isinstance(value, dict):
        return dict(value)
    return [dict(v) for v in value] if isinstance(value, list) and all(isinstance(v, dict) for v in value) else value
