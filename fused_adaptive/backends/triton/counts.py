"""Counts on the host, as torch's ``step``. Kernels count on the device, and the host counts separately."""

# pyright: reportPrivateImportUsage=false
# (torch's own optimizers count with these functions.)

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ...core.declarations import ROLES
from ...policies import ActiveLR, Hypergradient, Policy, TrainableLR

#: Roles of counts. They are on the device if the param group is capturable or fused, else on the host.
COUNTERS = tuple(name for name, role in ROLES.items() if role.dtype in ("step", "int64") and name != "rounding_step")


class HostCounts:
    """Counts of one plan.

    Args:
        bound: state by role and member, see plans.collect_state.
        members: tensors of each policy.
    """

    def __init__(self, bound: Mapping[str, Mapping[int, Tensor]], members: Mapping[Policy, Sequence[int]]) -> None:
        self._bound, self._members = bound, members
        self._tensors = [t for role in COUNTERS for t in bound.get(role, {}).values()]
        self._versions: list[int] | None = None  # versions when host and device were equal

    def have_changed(self) -> bool:
        """Returns whether other code may have written to them since the device had the same counts."""
        return self._versions is None or self._versions != self._current()

    def remember(self) -> None:
        """Notes that the device has the same counts now."""
        self._versions = self._current()

    def _current(self) -> list[int] | None:
        if any(t.is_inference() for t in self._tensors):
            return None
        return [t._version for t in self._tensors]

    def rows(self, fresh: Iterable[int], count: int, on_device: bool) -> Tensor:
        """Returns all counts as int64, one row per tensor. Numbers of torch's ``step`` dtype are the bits of a float64.

        SGD has no step: 0 says that there is no momentum buffer yet, as for tensors in ``fresh``. With ``on_device``
        the other counts are 0: kernels read those on the device, and the host would wait for them.
        """
        rows = torch.zeros(count, len(COUNTERS), dtype=torch.int64)
        floats, fresh = rows.view(torch.float64), set(fresh)
        for i in self._bound.get("state0", {}):
            floats[i, 0] = 0.0 if i in fresh else 1.0
        for place, role in enumerate(COUNTERS):
            for i, tensor in () if on_device else self._bound.get(role, {}).items():
                (floats if ROLES[role].dtype == "step" else rows)[i, place] = tensor.item()
        return rows.flatten()

    def step(self, ending: dict[Policy, bool], moved: Sequence[int], resting: Sequence[int]) -> None:
        """Counts one step.

        Args:
            ending: by policy, whether its interval ends.
            moved: tensors with a gradient.
            resting: tensors with a gradient but without a rate.
        """
        self._add("step", moved)
        for policy, ends in ending.items():
            members = set(self._members[policy])
            own = [i for i in moved if i in members]
            if isinstance(policy, Hypergradient):
                valid = [self._bound["direction_valid"][i] for i in own]
                if valid:
                    torch._foreach_zero_(valid)
                    torch._foreach_add_(valid, 1)
            elif ends:
                self.restart([policy], moved)
            elif isinstance(policy, ActiveLR):
                self._add("active_step", self._members[policy])
                applied = self._bound.get("active_applied", {})
                if own:
                    torch._foreach_abs_([applied[i] for i in own])
                    torch._foreach_add_([applied[i] for i in own], 1)
                for i in resting:
                    if i in members:
                        applied[i].neg_()
            elif isinstance(policy, TrainableLR):
                self._add("tlr_step", self._members[policy])
                self._add("tlr_applied", own)
        self.remember()

    def restart(self, policies: Sequence[Policy] | dict[Policy, list[int]], moved: Sequence[int] = ()) -> None:
        """Starts a new interval, as the device does. ``moved``: tensors that the last step has moved.

        Only the device knows whether a tensor could move, that is, whether its rates and its gain are not 0.
        tlr_applied_prev is exact there. That of the host, which checkpoints save, differs only if nothing moved. The
        same applies to the sign of active_applied if lr is a tensor on the device.
        """
        for policy in policies:
            if policy.counter is None:
                continue
            members, active = self._members[policy], isinstance(policy, ActiveLR)
            applied = self._bound.get("active_applied" if active else "tlr_applied", {})
            if isinstance(policy, TrainableLR) and policy.eta is not None:
                self._add("tlr_applied", [i for i in members if i in set(moved)])
                for i in members:
                    if applied[i].item() > 0:
                        self._bound["tlr_applied_prev"][i].copy_(applied[i])
            torch._foreach_zero_([self._bound[policy.counter][i] for i in members])
            torch._foreach_zero_([applied[i] for i in members])
        self.remember()

    def _add(self, role: str, members: Sequence[int]) -> None:
        own = self._bound.get(role, {})
        tensors = [own[i] for i in members if i in own]
        if tensors:
            torch._foreach_add_(tensors, 1)
