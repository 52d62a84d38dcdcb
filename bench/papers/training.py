"""Trainings that the experiments share: the data and nets of a setting, schedules, and what is kept of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fused_adaptive as fa

from ..experiments.tasks import Data, Task, convolutions, fit
from ..schedules import data as schedules_data
from ..schedules.model import ResNet20
from .experiment import Run, finite
from .nets import WideResNet

#: From the parameters and the steps of an epoch.
Build = Callable[[list[Tensor], int], Optimizer]


@dataclass(frozen=True)
class Setting:
    """What is trained, and for how long.

    Args:
        data: "mnist5k" or "fashion-mnist".
        images, test: training and test images; None: all.
        side: of the images, in pixels; 28 or a divisor.
        net: see :func:`net`.
    """

    data: str
    images: int | None
    test: int | None
    side: int
    net: str
    epochs: int
    device: str = "cpu"


def net(setting: Setting) -> nn.Module:
    """A net for the setting's images, its weights from torch's generator."""
    if setting.net == "mlp":  # [TLR, §5]
        return nn.Sequential(nn.Flatten(), nn.Linear(setting.side**2, 1000), nn.ReLU(), nn.Linear(1000, 10))
    if setting.net == "cnn":
        return convolutions(setting.side)
    if setting.net == "wrn-16-4":
        return WideResNet(depth=16, width=4)
    name, _, channels = setting.net.partition("/")
    if name != "resnet20":
        raise ValueError(f"there is no net {setting.net!r}")
    return ResNet20(int(channels or 16))


@cache
def images(data: str, train: int | None, test: int | None, side: int, device: str) -> tuple[Data, Data]:
    splits = schedules_data.load(data, train, test, side, device)
    return (splits.train.images, splits.train.labels), (splits.test.images, splits.test.labels)


def task_of(setting: Setting) -> Task:
    load = partial(images, setting.data, setting.images, setting.test, setting.side, setting.device)
    return Task(setting.net, setting.epochs, load, lambda: net(setting).to(setting.device))


def train(
    task: Task,
    build: Build,
    *,
    batch: int,
    seed: int,
    watch: Callable[[nn.Module, Optimizer], Any] | None = None,
) -> Run:
    """One training run, evaluated after each epoch. Runs of a task and a seed begin with the same weights and batches.

    Args:
        watch: called after each epoch; what it returns is kept.

    Returns:
        By epoch: ``test``, accuracy in percent or the mean loss; ``train_loss``; ``learning_rate``, the mean one;
        ``watched``. All of them end with an epoch whose loss is not finite, as None. ``core_seconds`` are those that
        the process was running, whatever else the machine had to do.
    """
    began = time.process_time()
    torch.manual_seed(seed)
    model = task.build()
    history: dict[str, list[Any]] = {"test": [], "learning_rate": [], "watched": []}

    def after_epoch(epoch: int, optimizer: Optimizer) -> None:
        with ready_to_be_judged(model, optimizer, task.load()[0][0], batch):
            result = task.evaluate(model, task.load()[1])
        history["test"].append(finite(result, 5))
        history["learning_rate"].append(finite(rate_of(optimizer), 4))
        if watch is not None:
            history["watched"].append(watch(model, optimizer))

    _, losses = fit(task, build, seed=seed, batch=batch, epochs=task.epochs, after_epoch=after_epoch, model=model)
    if not math.isfinite(losses[-1]):
        history["test"].append(None)
    if watch is None:
        del history["watched"]
    seconds = round(time.process_time() - began, 1)
    return {**history, "train_loss": [finite(loss, 4) for loss in losses], "core_seconds": seconds}


@contextmanager
def ready_to_be_judged(model: nn.Module, optimizer: Optimizer, inputs: Tensor, batch: int) -> Iterator[None]:
    """Where an optimizer evaluates at other weights than it trains, with those.

    Statistics of BatchNorm are taken anew there, from 50 batches, as the authors of schedule-free methods advise.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model.train()
        with torch.no_grad():
            for part in inputs.split(batch)[:50]:
                model(part)
    yield
    optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]


def rate_of(optimizer: Optimizer) -> float:
    """The mean learning rate over all elements of the first group."""
    if isinstance(optimizer, fa.AdaptiveOptimizer):
        return optimizer.learning_rates()[0]["mean"]
    return float(optimizer.param_groups[0]["lr"])


def scheduled(optimizer: Optimizer, factor: Callable[[int], float]) -> Optimizer:
    """The optimizer, its rate multiplied by a factor of the steps before each."""
    scheduler = LambdaLR(optimizer, factor)
    optimizer.register_step_post_hook(lambda *_: scheduler.step())
    return optimizer


def warm_up_and_cosine(step: int, steps: int, warm_up: float = 0.05) -> float:
    """A linear warm-up in a share of the steps, then half a cosine down to 0."""
    first = warm_up * steps
    if step < first:
        return (step + 1) / math.ceil(first)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - first) / (steps - first))))


#: What decides the result of a training besides an experiment's own code.
TRAINED_BY: tuple[object, ...] = (Setting, net, images, task_of, train, ready_to_be_judged, scheduled, fit, Task)


def final(run: Run) -> float | None:
    """The result after the last epoch; None if it diverged."""
    return run["test"][-1]


def best(run: Run) -> float | None:
    """The best test accuracy of all epochs, as the authors of ActiveLR report it; None if none was finite."""
    return max((x for x in run["test"] if x is not None), default=None)
