"""ResNet-20 for small grayscale images (He et al., 2016, §4.2; option A shortcuts), as used in [AALR, §5.5]."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3×3 convolutions with an identity shortcut, which is subsampled and zero-padded if the width changes."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.grows = outer - inner
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=2 if self.grows else 1, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.grows:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.grows))
        return functional.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20 that maps images ``[N, 1, H, W]`` to logits ``[N, 10]``. It has 0.27 million parameters by default.

    Args:
        channels: the channels of the first stage; the others have two and four times as many. Default 16.
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        widths = [channels] * 4 + [2 * channels] * 3 + [4 * channels] * 3
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(widths[-1], 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        return self.head(torch.mean(self.blocks(x), dim=(2, 3)))
