"""The optimizer's share of a training step, measured with the gradients of real backward passes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fused_adaptive as fa

from ..schedules.model import ResNet20
from .algorithms import INTERVAL, LR, Algorithm
from .compositions import Composition
from .measure import rounded, synchronize
from .rivals import Steps


class SmallGPT(nn.Module):
    """A small GPT that maps tokens ``[N, T]`` to logits ``[N, T, vocabulary]``.

    Args:
        layers: the number of transformer layers.
        width: the width of the embeddings, 64 per attention head.
        vocabulary: the number of distinct tokens.
        context: the largest sequence length ``T``.
    """

    def __init__(self, layers: int = 4, width: int = 256, vocabulary: int = 4096, context: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        hidden = self.tokens(x) + self.places(places)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        return self.norm(hidden) @ self.tokens.weight.T


def _resnet(device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    images, labels = torch.randn(32, 1, 28, 28, device=device), torch.randint(10, (32,), device=device)
    return ResNet20().to(device), lambda model: functional.cross_entropy(model(images), labels)


def _gpt(device: torch.device) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    tokens = torch.randint(4096, (2, 129), device=device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    return SmallGPT().to(device), lambda model: functional.cross_entropy(model(inputs).flatten(0, 1), targets)


MODELS = {"ResNet-20, batch 32": _resnet, "GPT of 4 layers, 2 x 128 tokens": _gpt}
#: torch's optimizers and compositions, each before the optimizer of ours that replaces it.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Steps]] = {
    "torch AdamW": lambda p: torch.optim.AdamW(p, lr=LR),
    "torch AdamW fused": lambda p: torch.optim.AdamW(p, lr=LR, fused=True),
    "AdamW": lambda p: fa.AdamW(p, lr=LR),
    "ActiveAdamW, foreach": lambda p: Composition(p, Algorithm("AdamW", "active")),
    "ActiveAdamW": lambda p: fa.ActiveAdamW(p, lr=LR, interval=INTERVAL),
}


def measure_end_to_end(
    device: torch.device, samples: int, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Measures training steps of each model; the optimizers take turns.

    Returns:
        A dict ``{"model", "optimizer", "parameters", "tensors", "gradients", "step"}`` for each model and optimizer.
        ``gradients`` has the seconds of forward and backward, ``step`` those of ``optimizer.step()``; on a GPU both
        include waiting for the device.
    """
    found = []
    for name, make in MODELS.items():
        torch.manual_seed(0)
        original, loss_of = make(device)
        numel = sum(p.numel() for p in original.parameters())
        rows = []
        for optimizer in OPTIMIZERS:
            model = copy.deepcopy(original)
            row = {"model": name, "optimizer": optimizer, "parameters": numel, "gradients": [], "step": []}
            row["tensors"] = len(list(model.parameters()))
            rows.append((model, OPTIMIZERS[optimizer](list(model.parameters())), row))
        for sample in range(-INTERVAL - 1, samples):
            for model, optimizer, row in rows:
                gradients, step = _train(model, loss_of, optimizer, device)
                if sample >= 0:
                    row["gradients"].append(rounded(gradients))
                    row["step"].append(rounded(step))
        found += [row for _, _, row in rows]
        say(name)
    return found


def _train(
    model: nn.Module, loss_of: Callable[[nn.Module], Tensor], optimizer: Steps, device: torch.device
) -> tuple[float, float]:
    synchronize(device)
    begin = time.perf_counter()
    for p in model.parameters():
        p.grad = None
    loss_of(model).backward()
    synchronize(device)
    middle = time.perf_counter()
    optimizer.step()
    synchronize(device)
    return middle - begin, time.perf_counter() - middle
