"""[ActiveLR] Fig. 4: how much the result depends on the size of the mini-batches."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from ..demo.report import markdown, rate_name
from . import optimizers, training
from .experiment import Criterion, Experiment, Floor, Run, Runs, mean, mean_and_std, select
from .optimizers import ACTIVE, PLAIN
from .plotting import band, panels
from .training import Setting, best, task_of

#: The paper's rate, and a good one for SGD.
PAPERS, GOOD = 1e-4, 0.05
RATES = (PAPERS, GOOD)
FLOOR = 85.0


@dataclass(frozen=True)
class Job:
    setting: Setting
    policy: str
    lr: float
    batch: int
    seed: int


SIZES = {
    "smoke": (Setting("mnist5k", 256, 200, 14, "cnn", 2), (64, 256), 1),
    "cpu": (Setting("fashion-mnist", 8192, 2000, 14, "cnn", 10), (64, 256, 1024, 4096), 3),
    "gpu": (
        Setting("fashion-mnist", None, None, 28, "resnet20", 100, "cuda"),
        (64, 128, 256, 512, 1024, 2048, 4096),
        3,
    ),
}


def jobs(scale: str) -> list[Job]:
    setting, sizes, seeds = SIZES[scale]
    return [
        Job(setting, policy, lr, batch, seed)
        for seed in range(seeds)
        for lr in RATES
        for policy in (PLAIN, ACTIVE)
        for batch in sizes
    ]


def train(job: Job) -> Run:
    def build(parameters: list[Tensor], steps: int) -> Optimizer:
        return optimizers.adaptive("SGD", job.policy, parameters, job.lr, steps)

    return training.train(task_of(job.setting), build, batch=job.batch, seed=job.seed)


def by_batch(runs: Runs, policy: str, lr: float) -> dict[float, list[float | None]]:
    """The best accuracies of all epochs, one a seed, by batch size."""
    own = select(runs, policy=policy, lr=lr)
    return {size: [best(run) for run in select(own, batch=size)] for size in sorted({run["batch"] for run in own})}


def loss_of(runs: Runs, policy: str, lr: float) -> float:
    """Points that the largest batch loses against the best size."""
    means = [mean(values) or 10.0 for values in by_batch(runs, policy, lr).values()]
    return max(means) - means[-1]


def table(runs: Runs) -> str:
    sizes = sorted({run["batch"] for run in runs})
    header = ["best test accuracy %", "lr", *(f"batch {size}" for size in sizes)]
    rows = [
        [optimizers.name("SGD", policy), rate_name(lr), *(mean_and_std(cells.get(size, ())) for size in sizes)]
        for lr in RATES
        for policy in (PLAIN, ACTIVE)
        for cells in (by_batch(runs, policy, lr),)
    ]
    return markdown((header, rows))


def draw(runs: Runs, figure: Figure) -> None:
    axes = panels(figure, [f"lr {rate_name(lr)}" for lr in RATES], sharey=True)
    for ax, lr in zip(axes, RATES, strict=True):
        for number, policy in enumerate((PLAIN, ACTIVE)):
            band(ax, by_batch(runs, policy, lr), optimizers.name("SGD", policy), number)
        sizes = sorted({run["batch"] for run in runs})
        ax.set(xscale="log", xlabel="batch size")
        ax.set_xticks(sizes, list(map(str, sizes)))
        ax.minorticks_off()
        ax.legend(fontsize=8)
    axes[0].set_ylabel("best test accuracy %")


EXPERIMENT = Experiment(
    title="[ActiveLR] Fig. 4: sensitivity to the batch size",
    paper="CIFAR-10, ResNet-18, α = 10⁻⁴: larger batches than 128 significantly decrease the test accuracy of SGD with "
    "momentum; ActiveSGD achieves a relatively high one with all sizes.",
    ours={
        "cpu": "Fashion-MNIST, 8192 images of 14×14 pixels, a CNN of two convolutions with BatchNorm, 10 epochs (1280, "
        "320, 80 and 20 steps); also at a rate that is good for SGD. Three seeds.",
        "gpu": "Fashion-MNIST, ResNet-20, 100 epochs; also at a rate that is good for SGD. Three seeds.",
    },
    jobs=jobs,
    train=train,
    trained_by=(train, *optimizers.TRAINED_BY, *training.TRAINED_BY),
    floor=Floor(
        f"SGD reaches {FLOOR:g} % at its best rate and size",
        lambda runs: max(mean(v) or 0.0 for lr in RATES for v in by_batch(runs, PLAIN, lr).values()) >= FLOOR,
    ),
    criteria=(
        Criterion(
            "at α = 10⁻⁴ SGD loses 10 points or more from its best to the largest size",
            lambda runs: loss_of(runs, PLAIN, PAPERS) >= 10,
        ),
        Criterion(
            "at α = 10⁻⁴ ActiveSGD loses a third of that at most",
            lambda runs: loss_of(runs, ACTIVE, PAPERS) <= loss_of(runs, PLAIN, PAPERS) / 3,
        ),
        Criterion(
            "at the good rate ActiveSGD loses no more than SGD does",
            lambda runs: loss_of(runs, ACTIVE, GOOD) <= loss_of(runs, PLAIN, GOOD),
        ),
    ),
    table=table,
    draw=draw,
)
