"""Converts a user's ``policy`` to its plain form in the param groups, once for all groups that share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

from ..core.backbone import Backbone, Group
from ..core.warning import warn
from ..policies import Plain, Policy, is_plain, parse, resolve
from . import reference_rates

Groups = Sequence[dict[str, Any]]


class Resolutions:
    """Policies of one optimizer, as given and in the plain form of its groups.

    A default may depend on all groups that get an equal policy. It is resolved once: a group that gets the policy later
    has the same default.

    Attributes:
        default: the policy of groups that have none of their own, as given.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.default: tuple[Policy, ...] = ()
        self._resolved: dict[tuple[Policy, ...], Plain] = {}

    def plain(self, policy: Any, groups: Sequence[Group]) -> Plain:
        """Returns the plain form of a policy, checked. At its first use, warns of its effects on these groups.

        Args:
            policy: as a user gives it.
            groups: hyperparameters of the groups that get it.

        Raises:
            TypeError, ValueError: as :func:`policies.parse` and :func:`policies.resolve`.
        """
        given = parse(policy)
        known = self._resolved.get(given)
        resolved = resolve(given if known is None else parse(known), self._backbone, groups)
        filled = [group for group in groups if not isinstance(group.get("params"), list) or group["params"]]
        if known is None and not is_plain(policy) and filled:
            for message in filter(None, (p.advice(self._backbone, filled) for p in given)):
                warn(message)
        self._resolved[given] = resolved
        return deepcopy(resolved)

    def of_all(self, params: Any, defaults: dict[str, Any]) -> Plain:
        """Resolves the policies of all groups that are about to be added. Returns the plain form of the default."""
        self.default = parse(defaults["policy"])
        groups = [{**defaults, **group} for group in params if isinstance(group, dict)]
        for equal in _by_policy(groups):
            self.plain(equal[0]["policy"], equal)
        return self.plain(defaults["policy"], [defaults])

    def settle(self, groups: Groups) -> None:
        """Checks the policies of all groups and completes those set by hand: plain form, defaults, reference rates.

        Raises:
            TypeError, ValueError: as :meth:`plain`; then no group has changed.
        """
        before = len(self._resolved)
        settled = [(equal, self._settled(equal)) for equal in _by_policy(groups)]
        by_hand = [(group, plain) for equal, plain in settled for group in equal if group["policy"] != plain]
        for group, plain in by_hand:
            group["policy"] = deepcopy(plain)
        # A policy whose numbers change during training must not fill the dict.
        if by_hand or len(self._resolved) > before:
            in_use = [group["policy"] for group in groups]
            self._resolved = {given: plain for given, plain in self._resolved.items() if plain in in_use}
        for group in groups:
            reference_rates.meet(group)

    def _settled(self, groups: list[dict[str, Any]]) -> Plain:
        first = groups[0]["policy"]
        known = self._resolved.get(parse(first))
        if known is not None and all(is_plain(group["policy"]) for group in groups):
            return known
        return self.plain(first, groups)


def _by_policy(groups: Groups) -> Iterable[list[dict[str, Any]]]:
    """Returns lists of the groups that have equal policies."""
    by_policy: dict[tuple[Policy, ...], list[dict[str, Any]]] = {}
    for group in groups:
        by_policy.setdefault(parse(group["policy"]), []).append(group)
    return by_policy.values()
