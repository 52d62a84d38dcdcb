"""[ActiveLR] Fig. 13 and A.3: the four ways to decrease and to increase a rate, over 10⁴ epochs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

import fused_adaptive as fa

from ..demo.report import markdown
from .experiment import Criterion, Experiment, Run, Runs, finite, select
from .plotting import panels, style

LOW, HIGH = 0.9, 0.1
RULES = (
    "multiply down, add up",
    "multiply down, multiply up",
    "subtract down, add up",
    "subtract down, multiply up",
)
ADD, SHRINK, *NEGATIVE = RULES
#: The rule of the paper, taken by our ActiveSGD: the signs of random gradients agree half of the time.
OURS = "ActiveSGD, random gradients"
#: Each rule has a draw of its own for every seed; the paper shows one.
PAPER = {"mean": 1.0, "std": 0.3}


@dataclass(frozen=True)
class Job:
    """``rule``: a key of :data:`RULES`, or :data:`OURS`."""

    rule: str
    epochs: int
    seed: int


def jobs(scale: str) -> list[Job]:
    epochs, seeds = (500, 1) if scale == "smoke" else (10_000, 3)
    return [Job(rule, epochs, seed) for seed in range(seeds) for rule in (*RULES, OURS)]


def train(job: Job) -> Run:
    rates = _of_ours(job) if job.rule == OURS else _of_rule(job)
    later = torch.tensor(rates[len(rates) // 10 :], dtype=torch.float64)  # without what the first rate still decides
    return {
        "mean": finite(later.mean().item()),
        "std": finite(later.std().item()),
        "last": finite(rates[-1]),
        "lowest": finite(min(rates)),
        "rates": [finite(rate, 4) for rate in rates[:: max(1, job.epochs // 500)]],
    }


def _of_rule(job: Job) -> list[float]:
    agreements = torch.rand(job.epochs, generator=torch.Generator().manual_seed(job.seed)) < 0.5
    rates = [1.0]
    for agreement in agreements.tolist():
        rates.append(changed(rates[-1], job.rule, agreement))
    return rates


def changed(rate: float, rule: str, agreement: bool) -> float:
    """The rate after an epoch."""
    down, up = rule.split(", ")
    if agreement:
        return rate + HIGH if up == "add up" else (1 + HIGH) * rate
    return LOW * rate if down == "multiply down" else rate - (1 - LOW)


def _of_ours(job: Job) -> list[float]:
    """The rate of one element, an interval an epoch."""
    generator = torch.Generator().manual_seed(job.seed)
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = fa.ActiveSGD([p], lr=1.0, interval=1, increment=HIGH, low=LOW)
    rates = []
    for _ in range(job.epochs):
        p.grad = torch.randn(1, dtype=torch.float64, generator=generator)
        optimizer.step()
        rates.append(optimizer.learning_rates()[0]["mean"])
    return rates


# ---- what the runs show ----


def is_stable(run: Run) -> bool:
    """Positive all the time, with the mean and the deviation that the paper prints, as it rounds them."""
    return run["lowest"] > 0 and round(run["mean"], 1) == PAPER["mean"] and round(run["std"], 1) == PAPER["std"]


def _text(value: float | None) -> str:
    return "too large" if value is None else f"{value:.3g}"


def table(runs: Runs) -> str:
    header = ["rule", "mean", "std", "lowest", "after the last epoch"]
    rows = [
        [f"{rule}, seed {run['seed']}", *(_text(run[key]) for key in ("mean", "std", "lowest", "last"))]
        for rule in (*RULES, OURS)
        for run in select(runs, rule=rule)
    ]
    return markdown((header, rows))


def draw(runs: Runs, figure: Figure) -> None:
    axes = panels(figure, [*RULES, OURS], rows=2)
    for ax, rule in zip(axes, (*RULES, OURS), strict=True):
        for run in select(runs, rule=rule):
            every = max(1, run["epochs"] // 500)
            look = {**style(run["seed"]), "marker": None, "linestyle": "-", "linewidth": 0.7}
            ax.plot([i * every for i in range(len(run["rates"]))], run["rates"], label=f"seed {run['seed']}", **look)
        ax.set(xlabel="epoch")
        if rule == "subtract down, multiply up":
            ax.set_yscale("symlog")
    axes[0].set_ylabel("learning rate")
    axes[0].legend(fontsize=7)


EXPERIMENT = Experiment(
    title="[ActiveLR] Fig. 13, A.3: the four rules",
    paper="Over 10⁴ epochs a rate is decreased with probability ½, else increased: only multiplying down and adding up "
    "keeps it positive and stable (mean 1.0, deviation 0.3); subtracting leads to negative rates, multiplying both "
    "ways to 0.",
    ours={
        "cpu": "As in the paper, from a rate of 1, with three draws; × 0.9 and − 0.1, + 0.1 and × 1.1. The paper's "
        "rule a second time by our ActiveSGD on random gradients. The first tenth is left out of means and "
        "deviations.",
        "gpu": "As at cpu scale.",
    },
    jobs=jobs,
    train=train,
    trained_by=(train, _of_rule, changed, _of_ours, LOW, HIGH),
    floor=None,
    criteria=(
        Criterion(
            "multiply down, add up: mean 1.0 and deviation 0.3, always positive",
            lambda runs: all(map(is_stable, select(runs, rule=ADD))),
        ),
        Criterion("our ActiveSGD has the same", lambda runs: all(map(is_stable, select(runs, rule=OURS)))),
        Criterion(
            "multiplying both ways ends below 10⁻³",
            lambda runs: all(abs(run["last"]) < 1e-3 for run in select(runs, rule=SHRINK)),
        ),
        Criterion(
            "both ways to subtract lead to negative rates",
            lambda runs: all(run["lowest"] < 0 for rule in NEGATIVE for run in select(runs, rule=rule)),
        ),
    ),
    table=table,
    draw=draw,
)
