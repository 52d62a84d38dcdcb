"""A net of a paper that is trained on a GPU alone."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class PreActivated(nn.Module):
    """Two 3×3 convolutions, each after its BatchNorm, around a shortcut."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(functional.relu(self.norm2(self.conv1(y))))


class WideResNet(nn.Module):
    """A wide residual network (Zagoruyko and Komodakis, 2016) for grey images ``[N, 1, H, W]``, as [TLR, §5] has it.

    Args:
        depth: 6·n + 4, with n blocks a stage.
        width: by which the 16, 32 and 64 channels are multiplied.
    """

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [16] + [w * width for w in (16, 32, 64) for _ in range(blocks)]
        strides = [1] * blocks + ([2] + [1] * (blocks - 1)) * 2
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        parts = [PreActivated(a, b, stride) for (a, b), stride in zip(pairwise(widths), strides, strict=True)]
        self.blocks = nn.Sequential(*parts)
        self.norm, self.head = nn.BatchNorm2d(widths[-1]), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.blocks(self.conv(x))))
        return self.head(torch.mean(x, dim=(2, 3)))
