"""What an experiment is: its runs, what they have to reach, what they show, and what they count as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = dict[str, Any]
Runs = Sequence[Run]

SCALES = {
    "smoke": "seconds, to see that it works",
    "cpu": "minutes to hours on two cores",
    "gpu": "the papers' sizes, as far as a GPU allows",
}


@dataclass(frozen=True)
class Criterion:
    """A claim, and whether runs confirm it."""

    claim: str
    holds: Callable[[Runs], bool]


@dataclass(frozen=True)
class Floor:
    """What the plain method reaches at its best, or the runs say nothing: stated before they are made."""

    text: str
    is_reached: Callable[[Runs], bool]


@dataclass(frozen=True)
class Experiment:
    """An experiment of a paper.

    Args:
        title: of its section.
        paper: what the paper shows, in its own figures; Markdown.
        ours: by scale, what is run and how it differs from the paper; Markdown.
        jobs: by scale, dataclasses whose fields decide a run's result, those of the first seed first.
        train: makes a run of a job, of nothing but JSON.
        trained_by: functions, classes and values that decide a run's result besides the job; see ``digests.of``.
        floor: None where nothing is trained.
        criteria: what the verdict is made of.
        table: of what was obtained, which may be a part; Markdown.
        draw: the plot that corresponds to the paper's figure.
    """

    title: str
    paper: str
    ours: Mapping[str, str]
    jobs: Callable[[str], Sequence[Any]]
    train: Callable[[Any], Run]
    trained_by: tuple[object, ...]
    floor: Floor | None
    criteria: tuple[Criterion, ...]
    table: Callable[[Runs], str]
    draw: Callable[[Runs, Figure], None]


@dataclass(frozen=True)
class Verdict:
    """``word``: confirmed, partly, not; "not at this scale" below the floor; "incomplete" or "not run yet"."""

    word: str
    holds: tuple[str, ...] = ()
    fails: tuple[str, ...] = ()


def verdict(experiment: Experiment, runs: Runs, planned: int) -> Verdict:
    """What the runs say of the paper's claims. Nothing before all planned runs are there, nor below the floor."""
    if not runs:
        return Verdict("not run yet")
    if len(runs) < planned:
        return Verdict("incomplete")
    if experiment.floor is not None and not experiment.floor.is_reached(runs):
        return Verdict("not at this scale")
    outcomes = [(criterion.claim, criterion.holds(runs)) for criterion in experiment.criteria]
    holds = tuple(claim for claim, held in outcomes if held)
    fails = tuple(claim for claim, held in outcomes if not held)
    return Verdict("partly" if holds and fails else "confirmed" if holds else "not", holds, fails)


# ---- numbers of runs ----


def select(runs: Iterable[Run], **fields: Any) -> list[Run]:
    """Those whose fields are these."""
    return [run for run in runs if all(run.get(name) == value for name, value in fields.items())]


def mean(values: Iterable[float | None]) -> float | None:
    """None where there is none, or where one of them diverged."""
    found = list(values)
    return fmean(x for x in found if x is not None) if found and None not in found else None


def mean_and_std(values: Iterable[float | None], digits: int = 1) -> str:
    """Mean ± standard deviation of what did not diverge, and how many did; "–" where there is nothing."""
    found = list(values)
    finite = [x for x in found if x is not None]
    lost = len(found) - len(finite)
    text = f"{fmean(finite):.{digits}f}" if finite else ""
    if len(finite) > 1:
        text += f" ± {stdev(finite):.{digits}f}"
    if lost:
        text += (", " if text else "") + f"{lost} diverged"
    return text or "–"


def finite(value: float, digits: int = 6) -> float | None:
    """Rounded for JSON; None where it is not finite."""
    return float(f"{value:.{digits}g}") if abs(value) < float("inf") else None
