"""The learning-rate range test: records the loss while the learning rate rises from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from ..core import ranks
from ..core.plain import plain_int, plain_number
from ..engine.handles import driven
from .aalr import reset
from .controller import owner_of
from .lr import read_lrs, write_lrs
from .preserved import preserved

#: The test ends if the smoothed loss exceeds this many times its lowest value.
_DIVERGED = 4.0


@dataclass(frozen=True)
class RangeTest:
    """The result of :func:`lr_range_test`.

    Attributes:
        lrs: the first group's rate at each step.
        losses: the training loss before each step, in a process group the ranks' mean.
        scale: how the rate rose, ``"linear"`` or ``"exponential"``.
    """

    lrs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    scale: str = "linear"

    def smoothed(self, beta: float = 0.9) -> list[float]:
        """Returns the bias-corrected exponential moving average of the losses."""
        mean, smooth = 0.0, []
        for t, loss in enumerate(self.losses, 1):
            mean = beta * mean + (1 - beta) * loss
            smooth.append(mean / (1 - beta**t))
        return smooth

    def bounds(self) -> tuple[float, float]:
        """Returns the rates between which the smoothed loss falls: from a tenth of its fall to its lowest point.

        Raises:
            ValueError: if the loss never falls.
        """
        smooth = self.smoothed()
        low = min(range(len(smooth)), key=smooth.__getitem__, default=0)
        if low == 0:
            raise ValueError(
                "the loss never falls in this range of rates: begin at a lower min_lr, or look at data and model"
            )
        begin = next(i for i, s in enumerate(smooth) if s <= smooth[0] - 0.1 * (smooth[0] - smooth[low]))
        return self.lrs[begin], self.lrs[low]

    @property
    def suggestion(self) -> float:
        """The midpoint of :meth:`bounds`, as [ASLR, IV a] proposes; the geometric mean for an exponential test."""
        low, high = self.bounds()
        return math.sqrt(low * high) if self.scale == "exponential" else (low + high) / 2

    def plot(self, ax: Any = None) -> Any:
        """Plots the loss over the rate. Needs matplotlib.

        Args:
            ax: the axes to plot into; default those of a new figure.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        ax.plot(self.lrs, self.losses, linewidth=0.7, alpha=0.5, label="loss")
        ax.plot(self.lrs, smooth := self.smoothed(), label="smoothed")
        if smooth and min(smooth) < smooth[0]:
            ax.axvspan(*self.bounds(), alpha=0.15, label="the loss falls")
            ax.axvline(self.suggestion, linestyle="--", label=f"suggestion {self.suggestion:.2g}")
        ax.set_xscale("log" if self.scale == "exponential" else "linear")
        ax.set(xlabel="learning rate", ylabel="training loss", title="Learning-rate range test")
        ax.legend()
        return ax


def lr_range_test(
    model: Module,
    optimizer: Optimizer,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    min_lr: float = 1e-5,
    max_lr: float = 1.0,
    steps: int = 100,
    scale: str = "linear",
    process_group: Any = None,
) -> RangeTest:
    """Runs Smith's learning-rate range test, which [ASLR, IV a] uses to choose its first rate.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017. Trains for ``steps`` steps while
    the rate rises, and stops early if the loss diverges.

    Restores afterwards, bit for bit, also if a step raises: the model's parameters, buffers, gradients and modes; the
    optimizer's parameters, state and param groups, those of an optimizer inside included; the generators of torch (CPU,
    CUDA), of Python's ``random``, NumPy's global one, and the ``generator`` of the loader and of its sampler. A logger
    of :func:`log_learning_rates` does not see the test's steps. Not restored: generators of a dataset, workers that
    persist, an iterator passed as the loader, and what hooks and optimizers of other packages keep elsewhere.

    Args:
        model: the model to train; it is in training mode during the test.
        optimizer: an optimizer of any class; it starts with new state. Groups keep their ratios to the first group's
            rate.
        loader: yields ``(inputs, targets)`` on any device; iterated again from the start when it ends.
        loss_fn: returns the loss as ``loss_fn(model(inputs), targets)``.
        min_lr, max_lr: first and last rate of the first group. Defaults 1e-5 and 1.
        steps: the number of optimizer steps, at least 2. Default 100; the paper takes a few epochs.
        scale: ``"linear"`` (default, the paper's) or ``"exponential"``, for a range of several decades.
        process_group: the ranks that train together; they decide on their mean loss. Default: the default group if
            ``torch.distributed`` is initialized. For ranks that test apart, pass a group of the one rank.

    Raises:
        ValueError: for invalid arguments, a model without parameters or an empty loader.
        RuntimeError: if a controller drives the optimizer; run the test before constructing one.
    """
    min_lr = float(plain_number("lr_range_test: min_lr", min_lr))
    max_lr, steps = float(plain_number("lr_range_test: max_lr", max_lr)), plain_int("lr_range_test: steps", steps)
    if not (0 < min_lr < max_lr and math.isfinite(max_lr)) or steps < 2 or scale not in ("linear", "exponential"):
        raise ValueError(
            "lr_range_test needs 0 < min_lr < max_lr, steps >= 2 and scale 'linear' or 'exponential', got "
            f"min_lr={min_lr}, max_lr={max_lr}, steps={steps}, scale={scale!r}"
        )
    if owner_of(optimizer) is not None:
        raise RuntimeError("a controller drives this optimizer: run lr_range_test before you build it, or remove() it")
    device = _device_of(model)
    test = RangeTest(scale=scale)
    with preserved(model, optimizer, loader):
        reset(driven(optimizer))
        model.train()
        base = read_lrs(optimizer.param_groups)
        ratios = [lr / base[0] if base[0] else 1.0 for lr in base]
        batches = _forever(loader)
        for i in range(steps):
            part = i / (steps - 1)
            lr = min_lr + part * (max_lr - min_lr) if scale == "linear" else min_lr * (max_lr / min_lr) ** part
            write_lrs(optimizer.param_groups, [lr * ratio for ratio in ratios])
            loss = ranks.mean(_train_step(model, optimizer, next(batches), loss_fn, device), process_group, device)
            if not math.isfinite(loss):
                break
            test.lrs.append(lr)
            test.losses.append(loss)
            smooth = test.smoothed()
            if smooth[-1] > _DIVERGED * min(smooth):
                break
    return test


def _device_of(model: Module) -> torch.device:
    for p in model.parameters():
        return p.device
    raise ValueError(
        f"lr_range_test: {type(model).__name__} has no parameters to train: pass the model that the optimizer trains"
    )


def _train_step(
    model: Module, optimizer: Optimizer, batch: Any, loss_fn: Callable[[Any, Any], Tensor], device: torch.device
) -> float:
    inputs, targets = (part.to(device) if isinstance(part, Tensor) else part for part in batch)
    optimizer.zero_grad()
    loss = loss_fn(model(inputs), targets)
    loss.backward()
    optimizer.step()
    return loss.item()


def _forever(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("the loader yields no batch (an iterator that is used up? pass the loader itself)")
