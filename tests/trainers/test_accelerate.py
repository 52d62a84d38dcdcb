"""Accelerate: equal to the plain loop bit for bit, gradient accumulation, saving and resuming."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_adaptive as fa
from fused_adaptive.integrations import unwrap

from ..common.cases import BACKENDS
from .common import digits, needs, perceptron, plain_loop, same, values

pytestmark = [needs("accelerate"), pytest.mark.filterwarnings("ignore")]
feature = pytest.mark.feature("Accelerate")

STEPS, SAVED_AT, CLIP = 10, 5, 0.3


def build(model: nn.Module, backend: str) -> tuple[fa.AdaptiveOptimizer, Any]:
    policy = (fa.TrainableLR(interval=2), fa.ActiveLR(interval=3))
    optimizer = fa.AdamW(fa.param_groups(model, 0.1), lr=0.01, policy=policy, backend=backend)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS + 1)


def accelerated(
    backend: str, clip: float | None, accumulate: int = 1, folder: Path | None = None, resume: bool = False
) -> list[Tensor]:
    accelerate = import_module("accelerate")
    plugin = accelerate.utils.GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = perceptron()
    model, optimizer, scheduler = accelerator.prepare(model, *build(model, backend))
    assert unwrap(optimizer) is optimizer.optimizer
    batches = digits(STEPS * accumulate)
    if resume:
        accelerator.load_state(str(folder))
        batches = batches[SAVED_AT * accumulate :]
    for i, (x, y) in enumerate(batches):
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if folder is not None and not resume and i + 1 == SAVED_AT * accumulate:
            accelerator.save_state(str(folder))
    return values(model)


def plain(backend: str, accumulate: int) -> list[Tensor]:
    model = perceptron()
    return plain_loop(
        model,
        *build(model, backend),
        digits(STEPS * accumulate),
        lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]) / accumulate,
        clip=CLIP,
        epoch=STEPS,
        accumulate=accumulate,
    )


@feature
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_equals_the_plain_loop_bit_for_bit_also_when_resumed(accumulate, backend, tmp_path):
    expected = plain(backend, accumulate)
    assert same(accelerated(backend, CLIP, accumulate, tmp_path), expected)
    assert same(accelerated(backend, CLIP, accumulate, tmp_path, resume=True), expected)
    assert not same(accelerated(backend, None, accumulate), expected)


def test_a_wrapper_of_another_optimizer_is_refused():
    with pytest.raises(TypeError, match="SGD is no optimizer of fused_adaptive"):
        unwrap(torch.optim.SGD([torch.ones(1)]))
