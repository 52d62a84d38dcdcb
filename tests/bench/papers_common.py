"""Made-up runs of the papers' experiments: as their trainings return them, with results that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench.papers.experiment import Experiment

Run = dict[str, Any]


def made_up(experiment: Experiment, results: Callable[[Any], Run], scale: str = "cpu") -> list[Run]:
    """Runs of all jobs of a scale, read from JSON as those of a file are."""
    runs = [{**asdict(job), "commit": None, **results(job)} for job in experiment.jobs(scale)]
    return json.loads(json.dumps(runs))


def trained(accuracy: float | None, loss: float | None = 0.1, epochs: int = 15, **more: Any) -> Run:
    """Of a training that has the same accuracy and loss in each epoch."""
    return {"test": [accuracy] * epochs, "train_loss": [loss] * epochs, "learning_rate": [0.1] * epochs, **more}


def held(experiment: Experiment, runs: list[Run]) -> list[bool]:
    """Which of the criteria the runs confirm."""
    return [criterion.holds(runs) for criterion in experiment.criteria]
