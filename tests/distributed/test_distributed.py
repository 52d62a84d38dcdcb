"""Two and four gloo processes against one. Their code is in script.py, which also runs with nccl.

Processes take seconds to start, so each test starts all ranks once and runs all checks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from fused_adaptive.core import ranks

from ..cuda_emulation import build
from . import checkpoints, script


def _check(rank: int, world: int, directory: str, results: Any) -> None:
    device = _initialize(rank, world, directory)
    failures = script.run(device)
    if rank == 0:
        results.update(failures)
    script.finish()


def _save_and_resume(rank: int, world: int, directory: str) -> None:
    device = _initialize(rank, world, directory)
    checkpoints.save(Path(directory), device)
    checkpoints.resume(Path(directory), device, same_world=True)
    script.finish()


def _resume(rank: int, world: int, directory: str) -> None:
    device = _initialize(rank, world, directory)
    checkpoints.resume(Path(directory), device, same_world=False)
    script.finish()


def _initialize(rank: int, world: int, directory: str) -> torch.device:
    return script.initialize("gloo", rank, world, init_method=f"file://{directory}/rendezvous{world}")


@pytest.mark.feature("DDP, FSDP2, tensor parallelism, mixed meshes")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.heavy)])
def test_ranks_together_equal_one_process(world, tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(_check, args=(world, str(tmp_path), results), nprocs=world)  # pyright: ignore
        failures = dict(results)
    assert not failures, "\n\n".join(f"{name}:\n{problem}" for name, problem in failures.items())


@pytest.mark.feature("torch.distributed.checkpoint, 4 ranks to 4, 2 and 1")
@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_four_ranks_load_on_four_two_and_one(tmp_path):
    mp.spawn(_save_and_resume, args=(4, str(tmp_path)), nprocs=4)  # pyright: ignore
    mp.spawn(_resume, args=(2, str(tmp_path)), nprocs=2)  # pyright: ignore
    checkpoints.resume(tmp_path, torch.device("cpu"), same_world=False)


@pytest.mark.feature("DDP, FSDP2, tensor parallelism, mixed meshes", backend="native-cuda", emulated=True)
@pytest.mark.heavy
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_ranks_with_the_emulated_cuda_executor_equal_one_process():
    path = str(Path(script.__file__))
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    build_first = (sys.executable, "-c", "from tests.cuda_emulation import extension; extension.library()")
    subprocess.run(build_first, cwd=build.ROOT, check=True)  # first, so that ranks do not wait for each other
    done = subprocess.run([*torchrun, path, "--emulate-cuda"], cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert "all passed" in done.stdout


def test_sums_are_moved_to_a_device_that_the_group_supports(monkeypatch):
    """FSDP2 keeps the parameters on the CPU, and the nccl group supports only GPUs."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert ranks.device_served([cpu], cpu) == cpu
    assert ranks.device_served([cpu, torch.device("cuda")], gpu) == gpu
    assert ranks.device_served([torch.device("cuda")], gpu) == gpu
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert ranks.device_served([torch.device("cuda")], cpu) == gpu
    assert ranks.device_served([cpu], gpu) == cpu
