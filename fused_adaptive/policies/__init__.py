"""Learning-rate policies, and their plain form in param groups: dicts of name and arguments."""

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
    """Registers a policy under the name of its class, by which param groups and checkpoints refer to it.

    The policy must be a frozen dataclass whose arguments are numbers, strings and None. It runs on the reference
    backend; kernels support only the policies of this package.
    """
    _BY_NAME[policy.__name__] = policy
    return policy


Plain = dict[str, Any] | list[dict[str, Any]]

#: Policies by plain form, since plain forms are read at every step. torch.compile warns about an lru_cache.
_CACHE: dict[Any, tuple[Policy, ...]] = {}
#: A program uses a few plain forms, unless it changes the numbers of a policy during training.
_CACHE_SIZE = 128


def parse(policy: Any) -> tuple[Policy, ...]:
    """Returns the policies that a user, a param group or a checkpoint specifies, without defaults filled in.

    Args:
        policy: None (fixed), a policy, a tuple or list of policies, or their plain form.

    Raises:
        TypeError: for anything else.
        ValueError: for an unknown name, or policies that cannot be combined.
    """
    is_several = isinstance(policy, (tuple, list))
    policies = [FixedLR() if p is None else _as_policy(p) for p in (policy if is_several else (policy,))]
    return tuple(policies if len(policies) == 1 else _compose(policies))


def resolve(policies: Sequence[Policy], backbone: Backbone, groups: Sequence[Group]) -> Plain:
    """Fills in the defaults and returns the plain form of the policies.

    Args:
        policies: as returned by :func:`parse`.
        backbone: backbone of the optimizer.
        groups: param groups that get these policies.

    Raises:
        ValueError: if a policy cannot drive the backbone with the hyperparameters of a group.
    """
    resolved = [policy.resolve(backbone, groups) for policy in policies]
    for policy in resolved:
        for group in groups:
            policy.check(backbone, group)
    plain = [policy.arguments() for policy in resolved]
    return plain if len(plain) > 1 else plain[0]


def is_plain(policy: Any) -> bool:
    """Returns whether ``policy`` has the plain form."""
    return isinstance(policy, dict) or (isinstance(policy, list) and all(isinstance(p, dict) for p in policy))


def from_plain(plain: Plain) -> tuple[Policy, ...]:
    """Returns the policies of a param group from their plain form."""
    dicts: Sequence[Mapping[str, Any]] = [plain] if isinstance(plain, Mapping) else plain
    key = tuple(tuple(d.items()) for d in dicts)
    if key not in _CACHE:
        if len(_CACHE) >= _CACHE_SIZE:
            del _CACHE[next(iter(_CACHE))]
        _CACHE[key] = tuple(_as_policy(d) for d in dicts)
    return _CACHE[key]


def kinds_of(groups: Iterable[Mapping[str, Any]]) -> set[type[Policy]]:
    """Returns the classes of the policies of these groups."""
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
    """Checks a tuple of policies and fills in its defaults. Only one ActiveLR and one TrainableLR can be combined."""
    kinds = sorted(type(p).__name__ for p in policies)
    if kinds != ["ActiveLR", "TrainableLR"]:
        raise ValueError(
            f"these policies do not go together: {', '.join(kinds) or 'none'}; a tuple of policies is one ActiveLR and "
            "one TrainableLR (source='gradient')"
        )
    return [_with_tuple_defaults(p) for p in policies]


def _with_tuple_defaults(policy: Policy) -> Policy:
    """Returns the policy with the defaults that it has in a tuple."""
    if isinstance(policy, ActiveLR):
        return policy.beside_a_scalar_policy()
    assert isinstance(policy, TrainableLR)
    if policy.naive or policy.source not in (None, "gradient"):
        raise ValueError(
            "together with ActiveLR, TrainableLR measures gradients: use source='gradient' and naive=False "
            f"(got source={policy.source!r}, naive={policy.naive})"
        )
    return policy.with_source("gradient")
