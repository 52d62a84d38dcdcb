"""Many small trainings, spread over processes. Finished runs are kept at once: the same call goes on with the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, is_dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Run = dict[str, Any]
Job = TypeVar("Job")


def run_all(
    jobs: Sequence[Job],
    train: Callable[[Job], Run],
    journal: Path,
    *,
    workers: int | None = None,
    describe: Callable[[Run], str] = lambda run: "",
) -> list[Run]:
    """Trains what the journal does not have yet, and returns the runs in the order of the jobs.

    Args:
        jobs: dataclasses whose fields decide a run's result, hardware apart.
        train: of a module, so that processes find it. Its result holds nothing but JSON.
        journal: a file with a line a run: the job's fields and the results. A line that was cut off is trained again.
        workers: processes of one thread each; default as many as cores. Their number changes no result.
        describe: what to print of a finished run.
    """
    wanted = {_key(job): job for job in jobs}
    done = {key: run for key, run in _read(journal).items() if key in wanted}
    missing = [job for key, job in wanted.items() if key not in done]
    if missing:
        journal.parent.mkdir(parents=True, exist_ok=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        columns += (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(elapsed_when_finished=False))
        context = get_context("spawn")  # a forked torch can hang in its thread pools
        with (
            Progress(*columns, console=Console()) as progress,
            ProcessPoolExecutor(min(workers or _cores(), len(missing)), context, initializer=_start) as pool,
            journal.open("a", encoding="utf-8") as file,
        ):
            bar = progress.add_task("runs", total=len(wanted), completed=len(done))
            futures: dict[Future[Run], Job] = {pool.submit(train, job): job for job in missing}
            try:
                for future in as_completed(futures):
                    job, run = futures[future], future.result()
                    # A newline before, too: what an interrupted call may have left stays a line of its own.
                    file.write(f"\n{json.dumps({'job': _fields(job), 'run': run}, allow_nan=False)}\n")
                    file.flush()
                    done[_key(job)] = run
                    progress.console.print(f"{_label(job)}  {describe(run)}", highlight=False)
                    progress.advance(bar)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [{**_fields(job), **done[key]} for key, job in wanted.items()]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fields(job: object) -> dict[str, Any]:
    if not is_dataclass(job) or isinstance(job, type):
        raise TypeError(f"a job is an instance of a dataclass, got {job!r}")
    return asdict(job)


def _key(job: object) -> str:
    return json.dumps(_fields(job), sort_keys=True)


def _label(job: object) -> str:
    return " ".join(f"{name}={value}" for name, value in _fields(job).items() if value is not None)


def _read(journal: Path) -> dict[str, Run]:
    runs = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        runs[json.dumps(entry["job"], sort_keys=True)] = entry["run"]
    return runs


def _start() -> None:
    torch.set_num_threads(1)
