"""What no paper tried: ActiveLR over TrainableLR's global rate, and over AALR."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

import fused_adaptive as fa

from ..demo.report import markdown, rate_name
from . import optimizers, training
from .experiment import Criterion, Experiment, Floor, Run, Runs, mean, mean_and_std, select
from .plotting import band, panels
from .training import Setting, best, task_of

BACKBONES = ("SGD", "AdamW")
#: SGD's rates are 50 times AdamW's, as in the papers.
SGD_FACTOR = 50
METHODS = ("plain", "ActiveLR", "TrainableLR", "TrainableLR and ActiveLR", "AALR", "AALR and ActiveLR")
FLOOR = 85.0
PROBE, PATIENCE = 1000, 3


@dataclass(frozen=True)
class Job:
    """``rate``: AdamW's initial learning rate; SGD has 50 times as much."""

    setting: Setting
    backbone: str
    method: str
    rate: float
    batch: int
    seed: int


SIZES = {
    "smoke": (Setting("mnist5k", 256, 200, 14, "cnn", 2), (5e-3,), 1),
    "cpu": (Setting("fashion-mnist", 4000, 2000, 14, "cnn", 15), (5e-6, 5e-5, 5e-4, 5e-3), 3),
    "gpu": (Setting("fashion-mnist", None, None, 28, "resnet20", 100, "cuda"), (5e-7, 5e-6, 5e-5, 5e-4, 5e-3), 3),
}


def jobs(scale: str) -> list[Job]:
    setting, rates, seeds = SIZES[scale]
    return [
        Job(setting, backbone, method, rate, 64, seed)
        for seed in range(seeds)
        for backbone in BACKBONES
        for method in METHODS
        for rate in rates
    ]


def train(job: Job) -> Run:
    """AALR sees the loss of the first training images before the first epoch and after each."""
    task = task_of(job.setting)
    lr = job.rate * (SGD_FACTOR if job.backbone == "SGD" else 1)
    torch.manual_seed(job.seed)
    model = task.build()
    inputs, targets = task.load()[0]
    probe = (inputs[:PROBE], targets[:PROBE])
    controllers: list[fa.AALR] = []

    def loss() -> float:
        return replace(task, accurate=False).evaluate(model, probe)

    def build(parameters: list[Tensor], steps: int) -> Optimizer:
        made = optimizer_of(job, parameters, lr, steps)
        if job.method.startswith("AALR"):
            patience = min(PATIENCE, job.setting.epochs)
            controllers.append(fa.AALR(made, model, initial_loss=loss(), lr=lr, patience=patience))
        return made

    def watch(model: nn.Module, optimizer: Optimizer) -> str:
        controllers[0].step(loss())
        return controllers[0].action

    chosen = watch if job.method.startswith("AALR") else None
    return training.train(replace(task, build=lambda: model), build, batch=job.batch, seed=job.seed, watch=chosen)


