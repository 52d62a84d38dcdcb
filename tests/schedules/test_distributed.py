"""Four gloo processes: if only one of them has NaN, all take the same action, and all draw the same rates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fused_adaptive as fa

from .common import Net, epoch, same, values

RANKS = 4
#: Losses of all ranks in each epoch. Only rank 2 has NaN and a loss above the mean.
LOSSES = [[1.0] * RANKS, [0.9, 0.9, math.nan, 0.9], [0.9] * RANKS, [0.8, 0.8, 1.1, 0.8], [0.7, 0.7, math.nan, 0.7]]


def _train(rank: int, directory: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=RANKS)
    try:
        results[rank] = _with_aalr(rank, Path(directory)) | _with_aslr(rank) | _errors(rank)
    finally:
        dist.destroy_process_group()


def _with_aalr(rank: int, directory: Path) -> dict:
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Net())
    optimizer = fa.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller = fa.AALR(optimizer, model, initial_loss=1.0 + rank, lr=0.2, patience=1, snapshot=directory / "best.pt")
    trace = []
    for i, losses in enumerate(LOSSES):
        epoch(model, optimizer, seed=100 * i + rank)
        controller.step(losses[rank])
        trace.append((controller.get_last_lr(), controller.action))
    files = sorted(p.name for p in directory.glob("best*"))
    tensors = values(model.module)
    del tensors["seen"], tensors["layers.1.running_mean"], tensors["layers.1.running_var"]
    return {"aalr": trace, "initial_loss": controller.rules.initial_loss, "weights": tensors, "files": files}


def _with_aslr(rank: int) -> dict:
    model = Net()
    optimizer = fa.SGD(model.parameters(), lr=0.3)
    controller = fa.ASLR(optimizer, seed=3)
    trace = []
    for losses in LOSSES:
        controller.step(losses[rank])
        trace.append(controller.center)
        before = values(model)["layers.0.bias"]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        trace.append((before - values(model)["layers.0.bias"]).mean().item())
    return {"aslr": trace}


def _errors(rank: int) -> dict:
    model = Net()
    optimizer = fa.SGD(model.parameters(), lr=0.3)
    try:
        fa.AALR(optimizer, model, initial_loss=math.nan if rank == 1 else 2.0)
    except ValueError as error:
        message = str(error)
    else:
        message = "none"
    alone = [dist.new_group([r]) for r in range(RANKS)][rank]
    controller = fa.AALR(optimizer, model, initial_loss=1.0, process_group=alone)
    controller.step(math.nan if rank == 2 else 0.5)
    return {"error": message, "alone": controller.action}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with mp.get_context("spawn").Manager() as manager:
        shared = manager.dict()
        mp.spawn(_train, args=(str(tmp_path_factory.mktemp("ranks")), shared), nprocs=RANKS)  # pyright: ignore
        return dict(shared)


def test_all_ranks_take_the_same_action(results):
    assert results[0]["initial_loss"] == 2.5
    for rank in range(RANKS):
        for what in ("aalr", "aslr", "weights", "initial_loss"):
            assert same(results[rank][what], results[0][what]), (rank, what)
    actions = [action for _, action in results[0]["aalr"]]
    assert actions == ["save", "restore_best", "", "save", "restore_best"]


def test_an_unknown_initial_loss_on_one_rank_is_an_error_on_all(results):
    assert all("initial_loss must be finite" in results[rank]["error"] for rank in range(RANKS))


def test_ranks_that_train_separately_decide_separately(results):
    assert [results[rank]["alone"] for rank in range(RANKS)] == ["", "", "restore_initial", ""]


def test_each_rank_has_its_own_file(results):
    assert results[0]["files"][0].startswith("best.pt.rank")
    assert "best.pt" not in results[0]["files"]
