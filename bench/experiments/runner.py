"""Runs many small trainings in several processes. Saves each finished run, so that an interrupted call can resume."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import asdict, is_dataclass
from functools import cache
from multiprocessing import active_children, get_context
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
    journal: Path | None = None,
    *,
    workers: int | None = None,
    describe: Callable[[Run], str] | None = None,
    code: str | None = None,
    earlier: Iterable[Run] = (),
) -> list[Run]:
    """Trains the jobs that are not in the journal yet, and returns the runs in the order of the jobs.

    Args:
        jobs: dataclasses whose fields determine a run's result, apart from hardware.
        train: a function at the top level of a module, so that processes can import it. Its result must be JSON.
        journal: a file with a line per run: a digest of the code, the job's fields and the results. Runs of other code
            and incomplete lines are run again. None: runs are not saved.
        workers: the number of processes, of one thread each; default the number of cores. It does not change results.
        describe: returns the text to print for a finished run from its job's fields and its results; default the
            fields and results themselves.
        code: a digest of what determines a run's result; default that of the package and of all of these programs.
        earlier: what other journals have, as :func:`entries` reads them.
    """
    jobs_by_key = {_key(job): job for job in jobs}
    code = code or _code()
    done = {key: run for key, run in kept([*earlier, *entries(journal)], code).items() if key in jobs_by_key}
    missing = [job for key, job in jobs_by_key.items() if key not in done]
    if journal is not None:
        journal.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console()) as progress:
        bar = progress.add_task("runs", total=len(jobs_by_key), completed=len(done))
        with closing(_finished(missing, train, workers or _cores())) as finished:
            for job, run in finished:
                if journal is not None:
                    # The newline in front separates it from an incomplete line of an interrupted call.
                    line = json.dumps({"code": code, "job": fields(job), "run": run}, allow_nan=False)
                    with journal.open("a", encoding="utf-8") as file:
                        file.write(f"\n{line}\n")
                done[_key(job)] = run
                progress.console.print((describe or _label)({**fields(job), **run}), highlight=False, soft_wrap=True)
                progress.advance(bar)
    return [{**fields(job), **done[key]} for key, job in jobs_by_key.items()]


def _finished(jobs: Sequence[Job], train: Callable[[Job], Run], workers: int) -> Generator[tuple[Job, Run], None, None]:
    """Yields each job with its run as they finish. Terminates the processes if the loop ends early."""
    if not jobs:
        return
    context = get_context("spawn")  # torch's thread pools can hang after a fork
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start) as pool:
        try:
            with _interrupts_ignored():
                futures = {pool.submit(train, job): job for job in jobs}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
                process.join()
            raise


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Makes processes that are started within it ignore Ctrl-C from the start; the parent terminates them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@cache
def _code() -> str:
    """Returns a digest of the code that determines a run's result: the package, the trainings and torch's version."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256(torch.__version__.encode())
    folders = (root / "fused_adaptive", root / "csrc", root / "bench")
    for path in sorted(path for folder in folders for path in folder.rglob("*")):
        if path.suffix in (".py", ".h", ".cpp", ".inl"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fields(job: object) -> dict[str, Any]:
    if not is_dataclass(job) or isinstance(job, type):
        raise TypeError(f"a job is an instance of a dataclass, got {job!r}")
    return asdict(job)


def _key(job: object) -> str:
    return json.dumps(fields(job), sort_keys=True)


def _label(run: Run) -> str:
    return " ".join(f"{name}={value}" for name, value in run.items() if value is not None)


def entries(journal: Path | None) -> list[dict[str, Any]]:
    """A journal's lines; not those that were cut off."""
    found = []
    for line in journal.read_text(encoding="utf-8").splitlines() if journal is not None and journal.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def kept(made: Iterable[dict[str, Any]], code: str) -> dict[str, Run]:
    """The runs among a journal's lines that were made with this code, by job."""
    return {json.dumps(entry["job"], sort_keys=True): entry["run"] for entry in made if entry.get("code") == code}


def _start() -> None:
    torch.set_num_threads(1)
