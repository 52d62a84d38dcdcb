"""The learning-rate policies, and how they stand in a param group: as plain dicts of name and arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..core.backbone import Backbone, Group
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
    "is_plain",
    "kinds_of",
    "parse",
    "register",
    "resolve",
]

_BY_NAME: dict[str, type[Policy]] = {c.__name__: c for c in (FixedLR, ActiveLR, TrainableLR, Hypergradient)}


def register(policy: type[Policy]) -> type[Policy]:
    """Makes a policy known by its class's name, as it stands in param groups and on disk.

    A frozen dataclass whose arguments are numbers, strings and None. It runs on the reference backend; kernels know
    the policies of this package.
    """
    _BY_NAME[policy.__name__] = policy
    return policy


Plain = dict[str, Any] | list[dict[str, Any]]

#: What plain forms stand for, which are read at every step. Not an lru_cache, which torch.compile warns of.
_BUILT: dict[Any, tuple[Policy, ...]] = {}
#: A program has a few of them, unless it changes a policy's numbers as it goes.
_MOST_BUILT = 128


def parse(policy: Any) -> tuple[Policy, ...]:
    """The policies that a user, a param group or a checkpoint names, with nothing filled in.

    Args:
        policy: None (fixed), a policy, a tuple or list of policies, or their plain form.

    Raises:
        TypeError: for anything else.
        ValueError: where policies cannot be combined.
    """
    together = isinstance(policy, (tuple, list))
    policies = [FixedLR() if p is None else _as_policy(p) for p in (policy if together else (policy,))]
    return tuple(policies if len(policies) == 1 else _compose(policies))


def resolve(policies: Sequence[Policy], backbone: Backbone, groups: Sequence[Group]) -> Plain:
    """The form in which policies stand in param groups, with the defaults filled in.

    Args:
        policies: as :func:`parse` returns them.
        backbone: of the optimizer.
        groups: the param groups that are given these policies.

    Raises:
        ValueError: where a policy cannot drive the backbone with the hyperparameters of a group.
    """
    resolved = [policy.resolve(backbone, groups) for policy in policies]
    for policy in resolved:
        for group in groups:
            policy.check(backbone, group)
    plain = [policy.arguments() for policy in resolved]
    return plain if len(plain) > 1 else plain[0]


def is_plain(policy: Any) -> bool:
    """Whether it is the form of policies that stands in param groups."""
    return isinstance(policy, dict) or (isinstance(policy, list) and all(isinstance(p, dict) for p in policy))


def from_plain(plain: Plain) -> tuple[Policy, ...]:
    """The policies that a param group names."""
    dicts: Sequence[Mapping[str, Any]] = [plain] if isinstance(plain, Mapping) else plain
    key = tuple(tuple(d.items()) for d in dicts)
    if key not in _BUILT:
        if len(_BUILT) >= _MOST_BUILT:
            del _BUILT[next(iter(_BUILT))]
        _BUILT[key] = tuple(_as_policy(d) for d in dicts)
    return _BUILT[key]


def kinds_of(groups: Iterable[Mapping[str, Any]]) -> set[type[Policy]]:
    """Which policies drive these groups, whatever their arguments."""
    return {type(policy) for group in groups for policy in from_plain(group["policy"])}


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
    kinds = sorted(type(p).__name__ for p in policies)
    if kinds != ["ActiveLR", "TrainableLR"]:
        raise ValueError(
            f"these policies do not go together: {', '.join(kinds) or 'none'}; a tuple of policies is one ActiveLR and "
            "one TrainableLR (source='gradient')"
        )
    return [_beside_another(p) for p in policies]


def _beside_another(policy: Policy) -> Policy:
    """The policy with the defaults that it has in a tuple."""
    if isinstance(policy, ActiveLR):
        return policy.beside_a_scalar_policy()
    assert isinstance(policy, TrainableLR)
    if policy.naive or policy.source not in (None, "gradient"):
        raise ValueError(
            "together with ActiveLR, TrainableLR measures gradients: use source='gradient' and naive=False "
            f"(got source={policy.source!r}, naive={policy.naive})"
        )
    return policy.with_source("gradient")