def optimizer_of(job: Job, parameters: list[Tensor], lr: float, steps: int) -> Optimizer:
    third = max(1, steps // 3)
    policy: Any = {
        "ActiveLR": lambda: fa.ActiveLR(interval=steps),
        "TrainableLR": lambda: fa.TrainableLR(interval=third),
        "TrainableLR and ActiveLR": lambda: (fa.TrainableLR(interval=third), fa.ActiveLR(interval=steps)),
        # AALR owns the scale of the rate, so ActiveLR has gains, as it has by default beside TrainableLR.
        "AALR and ActiveLR": lambda: fa.ActiveLR(interval=steps, high=0.1),
    }.get(job.method, lambda: None)()
    return getattr(fa, job.backbone)(parameters, lr=lr, policy=policy, **optimizers.ARGUMENTS[job.backbone])


# ---- what the runs show ----


def by_rate(runs: Runs, backbone: str, method: str) -> dict[float, list[float | None]]:
    own = select(runs, backbone=backbone, method=method)
    return {rate: [best(run) for run in select(own, rate=rate)] for rate in sorted({run["rate"] for run in own})}


def range_of(runs: Runs, backbone: str, method: str) -> float:
    """Points between the best rate's accuracy and the worst one's; chance where a run diverged."""
    means = [mean(values) or 10.0 for values in by_rate(runs, backbone, method).values()]
    return max(means) - min(means)


def _is_less_than_each(runs: Runs, together: str, *alone: str) -> bool:
    return all(range_of(runs, b, together) < min(range_of(runs, b, method) for method in alone) for b in BACKBONES)


def table(runs: Runs) -> str:
    rates = sorted({run["rate"] for run in runs})
    rows = []
    for backbone in BACKBONES:
        for method in METHODS:
            own = by_rate(runs, backbone, method)
            between = f"{range_of(runs, backbone, method):.1f}" if own else "–"
            rows.append([f"{backbone}, {method}", *(mean_and_std(own.get(rate, ())) for rate in rates), between])
    header = ["best test accuracy %", *map(rate_name, rates), "range"]
    return f"{markdown((header, rows))}\n\nSGD's rates are {SGD_FACTOR} times those of the header."


def draw(runs: Runs, figure: Figure) -> None:
    axes = panels(figure, BACKBONES, sharey=True)
    for ax, backbone in zip(axes, BACKBONES, strict=True):
        for number, method in enumerate(METHODS):
            band(ax, by_rate(runs, backbone, method), method, number)
        factor = f" / {SGD_FACTOR}" if backbone == "SGD" else ""
        ax.set(xscale="log", xlabel=f"initial learning rate{factor}")
    axes[0].set_ylabel("best test accuracy %")
    axes[1].legend(fontsize=7)


def _best_plain(runs: Runs) -> float:
    return max((mean(v) or 0.0 for v in by_rate(runs, "AdamW", "plain").values()), default=0.0)


def _highest(runs: Runs, backbone: str, method: str) -> float:
    return max(fmean(x or 10.0 for x in values) for values in by_rate(runs, backbone, method).values())


EXPERIMENT = Experiment(
    title="Together: ActiveLR over TrainableLR, and over AALR",
    paper="No paper tried it. [TLR] and [AALR] set one rate for all, [ActiveLR] one an element.",
    ours={
        "cpu": "Fashion-MNIST, 4000 images of 14×14 pixels, a CNN of two convolutions with BatchNorm, 15 epochs, batch "
        "64; four rates, three seeds. AALR with patience 3.",
        "gpu": "Fashion-MNIST, ResNet-20, 100 epochs, batch 64; five rates, three seeds. AALR with patience 3.",
    },
    jobs=jobs,
    train=train,
    trained_by=(train, optimizer_of, SGD_FACTOR, PROBE, PATIENCE, *optimizers.TRAINED_BY, *training.TRAINED_BY),
    floor=Floor(f"AdamW reaches {FLOOR:g} % at its best rate", lambda runs: _best_plain(runs) >= FLOOR),
    criteria=(
        Criterion(
            "TrainableLR and ActiveLR together range less over the rates than each alone, with SGD and with AdamW",
            lambda r: _is_less_than_each(r, "TrainableLR and ActiveLR", "TrainableLR", "ActiveLR"),
        ),
        Criterion(
            "AALR and ActiveLR together range less than each alone, with SGD and with AdamW",
            lambda r: _is_less_than_each(r, "AALR and ActiveLR", "AALR", "ActiveLR"),
        ),
        Criterion(
            "no combination's best accuracy is more than half a point below that of the better one alone",
            lambda r: all(
                _highest(r, b, f"{other} and ActiveLR") >= max(_highest(r, b, other), _highest(r, b, "ActiveLR")) - 0.5
                for b in BACKBONES
                for other in ("TrainableLR", "AALR")
            ),
        ),
    ),
    table=table,
    draw=draw,
)
