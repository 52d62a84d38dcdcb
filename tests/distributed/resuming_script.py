"""Trains and writes a checkpoint after each step. test_resuming.py kills it at a random time.

One process alone writes files of torch.save; several ranks write folders of torch.distributed.checkpoint. A complete
checkpoint becomes the newest by a rename. A run that reaches the end compares its results with those of an
uninterrupted run.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.distributed import checkpoints
from tests.distributed.script import finish, initialize

STEPS = 40
RUN = "both"


def newest(directory: Path) -> int:
    """Returns the number of steps of the newest complete checkpoint; 0 if there is none."""
    return max((int(p.name.removeprefix("step")) for p in directory.glob("step*")), default=0)


def save(directory: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    unfinished, done = directory / "unfinished", directory / f"step{step}"
    if dist.is_initialized():
        checkpoints.save_sharded(unfinished, model, optimizer)
    else:
        with open(unfinished, "wb") as file:
            torch.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
    if not dist.is_initialized() or dist.get_rank() == 0:
        unfinished.rename(done)
        for old in directory.glob("step*"):
            if old != done:
                remove(old)
    if dist.is_initialized():
        dist.barrier()


def remove(old: Path) -> None:
    if old.is_file():
        old.unlink()
        return
    old.rename(old.with_name("old"))  # a partly deleted folder must not look like a checkpoint
    shutil.rmtree(old.with_name("old"))


def load(directory: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if dist.is_initialized():
        checkpoints.load_sharded(directory / f"step{step}", model, optimizer)
    else:
        saved = torch.load(directory / f"step{step}", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optim"])


def report(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world > 1:
        device = initialize("gloo", rank, world, init_method=os.environ["RENDEZVOUS"])
    if not dist.is_initialized() or dist.get_rank() == 0:
        for rest in ("unfinished", "old"):
            if (directory / rest).is_dir():
                shutil.rmtree(directory / rest)
    if dist.is_initialized():
        dist.barrier()
    model, optimizer = checkpoints.build(RUN, device, sharded=dist.is_initialized())
    start = newest(directory)
    if start:
        load(directory, start, model, optimizer)
    report(f"start {start}")
    for step in range(start, STEPS):
        checkpoints.train(model, optimizer, step, 1)
        save(directory, step + 1, model, optimizer)
        report(f"step {step + 1}")
    fresh, uninterrupted = checkpoints.build(RUN, device, sharded=dist.is_initialized())
    checkpoints.train(fresh, uninterrupted, 0, STEPS)
    checkpoints.assert_same(checkpoints.everything(model, optimizer), checkpoints.everything(fresh, uninterrupted))
    if dist.is_initialized():
        dist.barrier()
    report("the same")
    if dist.is_initialized():
        finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
