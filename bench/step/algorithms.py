"""The algorithms that are measured: our optimizer for each, and the memory that a step reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fused_adaptive as fa

#: Steps per interval: enough that medians are of ordinary steps, and few enough that samples contain interval ends.
INTERVAL = 10
LR = 1e-3

#: backbone → (our class, its arguments, float32 state values per element)
BACKBONES: dict[str, tuple[type[fa.AdaptiveOptimizer], dict[str, Any], int]] = {
    "SGD": (fa.SGD, {"momentum": 0.9}, 1),
    "AdamW": (fa.AdamW, {}, 2),
    "RAdam": (fa.RAdam, {}, 2),
    "AdaBelief": (fa.AdaBelief, {}, 2),
}


def policies(interval: int) -> dict[str, fa.Policy | None]:
    return {
        "fixed": None,
        "active": fa.ActiveLR(interval=interval, high=0.1),
        "trainable": fa.TrainableLR(interval=interval, source="gradient"),
        "displacement": fa.TrainableLR(interval=interval, source="displacement"),
        "hypergradient": fa.Hypergradient(hyper_lr=1e-12),
    }


POLICIES = tuple(policies(1))


@dataclass(frozen=True)
class Algorithm:
    """A backbone with a policy.

    Args:
        backbone: a name in :data:`BACKBONES`.
        policy: a name in :data:`POLICIES`.
    """

    backbone: str
    policy: str = "fixed"

    def __str__(self) -> str:
        return self.backbone if self.policy == "fixed" else f"{self.backbone} + {self.policy}"

    def why_not(self) -> str:
        """Returns why the combination is not measured; "" if it is."""
        if self.policy == "displacement" and self.backbone != "SGD":
            return "TrainableLR from displacements is for SGD: with an adaptive backbone its gain runs away"
        return ""

    def build(self, params: Sequence[Tensor], backend: str, interval: int = INTERVAL) -> fa.AdaptiveOptimizer:
        cls, arguments, _ = BACKBONES[self.backbone]
        policy: Any = policies(interval)[self.policy]
        return cls(params, lr=LR, policy=policy, backend=backend, **arguments)  # type: ignore[call-arg]

    @property
    def state_bytes(self) -> int:
        """Bytes of state per parameter, without scalars. State is float32 whatever the parameters' dtype."""
        of_policy = {"active": 9, "trainable": 8, "displacement": 8}
        return 4 * BACKBONES[self.backbone][2] + of_policy.get(self.policy, 0)

    @property
    def streams(self) -> Streams:
        """The arrays that a step reads and writes if it does not end an interval."""
        states = BACKBONES[self.backbone][2]
        if self.policy == "active":  # the sum of gradients; the gain is only read
            return Streams(states + 1, 1, 1)
        if self.policy == "trainable":  # the sum of gradients
            return Streams(states + 1, 1, 0)
        if self.policy == "hypergradient":  # a first pass reads gradient and state for the inner product
            return Streams(states, 2, states)
        return Streams(states, 1, 0)


@dataclass(frozen=True)
class Streams:
    """The arrays that a step reads and writes besides the parameter, which it reads and writes once.

    Args:
        written: the number of float32 arrays of state that it reads and writes.
        grads: the number of times that it reads the gradient, which has the parameter's dtype.
        read: the number of float32 arrays of state that it only reads.
    """

    written: int
    grads: int
    read: int

    def bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes per parameter that a step of any implementation has to read and write."""
        return dtype.itemsize * (2 + self.grads) + 4 * (2 * self.written + self.read)
