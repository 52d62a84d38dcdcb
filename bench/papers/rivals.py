"""Rivals that need no learning rate, as users install them, against ours: as recommended, and with a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import fused_adaptive as fa

from ..experiments.tasks import GPT, TASKS, convolutions, fashion, mlp, regressor, text
from ..experiments.tasks import table as friedman
from . import timing, training
from .experiment import Experiment, Run
from .rivals_shown import CRITERIA, FLOOR, draw, table
from .training import scheduled, warm_up_and_cosine

#: The one number of each method: its recommended value. Rates, but for prodigy's and dadaptation's first estimate.
NUMBERS = {
    "AdamW, cosine": 1e-3,
    "Prodigy": 1e-6,
    "DAdaptAdam": 1e-6,
    "AdamWScheduleFree": 2.5e-3,
    "ActiveAdamW": 1e-3,
    "AdamW + TrainableLR": 1e-3,
    "both": 1e-3,
}
FACTORS = (1.0, 1e-3, 1e3)
DECAY = 1e-2


@dataclass(frozen=True)
class Job:
    """``factor``: by which the method's number is wrong. ``epochs``: None: the task's own."""

    task: str
    method: str
    factor: float
    batch: int
    epochs: int | None
    seed: int


@dataclass(frozen=True)
class Timing:
    """Steps of all methods by turns, over tensors of equal size."""

    tensors: int
    numel: int
    rounds: int


def jobs(scale: str) -> list[Job | Timing]:
    seeds, epochs, batch = {"smoke": (1, 1, 1024), "cpu": (3, None, 128), "gpu": (10, None, 128)}[scale]
    tasks = ("digits",) if scale == "smoke" else tuple(TASKS)
    found: list[Job | Timing] = [
        Job(task, method, factor, batch, epochs, seed)
        for seed in range(seeds)
        for task in tasks
        for factor in FACTORS
        for method in NUMBERS
    ]
    return [Timing(20, 10_000 if scale == "smoke" else 100_000, 5 if scale == "smoke" else 200), *found]


def train(job: Job | Timing) -> Run:
    if isinstance(job, Timing):
        return _time(job)
    task = TASKS[job.task]
    epochs = job.epochs or task.epochs

    def build(parameters: list[Tensor], steps: int) -> Optimizer:
        return optimizer_of(job.method, job.factor, parameters, steps, steps * epochs)

    return training.train(replace(task, epochs=epochs), build, batch=job.batch, seed=job.seed)


def optimizer_of(method: str, factor: float, parameters: list[Tensor], steps: int, total: int) -> Optimizer:
    """As its authors recommend it, but for its one number.

    Args:
        steps: of an epoch.
        total: of the whole training.
    """
    number = NUMBERS[method] * factor
    cosine = partial(warm_up_and_cosine, steps=total)
    third = max(1, steps // 3)
    if method == "AdamW, cosine":
        return scheduled(torch.optim.AdamW(parameters, lr=number, weight_decay=DECAY), cosine)
    if method == "Prodigy":  # with a cosine without warm-up, and these two for a method that begins with a small one
        made = _package("prodigyopt").Prodigy(
            parameters, lr=1.0, d0=number, weight_decay=DECAY, use_bias_correction=True, safeguard_warmup=True
        )
        return scheduled(made, partial(cosine, warm_up=0.0))
    if method == "DAdaptAdam":  # with the schedule that one would take for Adam
        made = _package("dadaptation").DAdaptAdam(parameters, lr=1.0, d0=number, weight_decay=DECAY, decouple=True)
        return scheduled(made, cosine)
    if method == "AdamWScheduleFree":
        made = _package("schedulefree").AdamWScheduleFree(
            parameters, lr=number, weight_decay=DECAY, warmup_steps=max(1, round(0.05 * total))
        )
        made.train()
        return made
    policy: Any = {
        "ActiveAdamW": lambda: fa.ActiveLR(interval=steps),
        "AdamW + TrainableLR": lambda: fa.TrainableLR(interval=third),
        "both": lambda: (fa.TrainableLR(interval=third), fa.ActiveLR(interval=steps)),
    }[method]()
    return fa.AdamW(parameters, lr=number, weight_decay=DECAY, policy=policy)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"needs {name}: pip install 'fused_adaptive[experiments]'") from None


def _time(job: Timing) -> Run:
    """Of steps alone, gradients given; and the bytes of state a parameter that one keeps after a few of them."""

    def optimizer(method: str) -> Optimizer:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.randn(job.numel, generator=generator).requires_grad_() for _ in range(job.tensors)]
        for p in parameters:
            p.grad = torch.randn(job.numel, generator=generator)
        made = optimizer_of(method, 1.0, parameters, 10, 10**6)
        for _ in range(2):
            made.step()
        return made

    made = {method: optimizer(method) for method in NUMBERS}
    steps: dict[str, Callable[[], Any]] = {method: one.step for method, one in made.items()}
    return {
        "timing": timing.by_turns(steps, job.rounds),
        "state_bytes": {method: round(state_bytes(one) / (job.tensors * job.numel), 2) for method, one in made.items()},
    }


def state_bytes(optimizer: Optimizer) -> int:
    """Of tensors as large as their parameters; scalars are not counted."""
    return sum(
        value.numel() * value.element_size()
        for p, state in optimizer.state.items()
        for value in state.values()
        if torch.is_tensor(value) and value.numel() == p.numel()
    )


EXPERIMENT = Experiment(
    title="Rivals that need no rate",
    paper="No paper has this table. The standard is AlgoPerf's rule for self-tuning: no search at all.",
    ours={
        "cpu": "Four tasks (an MLP on digits, a CNN on Fashion-MNIST, a GPT over characters, a regression from a "
        "table; 20, 15, 16 and 30 epochs of 32, 32, 16 and 32 steps, batch 128), three seeds. Each method as its "
        "authors recommend it, and with its one number wrong by 10³ both ways: the rate, or `d0` with Prodigy and "
        "DAdaptAdam. torch's AdamW has 5 % warm-up and a cosine, Prodigy a cosine, DAdaptAdam AdamW's schedule, "
        "AdamWScheduleFree 5 % warm-up. Ours have no schedule; ActiveLR's interval is an epoch, TrainableLR's a "
        "third. Weight decay 0.01. Results are those after the last epoch.",
        "gpu": "As at cpu scale, with ten seeds.",
    },
    jobs=jobs,
    train=train,
    trained_by=(
        train,
        optimizer_of,
        _time,
        state_bytes,
        timing.by_turns,
        warm_up_and_cosine,
        NUMBERS,
        DECAY,
        *(mlp, convolutions, GPT, regressor, fashion, text, friedman),
        *training.TRAINED_BY,
    ),
    floor=FLOOR,
    criteria=CRITERIA,
    table=table,
    draw=draw,
)
