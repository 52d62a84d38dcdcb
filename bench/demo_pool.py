"""The runs of the demo, spread over processes, with their progress shown while they train."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from queue import Empty
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .demo_report import rate_name
from .demo_runs import METHODS, Digits, Job, train

Run = dict[str, Any]


class Display(Protocol):
    """What shows the runs. Runs are known by their number."""

    def epoch(self, index: int, epoch: int, loss: float, accuracy: float) -> None: ...

    def finished(self, index: int, run: Run) -> None: ...


class Bars:
    """A terminal's display: a bar for everything, and one for each run that is training now."""

    def __init__(self, progress: Progress, jobs: Sequence[Job]) -> None:
        self.progress, self.jobs = progress, jobs
        self.rows: dict[int, TaskID] = {}
        self.done: set[int] = set()
        self.total = progress.add_task("all runs", total=sum(job.epochs for job in jobs), detail="")
        self._count()

    def epoch(self, index: int, epoch: int, loss: float, accuracy: float) -> None:
        if index in self.done:  # its last epochs can be heard of after its end
            return
        job = self.jobs[index]
        if index not in self.rows:
            self.rows[index] = self.progress.add_task(f"{describe(job):<42}", total=job.epochs, detail="")
        detail = f"epoch {epoch:>2}/{job.epochs}  loss {loss:<8.4g}  accuracy {accuracy:5.1f} %"
        self.progress.update(self.rows[index], completed=epoch, detail=detail)
        self._count()

    def finished(self, index: int, run: Run) -> None:
        self.done.add(index)
        if index in self.rows:
            self.progress.remove_task(self.rows.pop(index))
        self._count()

    def _count(self) -> None:
        training = {task.id: task.completed for task in self.progress.tasks}
        completed = sum(self.jobs[i].epochs for i in self.done) + sum(training[row] for row in self.rows.values())
        self.progress.update(self.total, completed=completed, detail=f"{len(self.done)}/{len(self.jobs)} runs")


class Lines:
    """The display where there is no terminal: a line for each finished run."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.done = 0

    def epoch(self, index: int, epoch: int, loss: float, accuracy: float) -> None:
        pass

    def finished(self, index: int, run: Run) -> None:
        self.done += 1
        outcome = "diverged" if run["diverged"] else f"accuracy {run['final_accuracy']:.1f} %"
        loss = f"loss {run['train_loss'][-1]:<8.4g}  " if run["train_loss"] else ""
        count = f"[{self.done:>{len(str(len(self.jobs)))}}/{len(self.jobs)}]"
        print(f"{count} {describe(self.jobs[index]):<44}{loss}{outcome}  {run['seconds']:.1f} s", flush=True)


def describe(job: Job) -> str:
    return f"{METHODS[job.method].label}  lr {rate_name(job.lr)}"


@contextmanager
def display(console: Console, jobs: Sequence[Job]) -> Iterator[Display]:
    if not console.is_terminal:
        yield Lines(jobs)
        return
    columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        yield Bars(progress, jobs)


def run_all(jobs: Sequence[Job], digits: Digits, workers: int, shown: Display) -> list[Run]:
    """Trains every job and returns their results in order. Workers have one thread each, so their number decides
    how long it takes and nothing else."""
    context = get_context("spawn")  # a forked torch can hang in its thread pools
    events, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(digits, events, stop)) as pool:
        try:
            with _interrupts_ignored():
                futures = {pool.submit(_run, index, job): index for index, job in enumerate(jobs)}
            _watch(futures, events, shown)
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _watch(futures: dict[Future[Run], int], events: Any, shown: Display) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
        while True:
            try:
                shown.epoch(*events.get_nowait())
            except Empty:
                break
        for future in sorted(done, key=futures.__getitem__):
            shown.finished(futures[future], future.result())


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started in here ignore Ctrl-C from their first instruction on; the parent tells them to stop."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# ---- in the workers ----

_train: Callable[[int, Job], Run]


class Abandoned(Exception):
    """Ends a run that nobody waits for any more."""


def _start(digits: Digits, events: Any, stop: Any) -> None:
    """Keeps what all runs of this process share; a queue can only be handed over when a process starts."""
    global _train
    torch.set_num_threads(1)

    def run(index: int, job: Job) -> Run:
        def report(epoch: int, loss: float, accuracy: float) -> None:
            if stop.is_set():
                raise Abandoned
            events.put((index, epoch, loss, accuracy))

        return train(job, digits, report)

    _train = run


def _run(index: int, job: Job) -> Run:
    return _train(index, job)
