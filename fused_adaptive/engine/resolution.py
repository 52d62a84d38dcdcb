"""From what a user gives as ``policy`` to its plain form in the param groups, once for all groups that share it."""

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
    """The policies of one optimizer, as they were given and as they stand in its groups.

    A default may depend on all groups that are given an equal policy, and is resolved once: a group that is given it
    later gets the same.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self._resolved: dict[tuple[Policy, ...], Plain] = {}

    def plain(self, policy: Any, groups: Sequence[Group]) -> Plain:
        """The plain form of a policy, checked. At its first use, warns of what it means for these groups.

        Args:
            policy: as a user gives it.
            groups: hyperparameters of the groups that get it.

        Raises:
            TypeError, ValueError: as :func:`policies.parse` and :func:`policies.resolve`.
        """
        given = parse(policy)
        known = self._resolved.get(given)
        resolved = resolve(given if known is None else parse(known), self._backbone, groups)
        if known is None and not is_plain(policy):
            for message in filter(None, (p.advice(self._backbone, groups) for p in given)):
                warn(message)
        self._resolved[given] = resolved
        return deepcopy(resolved)

    def of_all(self, params: Any, defaults: dict[str, Any]) -> Plain:
        """Resolves the policies of all groups that are about to be added, and returns that of the defaults."""
        groups = [{**defaults, **group} for group in params if isinstance(group, dict)]
        for alike in _alike(groups):
            self.plain(alike[0]["policy"], alike)
        return self.plain(defaults["policy"], [defaults])

    def settle(self, groups: Groups) -> None:
        """Checks the policies of all groups and fills in what was set by hand: plain form, defaults, reference rates.

        Raises:
            TypeError, ValueError: as :meth:`plain`; then no group has changed.
        """
        settled = [(alike, self._settled(alike)) for alike in _alike(groups)]
        by_hand = [(group, plain) for alike, plain in settled for group in alike if group["policy"] != plain]
        for group, plain in by_hand:
            group["policy"] = deepcopy(plain)
        if by_hand:  # a policy whose numbers change as training goes leaves nothing behind
            standing = [group["policy"] for group in groups]
            self._resolved = {given: plain for given, plain in self._resolved.items() if plain in standing}
        for group in groups:
            reference_rates.meet(group)

    def _settled(self, alike: list[dict[str, Any]]) -> Plain:
        first = alike[0]["policy"]
        known = self._resolved.get(parse(first))
        if known is not None and all(is_plain(group["policy"]) for group in alike):
            return known
        return self.plain(first, alike)


def _alike(groups: Groups) -> Iterable[list[dict[str, Any]]]:
    """The groups, those of equal policies together."""
    alike: dict[tuple[Policy, ...], list[dict[str, Any]]] = {}
    for group in groups:
        alike.setdefault(parse(group["policy"]), []).append(group)
    return alike.values()
