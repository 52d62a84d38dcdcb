"""Lists of parameter shapes, generated from the published architectures: no model is imported to get them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]

#: Random numbers are slow to make: larger tensors repeat these many.
REPEATS_AFTER = 2**23


def resnet50() -> list[Shape]:
    """ResNet-50 for 1000 classes (He et al., 2016, table 1): bottlenecks in stages of 3, 4, 6 and 3."""

    def convolution(inner: int, outer: int, kernel: int) -> Iterator[Shape]:
        yield from ((outer, inner, kernel, kernel), (outer,), (outer,))  # without bias; the norm's weight and bias

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
    """GPT-2, by default the smallest, 124M (Radford et al., 2019); the output layer is the embedding's."""
    norm: list[Shape] = [(width,), (width,)]
    block = [*norm, (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [*norm, (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *block * layers, *norm]


def vit_b(layers: int = 12, width: int = 768, patch: int = 16, image: int = 224, classes: int = 1000) -> list[Shape]:
    """ViT-B/16 at 224² pixels for 1000 classes (Dosovitskiy et al., 2021, table 1)."""
    norm: list[Shape] = [(width,), (width,)]
    block = [*norm, (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [*norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    tokens = (image // patch) ** 2 + 1
    first: list[Shape] = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    return [*first, *block * layers, *norm, (classes, width), (classes,)]


def llama_7b(layers: int = 8, width: int = 4096, hidden: int = 11_008) -> list[Shape]:
    """The first 8 of LLaMA-7B's 32 layers (Touvron et al., 2023, table 2), and no embeddings."""
    block: list[Shape] = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden), (width,), (width,)]
    return block * layers


def odd() -> list[Shape]:
    """Sizes that no vector divides: 301 tensors of 1 to 500 000 elements, none a multiple of 4."""
    return [(size + (size % 4 == 0),) for size in (int(10 ** (5.7 * i / 300)) for i in range(301))]


@dataclass(frozen=True)
class ShapeList:
    """Parameters of a benchmark.

    Args:
        name: what results call it.
        shapes: of the parameters, in order.
        offset: every tensor begins this many elements after an address that is a multiple of 64 bytes.
    """

    name: str
    shapes: Sequence[Shape]
    offset: int = 0

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))

    def tensors(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Random normal tensors, each with memory of its own, as parameters and gradients have."""
        made = []
        for shape in self.shapes:
            n = math.prod(shape)
            if self.offset:
                tensor = torch.empty(n + self.offset, device=device, dtype=dtype)[self.offset :].view(shape)
            else:
                tensor = torch.empty(shape, device=device, dtype=dtype)  # no view, as gradients are none
            flat = tensor.view(n)
            head = flat[:REPEATS_AFTER].normal_()
            for begin in range(REPEATS_AFTER, n, REPEATS_AFTER):
                flat[begin : begin + REPEATS_AFTER] = head[: n - begin]
            made.append(tensor)
        return made


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
    """The list of that name. ``1e7`` is a single tensor of that size, ``20x1e4`` are twenty.

    Raises:
        ValueError: for a name that is neither.
    """
    if name in LISTS:
        return LISTS[name]()
    match = re.fullmatch(r"(?:(\d+)x)?(\d+(?:\.\d+)?(?:e\d+)?)", name)
    if match is None or float(match[2]) < 1:
        raise ValueError(f"unknown shape list {name!r}: choose from {', '.join(LISTS)}, a size as 1e6, or 20x1e4")
    count = int(match[1] or 1)
    return ShapeList(f"{count} x {match[2]}", [(int(float(match[2])),)] * count)
