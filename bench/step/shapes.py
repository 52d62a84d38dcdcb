"""Lists of parameter shapes, computed from the published architectures without importing a model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]

#: Larger tensors repeat this many random numbers, since generating them is slow.
REPEATS_AFTER = 2**23


def resnet50() -> list[Shape]:
    """Returns the shapes of ResNet-50 for 1000 classes (He et al., 2016, table 1): 3, 4, 6 and 3 bottlenecks."""

    def convolution(inner: int, outer: int, kernel: int) -> Iterator[Shape]:
        yield from ((outer, inner, kernel, kernel), (outer,), (outer,))  # no bias; then the norm's weight and bias

    shapes = list(convolution(3, 64, 7))
    inner = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outer = 4 * width
        for block in range(blocks):
            shapes += [*convolution(inner, width, 1), *convolution(width, width, 3), *convolution(width, outer, 1)]
            if block == 0:
                shapes += convolution(inner, outer, 1)  # the shortcut that changes the width
            inner = outer
    return [*shapes, (1000, inner), (1000,)]


def gpt2(layers: int = 12, width: int = 768, context: int = 1024, vocabulary: int = 50_257) -> list[Shape]:
    """Returns the shapes of GPT-2, by default 124M (Radford et al., 2019); the output layer shares the embedding."""
    norm: list[Shape] = [(width,), (width,)]
    block = [*norm, (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [*norm, (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *block * layers, *norm]


def vit_b(layers: int = 12, width: int = 768, patch: int = 16, image: int = 224, classes: int = 1000) -> list[Shape]:
    """Returns the shapes of ViT-B/16 at 224² pixels for 1000 classes (Dosovitskiy et al., 2021, table 1)."""
    norm: list[Shape] = [(width,), (width,)]
    block = [*norm, (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [*norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    tokens = (image // patch) ** 2 + 1
    first: list[Shape] = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    return [*first, *block * layers, *norm, (classes, width), (classes,)]


def llama_7b(layers: int = 8, width: int = 4096, hidden: int = 11_008) -> list[Shape]:
    """Returns the shapes of 8 of LLaMA-7B's 32 layers (Touvron et al., 2023, table 2), without embeddings."""
    block: list[Shape] = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden), (width,), (width,)]
    return block * layers


def odd() -> list[Shape]:
    """Returns 301 tensors of 1 to 500 000 elements, none a multiple of 4, so that no vector length divides them."""
    return [(size + (size % 4 == 0),) for size in (int(10 ** (5.7 * i / 300)) for i in range(301))]


@dataclass(frozen=True)
class ShapeList:
    """The parameters of a benchmark.

    Args:
        name: the name in results.
        shapes: the shapes of the parameters, in order.
        offset: the number of elements between an address that is a multiple of 64 bytes and the start of each tensor.
    """

    name: str
    shapes: Sequence[Shape]
    offset: int = 0

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))

    def tensors(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Returns random normal tensors, each with its own memory, as parameters and gradients have."""
        tensors = []
        for shape in self.shapes:
            n = math.prod(shape)
            if self.offset:
                tensor = torch.empty(n + self.offset, device=device, dtype=dtype)[self.offset :].view(shape)
            else:
                tensor = torch.empty(shape, device=device, dtype=dtype)  # not a view, since gradients are none
            flat = tensor.view(n)
            head = flat[:REPEATS_AFTER].normal_()
            for begin in range(REPEATS_AFTER, n, REPEATS_AFTER):
                flat[begin : begin + REPEATS_AFTER] = head[: n - begin]
            tensors.append(tensor)
        return tensors


LISTS: dict[str, Callable[[], ShapeList]] = {
    "resnet50": lambda: ShapeList("ResNet-50", resnet50()),
    "gpt2": lambda: ShapeList("GPT-2 124M", gpt2()),
    "vit-b": lambda: ShapeList("ViT-B/16", vit_b()),
    "7b": lambda: ShapeList("8 layers of 7B", llama_7b()),
    "10x5M": lambda: ShapeList("10 x 5M", [(5_000_000,)] * 10),
    "2000x1000": lambda: ShapeList("2000 x 1000", [(1000,)] * 2000),
    "10000x64": lambda: ShapeList("10000 x 64", [(64,)] * 10_000),
    "1000x1024": lambda: ShapeList("1000 x 1024", [(1024,)] * 1000),
    "odd": lambda: ShapeList("odd sizes", odd()),
    "misaligned": lambda: ShapeList("misaligned views", [(1_000_003,)] * 10, offset=1),
}


def parse(name: str) -> ShapeList:
    """Returns the list of that name. ``1e7`` is one tensor of that size, ``20x1e4`` twenty tensors.

    Raises:
        ValueError: for an unknown name.
    """
    if name in LISTS:
        return LISTS[name]()
    match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?(?:e\d+)?)", name)
    if match is None or float(match[2]) < 1:
        raise ValueError(f"unknown shape list {name!r}: choose from {', '.join(LISTS)}, a size as 1e6, or 20x1e4")
    count = int(match[1] or 1)
    return ShapeList(f"{count} x {match[2]}", [(int(float(match[2])),)] * count)
