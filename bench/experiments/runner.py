"""Many small trainings, spread over processes. Finished runs are kept at once: the same call goes on with the rest."""

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
    """Trains what the journal does not have yet, and returns the runs in the order of the jobs.

    Args:
        jobs: dataclasses whose fields decide a run's result, hardware apart.
        train: of a module, so that processes find it. Its result holds nothing but JSON.
        journal: a file with a line a run: the code that it was made with, the job's fields, the results. Runs of other
            code and lines that were cut off are made again. None: nothing is kept.
        workers: processes of one thread each; default as many as cores. Their number changes no result.
        describe: what to print of a finished run, from its job's fields and its results; default the fields.
        code: a digest of what decides a run's result; default that of the package and of all of these programs.
        earlier: what other journals have, as :func:`entries` reads them.
    """
    wanted = {_key(job): job for job in jobs}
    code = code or _code()
    done = {key: run for key, run in kept([*earlier, *entries(journal)], code).items() if key in wanted}
    missing = [job for key, job in wanted.items() if key not in done]
    if journal is not None:
        journal.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=Console()) as progress:
        bar = progress.add_task("runs", total=len(wanted), completed=len(done))
        with closing(_finished(missing, train, workers or _cores())) as finished:
            for job, run in finished:
                if journal is not None:
                    # A newline before, too: what an interrupted call may have left stays a line of its own.
                    line = json.dumps({"code": code, "job": fields(job), "run": run}, allow_nan=False)
                    with journal.open("a", encoding="utf-8") as file:
                        file.write(f"\n{line}\n")
                done[_key(job)] = run
                progress.console.print((describe or _label)({**fields(job), **run}), highlight=False, soft_wrap=True)
                progress.advance(bar)
    return [{**fields(job), **done[key]} for key, job in wanted.items()]


def _finished(jobs: Sequence[Job], train: Callable[[Job], Run], workers: int) -> Generator[tuple[Job, Run], None, None]:
    """Each job with its run, as they finish. Whatever ends the loop ends the processes."""
    if not jobs:
        return
    context = get_context("spawn")  # a forked torch can hang in its thread pools
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
    """Processes started in here ignore Ctrl-C from their first instruction on; the parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@cache
def _code() -> str:
    """A digest of what decides a run's result: the package, the trainings, torch."""
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
