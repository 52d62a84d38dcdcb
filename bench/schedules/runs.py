"""One training run with a method, a batch size and a seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, functional
from torch.optim import Optimizer, lr_scheduler

import fused_adaptive as fa

from .data import Part, Splits
from .model import ResNet20

Run = dict[str, Any]

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
#: Points of the lr trajectory per epoch.
SAMPLES = 8
#: The number of training images whose loss is AALR's initial loss.
PROBE = 1000


@dataclass(frozen=True)
class Job:
    """The arguments that determine a run's result, apart from hardware.

    Args:
        method: a key of :data:`METHODS`.
        batch_size: the batch size.
        seed: the seed of weights, batches and draws.
        lr: the first rate.
        epochs: the number of epochs.
        images: the number of training images.
        data: the name of the data set.
        side: the side of the images in pixels.
        channels: the channels of ResNet-20's first stage.
        patience: AALR's patience in epochs.
    """

    method: str
    batch_size: int
    seed: int
    lr: float
    epochs: int
    images: int
    data: str
    side: int
    channels: int
    patience: int


@dataclass(frozen=True)
class Method:
    """A method to set the learning rate.

    Args:
        label: the name in tables and plots.
        lr: the usual first rate in the literature, not tuned.
        build: returns the optimizer.
        attach: returns the :class:`Driver` of the optimizer's rate, from the optimizer, the model, the job, the steps
            per epoch and a function that returns the initial loss.
    """

    label: str
    lr: float
    build: Callable[[Module, Job], Optimizer]
    attach: Callable[[Optimizer, Module, Job, int, Callable[[], float]], Driver]


class Driver:
    """Changes the learning rate after steps and epochs. The base class does nothing."""

    def after_step(self) -> None: ...

    def after_epoch(self, train_loss: float, validation_loss: float) -> None: ...

    def note(self) -> str:
        """Returns what was done to the model at the end of the last epoch, "" for nothing."""
        return ""

    def restore_best(self) -> bool:
        """Restores the best model. Returns False if there is no copy of it."""
        return False


class PerStep(Driver):
    def __init__(self, scheduler: Any) -> None:
        self.after_step = scheduler.step


class Aalr(Driver):
    def __init__(self, optimizer: Optimizer, model: Module, job: Job, initial_loss: float) -> None:
        self.controller = fa.AALR(
            optimizer, model, initial_loss=initial_loss, lr=job.lr, patience=min(job.patience, job.epochs)
        )

    def after_epoch(self, train_loss: float, validation_loss: float) -> None:
        self.controller.step(train_loss)

    def note(self) -> str:
        return self.controller.action

    def restore_best(self) -> bool:
        if self.controller.progress.phase == 1:
            return False
        self.controller.restore_best()
        return True


class Aslr(Driver):
    def __init__(self, optimizer: Optimizer, seed: int) -> None:
        self.controller = fa.ASLR(optimizer, seed=seed)

    def after_epoch(self, train_loss: float, validation_loss: float) -> None:
        self.controller.step(validation_loss)


def _sgd(model: Module, job: Job) -> Optimizer:
    return fa.SGD(model.parameters(), lr=job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def _hypergradient(model: Module, job: Job) -> Optimizer:
    policy = fa.Hypergradient(hyper_lr=1e-3)
    return fa.SGD(model.parameters(), lr=job.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, policy=policy)


def _adam(model: Module, job: Job) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=job.lr, weight_decay=WEIGHT_DECAY)


def _decay(optimizer: Optimizer, job: Job, steps: int) -> Driver:
    milestones = [steps * job.epochs // 2, steps * job.epochs * 3 // 4]
    return PerStep(lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1))


def _restarts(optimizer: Optimizer, job: Job, steps: int) -> Driver:
    # Three cycles, of 1, 2 and 4 sevenths of the training.
    first = max(1, math.ceil(steps * job.epochs / 7))
    return PerStep(lr_scheduler.CosineAnnealingWarmRestarts(optimizer, first, T_mult=2))


def _cyclic(optimizer: Optimizer, job: Job, steps: int) -> Driver:
    half = max(1, steps * job.epochs // 4)
    cycle = lr_scheduler.CyclicLR(optimizer, job.lr / 100, job.lr, step_size_up=half, cycle_momentum=False)
    return PerStep(cycle)


METHODS: dict[str, Method] = {
    "aalr": Method("AALR", 0.1, _sgd, lambda o, model, job, _, loss: Aalr(o, model, job, loss())),
    "aslr": Method("ASLR", 0.1, _sgd, lambda o, _, job, *__: Aslr(o, job.seed)),
    "decay": Method("SGD + step decay", 0.1, _sgd, lambda o, _, job, steps, __: _decay(o, job, steps)),
    "sgdr": Method("SGDR", 0.1, _sgd, lambda o, _, job, steps, __: _restarts(o, job, steps)),
    "cyclic": Method("cyclic", 0.1, _sgd, lambda o, _, job, steps, __: _cyclic(o, job, steps)),
    "adam": Method("Adam", 1e-3, _adam, lambda *_: Driver()),
    "hypergradient": Method("Hypergradient", 0.1, _hypergradient, lambda *_: Driver()),
}


#: Maps a model, images and classes to the images that the model is trained on instead.
Attack = Callable[[Module, Tensor, Tensor], Tensor]


def train(
    job: Job,
    splits: Splits,
    report: Callable[[int, float, float], None] = lambda *_: None,
    attack: Attack | None = None,
) -> Run:
    """Trains a model. Evaluates it on the validation part after each epoch and on the test part at the end.

    An epoch ends at a batch loss that is not finite. The run ends then too, unless the driver has restored a model.

    Args:
        job: the arguments of the run.
        splits: the data.
        report: called with epoch, training loss and validation accuracy after each epoch.
        attack: adversarial training; the accuracy under the same attack is "attacked_accuracy".
    """
    torch.manual_seed(job.seed)
    device = splits.train.labels.device
    model = ResNet20(job.channels).to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = METHODS[job.method].build(model, job)
    batches = Batches(splits.train, job.batch_size, torch.Generator().manual_seed(job.seed))
    probe = Part(splits.train.images[:PROBE], splits.train.labels[:PROBE])
    driver = METHODS[job.method].attach(optimizer, model, job, len(batches), lambda: evaluate(model, probe)[0])
    history: dict[str, list[Any]] = {"train_loss": [], "validation_loss": [], "accuracy": [], "action": [], "rates": []}
    began = time.perf_counter()
    for epoch in range(1, job.epochs + 1):
        loss = _epoch(model, optimizer, driver, batches, epoch - 1, history["rates"], attack)
        validation_loss, accuracy = evaluate(model, splits.validation)
        driver.after_epoch(loss, validation_loss)
        for name, value in (("train_loss", loss), ("validation_loss", validation_loss), ("accuracy", accuracy)):
            history[name].append(value if math.isfinite(value) else None)
        history["action"].append(driver.note())
        report(epoch, loss, accuracy)
        if not math.isfinite(loss) and not driver.note():
            break
    seconds = time.perf_counter() - began
    test_loss, test_accuracy = evaluate(model, splits.test)
    return {
        **asdict(job),
        **history,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss if math.isfinite(test_loss) else None,
        "diverged": not math.isfinite(test_loss),
        "attacked_accuracy": None if attack is None else _under_attack(model, splits.test, attack),
        "checkpoint_accuracy": evaluate(model, splits.test)[1] if driver.restore_best() else None,
        "seconds": round(seconds, 1),
    }


def _epoch(
    model: Module,
    optimizer: Optimizer,
    driver: Driver,
    batches: Batches,
    done: int,
    rates: list,
    attack: Attack | None,
) -> float:
    """Trains one epoch and returns the mean of the losses before each step. ``done``: the number of epochs before."""
    model.train()
    total = torch.zeros((), device=batches.data.labels.device)
    sampled_steps = {i * len(batches) // SAMPLES for i in range(SAMPLES)}
    for step, (images, labels) in enumerate(batches):
        if step in sampled_steps:
            rates.append([round(done + step / len(batches), 4), _rate(optimizer)])
        if attack is not None:
            images = attack(model, images, labels)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        driver.after_step()
        total += loss.detach() * len(labels)
        if not torch.isfinite(total):
            return math.nan
    return total.item() / len(batches.data)


def _under_attack(model: Module, data: Part, attack: Attack, size: int = 500) -> float:
    """The accuracy in percent."""
    model.eval()
    parts = zip(data.images.split(size), data.labels.split(size), strict=True)
    return evaluate(model, Part(torch.cat([attack(model, *part) for part in parts]), data.labels))[1]


@dataclass
class Batches:
    """Batches of the data in a new random order in each pass. The orders depend on the generator's seed only."""

    data: Part
    size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data), generator=self.generator).to(self.data.labels.device)
        for chosen in order.split(self.size):
            yield self.data.images[chosen].contiguous(memory_format=torch.channels_last), self.data.labels[chosen]


def _rate(optimizer: Optimizer) -> float:
    if isinstance(optimizer, fa.AdaptiveOptimizer):
        return optimizer.learning_rates()[0]["mean"]
    return float(optimizer.param_groups[0]["lr"])


@torch.no_grad()
def evaluate(model: Module, data: Part, size: int = 500) -> tuple[float, float]:
    """Returns the mean loss and the accuracy in percent."""
    model.eval()
    loss = correct = 0.0
    for images, labels in zip(data.images.split(size), data.labels.split(size), strict=True):
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
    return loss / len(data), 100 * correct / len(data)
