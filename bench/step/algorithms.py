"""What is measured: backbones and policies, how ours is built, and what a step of each has to read and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fused_adaptive as fa

#: Steps in an interval. With fewer, medians would be of an interval's end; with more, none would be in the samples.
INTERVAL = 10
LR = 1e-3

#: backbone → (our class, its arguments, floats of state an element)
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
        """Why there is no such algorithm; "" if there is."""
        if self.policy == "displacement" and self.backbone != "SGD":
            return "TrainableLR from displacements is for SGD: with an adaptive backbone its gain runs away"
        return ""

    def build(self, params: Sequence[Tensor], backend: str, interval: int = INTERVAL) -> fa.AdaptiveOptimizer:
        cls, arguments, _ = BACKBONES[self.backbone]
        policy: Any = policies(interval)[self.policy]
        return cls(params, lr=LR, policy=policy, backend=backend, **arguments)  # type: ignore[call-arg]

    @property
    def state_bytes(self) -> int:
        """Of state, a parameter: for parameters of every dtype it is in float32. Scalars are not counted."""
        of_policy = {"active": 9, "trainable": 8, "displacement": 8}
        return 4 * BACKBONES[self.backbone][2] + of_policy.get(self.policy, 0)

    @property
    def streams(self) -> Streams:
        """What an ordinary step reads and writes, not one that ends an interval."""
        states = BACKBONES[self.backbone][2]
        if self.policy == "active":  # the sum of gradients; the gain is only read
            return Streams(states + 1, 1, 1)
        if self.policy == "trainable":  # the sum of gradients
            return Streams(states + 1, 1, 0)
        if self.policy == "hypergradient":  # a pass over gradient and state comes first
            return Streams(states, 2, states)
        return Streams(states, 1, 0)


@dataclass(frozen=True)
class Streams:
    """The arrays that a step goes through besides the parameter, which it reads and writes.

    Args:
        written: arrays of state, in float32, that it reads and writes.
        grads: times that it reads the gradient, which has the parameter's dtype.
        read: arrays of state that it only reads.
    """

    written: int
    grads: int
    read: int

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes a parameter and step: the floor that no implementation gets below."""
        return dtype.itemsize * (2 + self.grads) + 4 * (2 * self.written + self.read)
