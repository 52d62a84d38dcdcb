"""What the runs of ``rivals`` show: criteria, the table, the plot."""

from __future__ import annotations

import math
from statistics import fmean

from matplotlib.figure import Figure

from ..demo.report import markdown
from ..experiments.tasks import TASKS
from .experiment import Criterion, Floor, Run, Runs, mean, mean_and_std, select
from .plotting import band, panels
from .training import final

BASELINE, OURS = "AdamW, cosine", "ActiveAdamW"
RIVALS = ("Prodigy", "DAdaptAdam", "AdamWScheduleFree")
#: What AdamW has to reach as recommended: accuracy in percent, or a loss. Text: below its letters' entropy of 2.9.
FLOORS = {"digits": 92.0, "fashion": 84.0, "text": 2.75, "table": 0.1}
#: One unit of a deficit: points of accuracy, and share of a loss.
POINTS, SHARE = 0.5, 0.02


def methods(runs: Runs) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in runs if "method" in run))


def tasks(runs: Runs) -> list[str]:
    return [name for name in TASKS if select(runs, task=name)]


def results(runs: Runs, task: str, method: str) -> dict[float, float | None]:
    """By factor, in the mean over the seeds; None where a seed diverged."""
    own = select(runs, task=task, method=method)
    return {factor: mean(map(final, select(own, factor=factor))) for factor in sorted({run["factor"] for run in own})}


def units(task: str, result: float | None, against: float) -> float:
    """What is lost, in units of half a point of accuracy or 2 % of a loss; infinite where a run diverged."""
    if result is None:
        return math.inf
    return (against - result) / POINTS if TASKS[task].accurate else (result / against - 1) / SHARE


def deficits(runs: Runs, task: str, method: str) -> dict[float, float]:
    """By factor, against AdamW with its cosine as recommended."""
    against = results(runs, task, BASELINE).get(1.0)
    if against is None:
        return {}
    return {factor: units(task, result, against) for factor, result in results(runs, task, method).items()}


def worst(runs: Runs, task: str, method: str) -> float:
    return max(deficits(runs, task, method).values(), default=math.inf)


def is_good_as_recommended(runs: Runs, method: str) -> bool:
    """Whether it loses one unit at most on every task."""
    return all(deficits(runs, task, method).get(1.0, math.inf) <= 1 for task in tasks(runs))


def wins(runs: Runs, method: str, other: str) -> int:
    """Tasks on which its worst number is less bad than the other's."""
    return sum(worst(runs, task, method) < worst(runs, task, other) for task in tasks(runs))


def _floor(runs: Runs) -> bool:
    reached = []
    for task in tasks(runs):
        result = results(runs, task, BASELINE).get(1.0)
        lost = math.inf if result is None else FLOORS[task] - result
        reached.append(lost <= 0 if TASKS[task].accurate else result is not None and lost >= 0)
    return bool(reached) and all(reached)


FLOOR = Floor(
    "AdamW with its cosine reaches " + ", ".join(f"{value:g} on {task}" for task, value in FLOORS.items()), _floor
)

CRITERIA = (
    Criterion(
        "as recommended ActiveAdamW loses one unit at most against AdamW with a cosine, on every task",
        lambda runs: is_good_as_recommended(runs, OURS),
    ),
    Criterion(
        "ActiveAdamW's worst rate is less bad than that of AdamW with a cosine, on every task",
        lambda runs: wins(runs, OURS, BASELINE) == len(tasks(runs)),
    ),
    *(
        Criterion(
            f"ActiveAdamW's worst rate is less bad than {rival}'s worst number, on three tasks of four or more",
            lambda runs, rival=rival: wins(runs, OURS, rival) >= 0.75 * len(tasks(runs)),
        )
        for rival in RIVALS
    ),
)


# ---- shown ----


def epochs_to(runs: Runs, task: str, method: str) -> str:
    """The first epoch at which a recommended run is as good as AdamW's best of all epochs; the median of the seeds."""
    good = max if TASKS[task].accurate else min
    targets = [x for run in select(runs, task=task, method=BASELINE, factor=1.0) if (x := _best(run, good)) is not None]
    own = select(runs, task=task, method=method, factor=1.0)
    if not targets or not own:
        return "–"
    target = fmean(targets)
    reached = sorted(
        next((i for i, x in enumerate(run["test"], 1) if x is not None and good(x, target) == x), math.inf)
        for run in own
    )
    middle = reached[len(reached) // 2]
    return "never" if middle == math.inf else str(middle)


def _best(run: Run, good: object) -> float | None:
    found = [x for x in run["test"] if x is not None]
    return good(found) if found else None  # pyright: ignore[reportCallIssue]


def _range(values: dict[float, float]) -> str:
    if not values:
        return "–"
    return " … ".join("diverged" if x == math.inf else f"{x:.1f}" for x in (min(values.values()), max(values.values())))


def table(runs: Runs) -> str:
    timed = next((run for run in runs if "timing" in run), None)
    names = tasks(runs)
    header = ["as recommended", *(f"{t}, {'%' if TASKS[t].accurate else 'loss'}" for t in names)]
    header += [f"epochs: {t}" for t in names]
    rows = []
    for method in methods(runs):
        cells = []
        for task in names:
            own = select(runs, task=task, method=method, factor=1.0)
            cells.append(mean_and_std(map(final, own), 1 if TASKS[task].accurate else 3))
        rows.append([method, *cells, *(epochs_to(runs, task, method) for task in names)])
    parts = [markdown((header, rows)), "Epochs: to AdamW's best, in the median over the seeds."]
    header = ["units lost, best … worst of three", *names, "× AdamW's step", "ms", "state bytes a parameter"]
    rows = []
    for method in methods(runs):
        cost = ["–"] * 3
        if timed is not None:
            found = timed["timing"]
            cost = [f"{found['ratio'][method]:.2f}", f"{found['ms'][method]:.2f}", f"{timed['state_bytes'][method]:g}"]
        rows.append([method, *(_range(deficits(runs, task, method)) for task in names), *cost])
    parts.append(markdown((header, rows)))
    note = (
        "Units of half a point of accuracy or 2 % of loss, lost against AdamW with its cosine as recommended; less "
        "than 0 is better than it. "
    )
    if timed is not None:
        note += (
            f"Steps by turns in one process of one thread, {timed['tensors']} tensors of {timed['numel']} elements, on "
            f"a machine with other work (load {timed['timing']['load']:g}): the ratio is what can be trusted."
        )
    return "\n\n".join([*parts, note])


def draw(runs: Runs, figure: Figure) -> None:
    names = tasks(runs)
    axes = panels(figure, [f"{TASKS[task].label}" for task in names], rows=1 if len(names) < 4 else 2)
    for ax, task in zip(axes, names, strict=False):
        for number, method in enumerate(methods(runs)):
            own = select(runs, task=task, method=method)
            curves = {run["factor"]: [final(r) for r in select(own, factor=run["factor"])] for run in own}
            band(ax, curves, method, number)
        ax.set(xscale="log", xlabel="factor of the method's number")
        ax.set_ylabel("test accuracy %" if TASKS[task].accurate else "test loss")
        if not TASKS[task].accurate:
            ax.set_yscale("log")
    axes[0].legend(fontsize=7)
