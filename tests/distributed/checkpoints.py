"""Saves on some ranks and resumes on others, in the middle of an interval: part of the distributed tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.fsdp import fully_shard

import fused_adaptive as fa

from .models import Net, batch
from .sharded import TOLERANCE, assert_close, digests, mesh_of, whole

#: Steps before and after the checkpoint. It is at the third step of an interval of 4, the second of one of 3.
BEFORE, AFTER = 11, 7

RUNS: dict[str, Callable[[Any], fa.AdaptiveOptimizer]] = {
    "active": lambda p: fa.AdamW(p, lr=0.01, policy=fa.ActiveLR(interval=4)),
    "trainable": lambda p: fa.AdamW(p, lr=0.01, policy=fa.TrainableLR(interval=4)),
    "displacement": lambda p: fa.SGD(p, lr=0.05, momentum=0.8, policy=fa.TrainableLR(interval=4, granularity="tensor")),
    "both": lambda p: fa.AdamW(p, lr=0.01, policy=(fa.TrainableLR(interval=3), fa.ActiveLR(interval=4))),
    "hypergradient": lambda p: fa.SGD(p, lr=0.05, momentum=0.9, nesterov=True, policy=fa.Hypergradient(1e-3)),
}


def build(name: str, device: torch.device, sharded: bool) -> tuple[nn.Module, fa.AdaptiveOptimizer]:
    model = Net().to(device)
    if sharded:
        for layer in (model.first, model.second, model):
            fully_shard(layer, mesh=mesh_of(device, "all"))
    return model, RUNS[name](model.parameters())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, steps: int) -> None:
    sharded = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    for step in range(start, start + steps):
        x, y = batch(step, torch.device("cpu"))
        device = next(model.parameters()).device
        optimizer.zero_grad()
        (model(x[rank::ranks].to(device)) - y[rank::ranks].to(device)).square().mean().backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns whole parameters and state by name."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole(p.detach()).clone()
        for entry, value in optimizer.state[p].items():
            found[f"{name}.{entry}"] = whole(value).clone()
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if digests([a[name]]) != digests([b[name]])]
    assert not different, f"other bits: {different}, at first {a[different[0]]} and not {b[different[0]]}"


def save(directory: Path, device: torch.device) -> None:
    """Trains every run, saves it in every format, continues the training, and writes the results to disk."""
    for name in RUNS:
        model, optimizer = build(name, device, sharded=True)
        train(model, optimizer, 0, BEFORE)
        save_sharded(directory / name, model, optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = {
            "model": get_model_state_dict(model, options=options),
            "optim": get_optimizer_state_dict(model, optimizer, options=options),
        }
        torch.save(
            {"model": model.state_dict(), "optim": optimizer.state_dict()}, directory / f"{name}.{dist.get_rank()}"
        )
        if dist.get_rank() == 0:
            torch.save(full, directory / f"{name}.full")
        saved = everything(model, optimizer)
        train(model, optimizer, BEFORE, AFTER)
        final = everything(model, optimizer)
        if dist.get_rank() == 0:
            torch.save({"saved": saved, "final": final}, directory / f"{name}.expected")
    dist.barrier()


def save_sharded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp_save(state, checkpoint_id=path, no_dist=not dist.is_initialized())


def load_sharded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp_load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])


def load_full(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    full = torch.load(f"{path}.full", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, full["model"], options=options)
    set_optimizer_state_dict(model, optimizer, full["optim"], options=options)


def load_plain(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads each rank's own file, at the same world size only."""
    mine = torch.load(f"{path}.{dist.get_rank()}", weights_only=True)
    model.load_state_dict(mine["model"])
    optimizer.load_state_dict(mine["optim"])


def resume(directory: Path, device: torch.device, same_world: bool) -> None:
    """Continues from every checkpoint: bit for bit with the same number of ranks, else within rounding.

    Loaded state has the same bits on any number of ranks. Later steps sum gradients and inner products in another
    order.
    """
    sharded = dist.is_initialized()
    for name in RUNS:
        loaders = [load_sharded]
        if name in ("both", "displacement"):
            loaders += [load_full, load_plain] if same_world else [load_full]
        expected = torch.load(directory / f"{name}.expected", weights_only=True, map_location=device)
        for load in loaders:
            model, optimizer = build(name, device, sharded)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1)
            load(directory / name, model, optimizer)
            assert_same(everything(model, optimizer), expected["saved"])
            train(model, optimizer, BEFORE, AFTER)
            final = everything(model, optimizer)
            if same_world:
                assert_same(final, expected["final"])
                continue
            for entry, value in final.items():
                assert_close(value, expected["final"][entry], f"{name}: {entry}", tolerance=10 * TOLERANCE)
