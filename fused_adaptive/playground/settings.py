"""What can be set on the page, within which bounds, and the query of a link that encodes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlencode

from .problems import PROBLEMS

OPTIMIZERS = ("Adam", "AdamW", "SGD", "RAdam", "AdaBelief")
POLICIES = ("FixedLR", "ActiveLR", "TrainableLR", "Hypergradient")

#: Bounds and step of the numbers. Rates are powers of ten, given by their exponents.
NUMBERS: dict[str, tuple[float, float, float]] = {
    "log_lr": (-6, 1, 0.25),
    "epochs": (1, 500, 1),
    "log_increment": (-6, 0, 0.25),
    "low": (0.05, 1, 0.05),
    "log_hyper_lr": (-8, 0, 0.25),
    "noise": (0, 2, 0.05),
}


@dataclass(frozen=True)
class Settings:
    """One state of the page. ValueError, with a sentence for the user, on anything out of bounds.

    Attributes:
        problem: a key of ``PROBLEMS``.
        optimizer, policies: the backbone, and what drives its learning rate, one run each.
        x, y: where it starts; None: the problem's default. ``y`` is None where the problem has one number only.
        epochs: of one step and one interval each.
        log_increment, low: ActiveLR's ``increment``, as an exponent of ten, and ``low``.
        log_hyper_lr: Hypergradient's ``hyper_lr``, as an exponent of ten.
        noise: standard deviation of what is added to gradients, relative to the root mean square of the first one.
    """

    problem: str = "saddle"
    optimizer: str = "AdamW"
    policies: tuple[str, ...] = ("FixedLR", "ActiveLR")
    log_lr: float = -3.0
    x: float | None = None
    y: float | None = None
    epochs: int = 200
    log_increment: float = -2.0
    low: float = 0.9
    log_hyper_lr: float = -4.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        choose("problem", self.problem, PROBLEMS)
        choose("optimizer", self.optimizer, OPTIMIZERS)
        if not self.policies:
            raise ValueError("policies: choose at least one")
        for policy in self.policies:
            choose("policies", policy, POLICIES)
        for name, (low, high, _) in NUMBERS.items():
            self._set(name, within(name, getattr(self, name), low, high))
        self._set("epochs", round(self.epochs))
        starts = PROBLEMS[self.problem].starts
        for i, name in enumerate(("x", "y")):
            if i >= len(starts):
                self._set(name, None)
            elif getattr(self, name) is None:
                self._set(name, float(starts[i].default))
            else:
                self._set(name, within(name, getattr(self, name), *starts[i].bounds))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def start(self) -> tuple[float, ...]:
        return tuple(value for value in (self.x, self.y) if value is not None)

    @property
    def lr(self) -> float:
        return 10**self.log_lr

    def query(self) -> str:
        """The query of a link to this state: ``problem=saddle&optimizer=AdamW&…``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["policies"] = "-".join(self.policies)
        return urlencode({k: f"{v:g}" if isinstance(v, float) else v for k, v in values.items() if v is not None})

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Settings:
        """The state that a link encodes. Whatever it does not have stands at its default, and what is unknown is left
        aside, as links get arguments from elsewhere. ValueError as above.
        """
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {name: text for name, text in query.items() if name in known}
        if "policies" in values:
            values["policies"] = tuple(values["policies"].split("-"))
        return cls(**values)


def choose(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(choices)}")


def within(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"{name}: {value!r} is not a number from {low:g} to {high:g}")
    return number
