"""The learning-rate policies, and how they stand in a param group: as plain dicts of name and arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..backbones import Backbone, Group
from .active import ActiveLR
from .base import FixedLR, Policy, ScalarPolicy
from .hypergradient import Hypergradient
from .trainable import TrainableLR

__all__ = [
    "ActiveLR",
    "FixedLR",
    "Hypergradient",
    "Policy",
    "ScalarPolicy",
    "TrainableLR",
    "from_plain",
    "to_plain",
]

_BY_NAME: dict[str, type[Policy]] = {c.__name__: c for c in (FixedLR, ActiveLR, TrainableLR, Hypergradient)}

Plain = dict[str, Any] | list[dict[str, Any]]

#: What each plain form stands for: there are a few in a program, and they are read at every step. Not an lru_cache,
#: which torch.compile warns of.
_BUILT: dict[Any, tuple[Policy, ...]] = {}


def to_plain(policy: Any, backbone: Backbone, group: Group) -> Plain:
    """The form of ``policy`` that stands in a param group, with the backbone's defaults filled in.

    Args:
        policy: None (fixed), a policy, a tuple or list of policies, or the plain form itself.

    Raises:
        TypeError: for anything else.
        ValueError: where the policies cannot be combined or cannot drive the backbone.
    """
    if policy is None:
        policy = FixedLR()
    together = isinstance(policy, (tuple, list)) and len(policy) != 1
    policies = [_as_policy(p) for p in (policy if isinstance(policy, (tuple, list)) else (policy,))]
    if together:
        policies = _compose(policies)
    policies = [p.resolve(backbone) for p in policies]
    for p in policies:
        p.check(backbone, group)
    return [p.arguments() for p in policies] if together else policies[0].arguments()


def from_plain(plain: Plain) -> tuple[Policy, ...]:
    """The policies that a param group names."""
    dicts: Sequence[Mapping[str, Any]] = [plain] if isinstance(plain, Mapping) else plain
    key = tuple(tuple(d.items()) for d in dicts)
    if key not in _BUILT:
        _BUILT[key] = tuple(_as_policy(d) for d in dicts)
    return _BUILT[key]


def _as_policy(policy: Any) -> Policy:
    if isinstance(policy, Policy):
        return policy
    known = ", ".join(_BY_NAME)
    if not isinstance(policy, Mapping):
        raise TypeError(f"policy must be one of {known}, a tuple of two of them, or None; got {policy!r}")
    arguments = dict(policy)
    name = arguments.pop("name", None)
    if name not in _BY_NAME:
        raise ValueError(f"unknown policy {name!r}: known are {known}")
    return _BY_NAME[name].from_arguments(arguments)


def _compose(policies: Sequence[Policy]) -> list[Policy]:
    """ActiveLR's gain of each element times TrainableLR's: the only two that go together."""
    composed = [
        p.with_source(p.source or "gradient") if isinstance(p, TrainableLR) and not p.naive else p for p in policies
    ]
    kinds = sorted(type(p).__name__ for p in composed)
    if kinds != ["ActiveLR", "TrainableLR"]:
        raise ValueError(
            f"these policies do not go together: {', '.join(kinds) or 'none'}; a tuple of policies is one ActiveLR and "
            "one TrainableLR (source='gradient')"
        )
    for p in composed:
        if isinstance(p, TrainableLR) and (p.naive or p.source != "gradient"):
            raise ValueError(
                "together with ActiveLR, TrainableLR measures gradients: use source='gradient' and naive=False "
                f"(got source={p.source!r}, naive={p.naive})"
            )
    return composed
