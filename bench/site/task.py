"""The trainings behind the plots of the site: a small net learns what a random net does, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Optimizer = torch.optim.Optimizer
Make = Callable[[list[nn.Parameter], float], Optimizer]

EPOCHS, BATCH, POINTS = 30, 64, 512
#: Optimizer steps in an epoch.
STEPS = POINTS // BATCH


def random_layers(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Returns linear layers with tanh between them, with the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Returns random points, and the class that a random net gives to each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(POINTS, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        scores = random_layers((16, 8, 4), 2)(2 * x)
        return x, (scores - scores.mean(0)).argmax(1)


def net() -> nn.Sequential:
    """Returns the net that learns the classes."""
    return random_layers((16, 32, 4), 0)


def batches(x: Tensor, y: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns the batches of an epoch, in an order that depends on its number alone."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
    return ((x[part], y[part]) for part in order.split(BATCH))


@dataclass
class Training:
    """What was recorded: the loss of each epoch over all points, and the rate in force after each step or epoch."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def train(
    make: Make,
    lr: float,
    epochs: int = EPOCHS,
    each_step: bool = False,
    schedule: Callable[..., object] | None = None,
    validation: bool = False,
) -> Training:
    """Trains the net.

    Args:
        make: builds the optimizer from parameters and a rate.
        lr: the initial rate.
        epochs: how many.
        each_step: whether the rate is recorded after each step, else after each epoch.
        schedule: builds a controller from optimizer, model and initial loss; it gets the loss of each epoch.
        validation: whether the losses are those of other points than the net is trained on.
    """
    (x, y), model, found = data(), net(), Training()
    optimizer, watched = make(list(model.parameters()), lr), data(2) if validation else (x, y)
    controller = schedule(optimizer, model, loss_of(model, *watched)) if schedule else None
    for epoch in range(epochs):
        for inputs, targets in batches(x, y, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if each_step:
                found.rates.append(rate_of(optimizer))
        loss = loss_of(model, *watched)
        found.losses.append(loss)
        if not each_step:
            found.rates.append(rate_of(optimizer))
        if controller is not None:
            controller.step(loss)  # type: ignore[attr-defined]
    return found


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def rate_of(optimizer: Optimizer) -> float:
    """Returns the mean of ``lr · gain`` of the first group."""
    return float(optimizer.learning_rates()[0]["mean"])  # type: ignore[attr-defined]
