"""docs/experiments.md: what the committed results show of each experiment, beside the paper's own figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..demo.report import markdown
from . import catalogue
from .experiment import Experiment, Verdict, verdict
from .measure import ROOT, load, path_of

DOCUMENT = ROOT / "docs" / "experiments.md"


def verdict_of(experiment: Experiment, results: dict[str, Any] | None, scale: str) -> Verdict:
    """By the runs that were planned when the results were saved."""
    if results is None:
        return verdict(experiment, [], len(experiment.jobs(scale)))
    return verdict(experiment, results["runs"], results["planned"])


def overview(scale: str = "cpu") -> str:
    """A row an experiment."""
    rows = []
    for name, experiment in catalogue.EXPERIMENTS.items():
        results = load(path_of(name, scale))
        done, planned = _counts(experiment, results, scale)
        rows.append(
            [f"`{name}`", experiment.title, f"{done} of {planned}", verdict_of(experiment, results, scale).word]
        )
    return markdown((["name", "experiment", "runs", "verdict"], rows))


def section(name: str, scale: str = "cpu") -> str:
    """What the paper shows, what was run, the figures, the plot, the verdict."""
    experiment = catalogue.EXPERIMENTS[name]
    results = load(path_of(name, scale))
    done, planned = _counts(experiment, results, scale)
    parts = [
        f"## {experiment.title}",
        f"**{conclusion(experiment, verdict_of(experiment, results, scale), done, planned)}**",
        f"The paper: {experiment.paper}",
        f"Here (`python -m bench.papers {name} --scale {scale}`): {experiment.ours[scale]}",
    ]
    floor = f"Floor: {experiment.floor.text}. " if experiment.floor else ""
    claims = " ".join(f"({i}) {criterion.claim}." for i, criterion in enumerate(experiment.criteria, 1))
    parts.append(f"{floor}What the verdict asks: {claims}")
    if results is not None and results["runs"]:
        parts.append(experiment.table(results["runs"]))
        if (plot := path_of(name, scale).with_suffix(".png")).exists():
            parts.append(f"![{experiment.title}](../{plot.relative_to(ROOT).as_posix()})")
        parts.append(_made(results))
    return "\n\n".join(parts)


def conclusion(experiment: Experiment, found: Verdict, done: int, planned: int) -> str:
    """The verdict in one line."""
    if found.word in ("not run yet", "incomplete"):
        return f"{found.word.capitalize()}: {done} of {planned} runs."
    if found.word == "not at this scale":
        assert experiment.floor is not None
        return f"Not at this scale: the floor was not reached ({experiment.floor.text})."
    number = {criterion.claim: f"({i})" for i, criterion in enumerate(experiment.criteria, 1)}
    parts = []
    if found.holds:
        parts.append(f"{', '.join(number[claim] for claim in found.holds)} hold" + "s" * (len(found.holds) == 1))
    if found.fails:
        parts.append(
            f"{', '.join(number[claim] for claim in found.fails)} do" + "es" * (len(found.fails) == 1) + " not"
        )
    return f"{found.word.capitalize()}: {'; '.join(parts)}."


def fill(document: Path = DOCUMENT, scale: str = "cpu") -> None:
    from ..step.results import fill as put

    put(document, "papers", text(scale))


def text(scale: str = "cpu") -> str:
    return "\n\n".join([overview(scale), *(section(name, scale) for name in catalogue.EXPERIMENTS)])


def draw(name: str, scale: str) -> Path | None:
    """Writes the plot beside the results; None where there are no runs."""
    from matplotlib.figure import Figure

    from .plotting import save

    path = path_of(name, scale)
    results = load(path)
    if results is None or not results["runs"]:
        return None
    experiment = catalogue.EXPERIMENTS[name]
    figure = Figure(layout="constrained")
    experiment.draw(results["runs"], figure)
    done, planned = _counts(experiment, results, scale)
    save(figure, f"{experiment.title} ({done} of {planned} runs)", path.with_suffix(".png"))
    return path.with_suffix(".png")


def _counts(experiment: Experiment, results: dict[str, Any] | None, scale: str) -> tuple[int, int]:
    if results is None:
        return 0, len(experiment.jobs(scale))
    return len(results["runs"]), results["planned"]


def _made(results: dict[str, Any]) -> str:
    runs = results["runs"]
    commits = {run["commit"][:10] + "-dirty" * run["commit"].endswith("-dirty") for run in runs if run["commit"]}
    seconds = sum(run.get("core_seconds", 0) for run in runs)
    spent = f", {seconds / 60:.0f} minutes of a core in trainings" if seconds else ""
    machine, versions = results["machine"], results["versions"]
    return (
        f"{len(runs)} of {results['planned']} runs{spent}, made at {', '.join(sorted(commits)) or 'no commit'}; "
        f"{machine['cpu']}, torch {versions['torch']}."
    )
