"""Measures memory and time of AALR's snapshots, each kind in its own process: ``python -m bench.schedules.memory``."""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fused_adaptive as fa
from fused_adaptive.schedules import snapshots

from ..step.results import fill
from .report import markdown_table

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "bench" / "results" / "controllers_memory.json"
MIB = 2**20
HEADER = ("snapshot", "model MiB", "more resident memory MiB", "file MiB", "save s", "restore s")


def measure(kind: str, width: int) -> dict[str, Any]:
    """Measures one kind of snapshot of a model with ``8·width²`` float32 weights, plus biases and one BatchNorm.

    Returns:
        The bytes of the model, of the growth of resident memory from AALR's construction through a save and a restore
        (without page cache), and of the file; the seconds of a save and of a restore.
    """
    torch.set_num_threads(1)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(8)), torch.nn.BatchNorm1d(100))
    optimizer = fa.SGD(model.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "best.pt"
        before = resident()
        controller = fa.AALR(optimizer, model, initial_loss=2.0, patience=1, snapshot=file if kind == "file" else kind)
        began = time.perf_counter()
        controller.step(1.0)
        saved = time.perf_counter()
        controller.step(float("nan"))
        restored = time.perf_counter()
        assert (controller.action, controller.progress.phase) == ("restore_best", 2)
        return {
            "snapshot": kind,
            "model_bytes": snapshots.size_of(snapshots.tensors_of(model)),
            "resident_bytes": resident() - before,
            "file_bytes": file.stat().st_size if kind == "file" else 0,
            "save_seconds": round(saved - began, 3),
            "restore_seconds": round(restored - saved, 3),
        }


def resident() -> int:
    """Returns the anonymous resident bytes of this process (Linux), without mapped files and shared libraries."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError("this system does not tell the resident memory of a process; run it on Linux")
    return int(found[1]) * 1024


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"`{run['snapshot']}`" if run["snapshot"] != "file" else "a file",
            *(f"{run[name] / MIB:.1f}" for name in ("model_bytes", "resident_bytes", "file_bytes")),
            *(f"{run[name]:.2f}" for name in ("save_seconds", "restore_seconds")),
        )
        for run in results["runs"]
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.schedules.memory", description=__doc__)
    parser.add_argument("--width", type=int, default=1448, help="of the layers; the default makes 64 MiB")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--document", type=Path, help="puts the table into this file, between its marks")
    args = parser.parse_args(argv)
    runs = []
    for kind in ("device", "file"):
        with get_context("spawn").Pool(1) as pool:
            runs.append(pool.apply(measure, (kind, args.width)))
    machine = {"device": "cpu", "python": platform.python_version(), "torch": torch.__version__}
    results = {"schema": 1, "machine": machine, "runs": runs}
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = markdown_table(HEADER, rows(results))
    Console().print(table)
    if args.document:
        fill(args.document, "memory", table)


if __name__ == "__main__":
    main()
