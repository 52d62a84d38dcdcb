"""The part of each rank in the distributed tests. test_distributed.py starts it with gloo; on GPUs, run:

    torchrun --standalone --nproc-per-node 4 tests/distributed/script.py --backend nccl

Every check compares the results of several ranks with those of one process, in float64 within 1e-12, and all ranks
with each other, bit for bit. Broken variants must fail the same checks.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    if "--emulate-cuda" in sys.argv:  # before the library that this replaces is loaded
        from tests.cuda_emulation import extension

        extension.pytest_configure()

from tests.distributed import controllers, models, sharded

CHECKS: dict[str, Callable[[torch.device], None]] = {**sharded.CHECKS, **models.CHECKS, **controllers.CHECKS}


def run(device: torch.device, chosen: str = "") -> dict[str, str]:
    """Runs the checks whose names contain ``chosen``; returns errors by name, the same on all ranks."""
    failures = {}
    for name, check in CHECKS.items():
        if chosen not in name:
            continue
        start = time.perf_counter()
        try:
            check(device)
            problem = ""
        except Exception:
            problem = traceback.format_exc()
        if dist.get_rank() == 0:
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        if any(problems):
            failures[name] = "\n".join(f"rank {problems.index(p)}: {p}" for p in dict.fromkeys(problems) if p)
    return failures


def initialize(backend: str, rank: int, world: int, **options: object) -> torch.device:
    """Initializes the process group of one rank, and returns its device."""
    torch.set_num_threads(1)
    device = torch.device("cuda", rank % torch.cuda.device_count()) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=120), **options)
    return device


def finish() -> None:
    """Ends a rank together with the others, after all references to process groups are freed."""
    sharded.meshes.clear()
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="gloo", choices=["gloo", "nccl"])
    parser.add_argument("--emulate-cuda", action="store_true", help="the CUDA executor, emulated on the CPU")
    parser.add_argument("--only", default="", help="a part of the names of the checks to run")
    arguments = parser.parse_args()
    device = initialize(arguments.backend, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    failures = run(device, arguments.only)
    if dist.get_rank() == 0:
        for name, problem in failures.items():
            print(f"--- {name} FAILED\n{problem}")
        print("failed: " + ", ".join(failures) if failures else "all passed")
    finish()
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
