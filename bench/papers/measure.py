"""Makes an experiment's runs, as far as they are not there yet, and keeps each as it is finished."""

from __future__ import annotations

import json
import subprocess
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from ..experiments import runner
from ..machine import circumstances, commit
from ..step.results import save_runs
from . import digests
from .experiment import Experiment, Run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "papers"
BUILD = ROOT / "build" / "papers"
#: Not to be seen in a progress bar's lines.
LISTS = ("test", "learning_rate", "watched", "train_loss", "points", "values", "rates", "accuracy")


def path_of(name: str, scale: str) -> Path:
    """Of the results. Those of the smoke scale show nothing, and are not committed."""
    if scale == "smoke":
        return BUILD / "smoke" / f"{name}.json"
    return RESULTS / (f"{name}.json" if scale == "cpu" else f"{name}_{scale}.json")


def load(path: Path) -> dict[str, Any] | None:
    """The results, their runs with the jobs' fields among their own; None where there are none."""
    if not path.exists():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    results["runs"] = [{**entry["job"], **entry["run"]} for entry in results["runs"]]
    return results


def measure(experiment: Experiment, name: str, scale: str, workers: int | None = None) -> None:
    """Makes the runs that neither the journal nor the results have.

    Runs count as made if they were made with the same training code: see :mod:`.digests`. Also where this is
    interrupted, the results have all finished ones after it.
    """
    train = partial(_with_commit, train=experiment.train, made_at=commit_of_code())
    code, journal = digests.of(experiment.trained_by), journal_of(name, scale)
    earlier = entries(path_of(name, scale))
    try:
        jobs = list(experiment.jobs(scale))
        runner.run_all(jobs, train, journal, workers=workers, describe=_line, code=code, earlier=earlier)
    finally:
        collect(experiment, name, scale)


def collect(experiment: Experiment, name: str, scale: str) -> None:
    """Puts what the journal has into the results, in the jobs' order; those of other training code make way."""
    code, jobs, path = digests.of(experiment.trained_by), list(experiment.jobs(scale)), path_of(name, scale)
    earlier, journal = entries(path), runner.entries(journal_of(name, scale))
    done = runner.kept([*earlier, *journal], code)
    if len(done) == len(runner.kept(earlier, code)):
        return
    found = []
    for job in jobs:
        fields = json.loads(json.dumps(runner.fields(job)))
        run = done.get(json.dumps(fields, sort_keys=True))
        if run is not None:
            found.append({"code": code, "job": fields, "run": run})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_runs({"schema": 1, **circumstances(), "scale": scale, "planned": len(jobs), "runs": found}, path)


def journal_of(name: str, scale: str) -> Path:
    return BUILD / f"{name}-{scale}.jsonl"


def entries(path: Path) -> list[dict[str, Any]]:
    """The lines of results; none where there are none."""
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []


def commit_of_code() -> str | None:
    """The commit, marked as dirty only if something besides results and documents was changed since."""
    found = commit()
    if found is None or not found.endswith("-dirty"):
        return found
    command = ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", ".", ":!bench/results", ":!docs"]
    return found if subprocess.run(command, check=False).returncode else found.removesuffix("-dirty")


def _with_commit(job: Any, train: Any, made_at: str | None) -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ActiveLR: lr=", UserWarning)  # rates far from good ones are what is tried
        return {**train(job), "commit": made_at}


def _line(run: Run) -> str:
    """Returns what is printed of a finished run: its numbers, and the last result of a history."""
    left_out = (*LISTS, "setting", "commit", "timing")
    shown = {k: v for k, v in run.items() if k not in left_out and not isinstance(v, (list, dict, type(None)))}
    history = run.get("test")  # the controllers' program has the number of test images there
    last = f"  {history[-1]}" if isinstance(history, list) and history else ""
    return " ".join(f"{key}={value}" for key, value in shown.items()) + last
