"""Two and four gloo processes against one: see distributed_script.py, which also runs with nccl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from . import distributed_checkpoints, distributed_script


def _rank(rank: int, world: int, directory: str, chosen: str, results: Any) -> None:
    device = distributed_script.initialize("gloo", rank, world, init_method=f"file://{directory}/rendezvous{world}")
    try:
        failures = distributed_script.run(device, chosen)
        if rank == 0:
            results.update(failures)
        checkpoints = Path(directory, "checkpoints")
        if world == 4:
            checkpoints.mkdir(exist_ok=True)
            distributed_checkpoints.save(checkpoints, device)
        distributed_checkpoints.resume(checkpoints, device, same_world=world == 4)
    finally:
        dist.destroy_process_group()


def run(world: int, directory: Path, chosen: str) -> dict[str, str]:
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, args=(world, str(directory), chosen, results), nprocs=world)  # pyright: ignore
        return dict(results)


def test_ranks(tmp_path):
    failures = run(4, tmp_path, "") | run(2, tmp_path, "")
    assert not failures, "\n\n".join(f"{name}:\n{problem}" for name, problem in failures.items())
    distributed_checkpoints.resume(tmp_path / "checkpoints", torch.device("cpu"), same_world=False)
