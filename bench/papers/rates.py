"""[ActiveLR] Fig. 5, 8 and 9: how much the result depends on the initial learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from ..demo.report import markdown, rate_name
from . import optimizers, training
from .experiment import Criterion, Experiment, Floor, Run, Runs, mean, mean_and_std, select
from .optimizers import ACTIVE, GAINS, PLAIN
from .plotting import band, panels
from .training import Setting, best, task_of

BACKBONES = tuple(optimizers.ARGUMENTS)
POLICIES = (PLAIN, ACTIVE, GAINS)
#: The paper gives SGD 50 times the rates of the others.
SGD_FACTOR = 50
FLOOR = 85.0
#: Means of the authors' published logs (CIFAR-10, ResNet-18, 100 epochs): the best test accuracy by initial rate.
LOG_RATES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
LOGS = {
    "AdamW": (50.5, 70.9, 80.1, 85.4, 85.3),
    "ActiveAdamW": (68.5, 77.0, 84.0, 85.8, 85.4),
    "RAdam": (50.2, 70.8, 79.9, 85.3, 86.1),
    "ActiveRAdam": (68.5, 76.9, 83.8, 85.7, 85.2),
    "AdaBelief": (49.5, 70.6, 79.7, 85.0, 84.9),
    "ActiveAdaBelief": (67.9, 77.1, 82.9, 85.4, 84.8),
}


@dataclass(frozen=True)
class Job:
    """``rate``: the initial learning rate of the adaptive backbones; SGD has 50 times as much."""

    setting: Setting
    backbone: str
    policy: str
    rate: float
    batch: int
    seed: int


SIZES = {
    "smoke": (Setting("mnist5k", 256, 200, 14, "cnn", 2), (5e-5, 5e-3), 1),
    "cpu": (Setting("fashion-mnist", 4000, 2000, 14, "cnn", 15), (5e-6, 5e-5, 5e-4, 5e-3), 3),
    "gpu": (Setting("fashion-mnist", None, None, 28, "resnet20", 100, "cuda"), (5e-7, 5e-6, 5e-5, 5e-4, 5e-3), 3),
}


def jobs(scale: str) -> list[Job]:
    setting, rates, seeds = SIZES[scale]
    batch = 128 if scale == "gpu" else 64
    return [
        Job(setting, backbone, policy, rate, batch, seed)
        for seed in range(seeds)
        for backbone in BACKBONES
        for policy in POLICIES
        for rate in rates
    ]


def lr(backbone: str, rate: float) -> float:
    return rate * (SGD_FACTOR if backbone == "SGD" else 1)


def train(job: Job) -> Run:
    def build(parameters: list[Tensor], steps: int) -> Optimizer:
        return optimizers.adaptive(job.backbone, job.policy, parameters, lr(job.backbone, job.rate), steps)

    return training.train(task_of(job.setting), build, batch=job.batch, seed=job.seed)


# ---- what the runs show ----


def by_rate(runs: Runs, backbone: str, policy: str) -> dict[float, list[Run]]:
    own = select(runs, backbone=backbone, policy=policy)
    return {rate: select(own, rate=rate) for rate in sorted({run["rate"] for run in runs})}


def accuracies(runs: Runs, backbone: str, policy: str) -> list[float]:
    """At each rate the best accuracy of all epochs, in the mean over the seeds; that of chance where there is none."""
    found = by_rate(runs, backbone, policy).values()
    return [fmean(accuracy if (accuracy := best(run)) is not None else 10.0 for run in own) for own in found if own]


def area(runs: Runs, backbone: str, policy: str) -> float | None:
    """Between the accuracies of the best and of the worst rate over training, in points an epoch.

    Where a run diverged its accuracy is taken as that of chance from there on.
    """
    curves = []
    for own in by_rate(runs, backbone, policy).values():
        if own:
            length = own[0]["setting"]["epochs"]
            curves.append(
                [
                    fmean(
                        run["test"][i] if i < len(run["test"]) and run["test"][i] is not None else 10.0 for run in own
                    )
                    for i in range(length)
                ]
            )
    return fmean(max(points) - min(points) for points in zip(*curves, strict=True)) if curves else None


def _areas(runs: Runs, policy: str, share: float) -> bool:
    """Whether each backbone's area is at most this share of the plain one's."""
    return all((area(runs, b, policy) or 0) <= share * (area(runs, b, PLAIN) or 0) for b in BACKBONES)


CRITERIA = (
    Criterion(
        "the area between the best and the worst rate is at most half of the plain optimizer's, for all four",
        lambda runs: _areas(runs, ACTIVE, 0.5),
    ),
    Criterion(
        "with the authors' gains it is smaller than the plain optimizer's, for all four",
        lambda runs: _areas(runs, GAINS, 0.95),
    ),
    Criterion(
        "the mean accuracy over the rates is higher, for all four",
        lambda runs: all(fmean(accuracies(runs, b, ACTIVE)) > fmean(accuracies(runs, b, PLAIN)) for b in BACKBONES),
    ),
    Criterion(
        "the best rate's accuracy is lower by half a point at most, for all four",
        lambda runs: all(max(accuracies(runs, b, ACTIVE)) >= max(accuracies(runs, b, PLAIN)) - 0.5 for b in BACKBONES),
    ),
)


def table(runs: Runs) -> str:
    rates = sorted({run["rate"] for run in runs})
    header = ["best test accuracy %", *map(rate_name, rates), "area, points"]
    rows = []
    for backbone in BACKBONES:
        for policy in POLICIES:
            cells = [mean_and_std(map(best, own)) for own in by_rate(runs, backbone, policy).values()]
            between = area(runs, backbone, policy)
            rows.append([optimizers.name(backbone, policy), *cells, "–" if between is None else f"{between:.1f}"])
    logs = [[label, *map(str, values)] for label, values in LOGS.items()]
    theirs = markdown((["the authors' logs", *map(rate_name, LOG_RATES)], logs))
    return f"{markdown((header, rows))}\n\nSGD's rates are {SGD_FACTOR} times those of the header.\n\n{theirs}"


def draw(runs: Runs, figure: Figure) -> None:
    axes = panels(figure, [*BACKBONES, *BACKBONES], rows=2, sharex="col", sharey="row")
    for i, backbone in enumerate(BACKBONES):
        for number, policy in enumerate(POLICIES):
            own = by_rate(runs, backbone, policy)
            label = optimizers.name(backbone, policy)
            top = {lr(backbone, rate): [best(run) for run in of] for rate, of in own.items() if of}
            losses = {lr(backbone, rate): [run["train_loss"][-1] for run in of] for rate, of in own.items() if of}
            band(axes[i], top, label, number)
            band(axes[i + len(BACKBONES)], losses, label, number)
        axes[i].set(xscale="log")
        axes[i + len(BACKBONES)].set(xscale="log", yscale="log", xlabel="initial learning rate")
        axes[i].legend(fontsize=7)
    axes[0].set_ylabel("best test accuracy %")
    axes[len(BACKBONES)].set_ylabel("training loss at the end")


def _floor(runs: Runs) -> bool:
    at = [mean(map(best, own)) for own in by_rate(runs, "AdamW", PLAIN).values()]
    return max((x for x in at if x is not None), default=0.0) >= FLOOR


EXPERIMENT = Experiment(
    title="[ActiveLR] Fig. 5, 8, 9: sensitivity to the initial rate",
    paper="CIFAR-10, ResNet-34, nine rates from 5·10⁻⁷ to 5·10⁻³ (SGD's 50 times higher), three runs each: each Active "
    "form has the higher mean accuracy, and the area between its best and its worst rate is significantly smaller. Its "
    "weight decay is inversely proportional to the rate, ours is constant.",
    ours={
        "cpu": "Fashion-MNIST, 4000 images of 14×14 pixels, a CNN of two convolutions with BatchNorm, 15 epochs of 63 "
        "steps, batch 64; four rates, three seeds.",
        "gpu": "Fashion-MNIST, ResNet-20, 100 epochs, batch 128; five rates, three seeds.",
    },
    jobs=jobs,
    train=train,
    trained_by=(train, lr, SGD_FACTOR, *optimizers.TRAINED_BY, *training.TRAINED_BY),
    floor=Floor(f"AdamW reaches {FLOOR:g} % at its best rate", _floor),
    criteria=CRITERIA,
    table=table,
    draw=draw,
)
