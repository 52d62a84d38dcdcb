"""Runs of this package's optimizers: one for each policy, and for each of many initial rates.

All of them are param groups of one optimizer, with a learning rate, a policy and one parameter each. Losses are
computed in one batch, so that sixty runs take little longer than one, and none sees anything of another.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fused_adaptive as fa

from .problems import PROBLEMS
from .settings import NUMBERS, Settings

#: From here on a run is taken for lost.
DIVERGED = 1e9
#: How often a sweep tries a decade of initial rates.
PER_DECADE = 2


@dataclass(frozen=True)
class Run:
    """What came of one optimizer. Entry 0 of everything is before the first step.

    Attributes:
        policy: the policy's name.
        label: the optimizer's name, as users write it.
        losses: after each epoch; fewer than asked for where it diverged.
        rates: the mean local learning rate, lr times gain.
        points: the parameters, ``(epochs + 1, n)``.
        diverged: whether it ended early, since the loss was not finite or beyond 1e9.
    """

    policy: str
    label: str
    losses: list[float]
    rates: list[float]
    points: Tensor
    diverged: bool


def label(optimizer: str, policy: str) -> str:
    plain = {"FixedLR": optimizer, "ActiveLR": f"Active{optimizer}"}
    return plain.get(policy, f"{optimizer} + {policy}")


def make_policy(settings: Settings, policy: str) -> fa.Policy:
    """A policy that acts after every step, and on its parameter alone."""
    if policy == "ActiveLR":
        return fa.ActiveLR(interval=1, increment=10**settings.log_increment, low=settings.low)
    if policy == "TrainableLR":
        return fa.TrainableLR(interval=1, granularity="tensor")
    if policy == "Hypergradient":
        return fa.Hypergradient(10**settings.log_hyper_lr, granularity="tensor")
    return fa.FixedLR()


def make_optimizer(settings: Settings, cells: list[tuple[str, float]]) -> fa.AdaptiveOptimizer:
    """An optimizer with a param group for each policy and initial rate."""
    start = PROBLEMS[settings.problem].initial(*settings.start)
    groups: list[dict[str, Any]] = [
        {"params": [start.clone().requires_grad_()], "lr": lr, "policy": make_policy(settings, policy)}
        for policy, lr in cells
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of increments that are large for a rate: here one tries them
        return getattr(fa, settings.optimizer)(groups)


class Training:
    """Steps all cells together. ``losses``: of each, ``(cells,)``, at the present parameters."""

    def __init__(self, settings: Settings, cells: list[tuple[str, float]]) -> None:
        self.problem = PROBLEMS[settings.problem]
        self.optimizer = make_optimizer(settings, cells)
        self.parameters: list[Tensor] = [group["params"][0] for group in self.optimizer.param_groups]
        self.generator = torch.Generator().manual_seed(0)
        self.noise, self.scale = settings.noise, None
        self.evaluate()

    def evaluate(self) -> None:
        self.points = torch.stack(self.parameters)
        self.losses = self.problem.loss(self.points)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.losses.sum().backward()
        if self.noise:
            self.add_noise()
        self.optimizer.step()
        self.evaluate()

    def add_noise(self) -> None:
        """The same to every run, so that they differ by their policies alone."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scale is None:
            self.scale = self.noise * gradients[0].square().mean().sqrt()
        drawn = self.scale * torch.randn(gradients[0].shape, generator=self.generator, dtype=torch.float64)
        for gradient in gradients:
            gradient += drawn


def train(settings: Settings) -> list[Run]:
    """One run for each policy, at the initial rate that is set."""
    training = Training(settings, [(policy, settings.lr) for policy in settings.policies])
    losses, points, rates = [], [], []
    for epoch in range(settings.epochs + 1):
        if epoch:
            training.step()
        losses.append(training.losses.detach())
        points.append(training.points.detach())
        rates.append([group["mean"] for group in training.optimizer.learning_rates()])
    losses_of, points_of = torch.stack(losses, 1), torch.stack(points, 1)
    return [
        make_run(settings, policy, losses_of[i], [row[i] for row in rates], points_of[i])
        for i, policy in enumerate(settings.policies)
    ]


def make_run(settings: Settings, policy: str, losses: Tensor, rates: list[float], points: Tensor) -> Run:
    lost = ~(losses.abs() < DIVERGED)  # NaN too
    end = int(lost.nonzero()[0]) if lost.any() else len(losses)
    name = label(settings.optimizer, policy)
    return Run(policy, name, losses[:end].tolist(), rates[:end], points[:end], end < len(losses))


def sweep_rates() -> list[float]:
    low, high, _ = NUMBERS["log_lr"]
    return [10 ** (low + i / PER_DECADE) for i in range(round((high - low) * PER_DECADE) + 1)]


def sweep(settings: Settings) -> dict[str, list[float]]:
    """For each policy the loss after the last epoch, at each of ``sweep_rates()``; NaN where it diverged."""
    rates = sweep_rates()
    training = Training(settings, [(policy, lr) for policy in settings.policies for lr in rates])
    for _ in range(settings.epochs):
        training.step()
    final = training.losses.detach()
    final = torch.where(final.abs() < DIVERGED, final, torch.nan).view(-1, len(rates))
    return {policy: final[i].tolist() for i, policy in enumerate(settings.policies)}
