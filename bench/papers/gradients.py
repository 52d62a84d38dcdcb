"""[ActiveLR] Fig. 2: the gradient's norm in each layer over training."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

from ..demo.report import markdown
from . import optimizers, training
from .experiment import Criterion, Experiment, Floor, Run, Runs, mean, mean_and_std, select
from .optimizers import ACTIVE, PLAIN
from .plotting import panels
from .training import Setting, best, task_of

#: Panels a, b and c of the figure.
CASES = {"a": (PLAIN, 1e-5), "b": (PLAIN, 1e-3), "c": (ACTIVE, 1e-5)}
LABELS = {"a": "AdamW, 1e-5", "b": "AdamW, 1e-3", "c": "ActiveAdamW, 1e-5"}
FLOOR = 85.0


@dataclass(frozen=True)
class Job:
    """``case``: a key of :data:`CASES`."""

    setting: Setting
    case: str
    batch: int
    seed: int


SIZES = {
    "smoke": (Setting("mnist5k", 128, 100, 14, "resnet20/4", 2), 1),
    "cpu": (Setting("fashion-mnist", 12_000, 2000, 14, "resnet20/8", 12), 3),
    "gpu": (Setting("fashion-mnist", None, None, 28, "resnet20", 100, "cuda"), 3),
}


def jobs(scale: str) -> list[Job]:
    setting, seeds = SIZES[scale]
    return [Job(setting, case, 64, seed) for seed in range(seeds) for case in CASES]


def train(job: Job) -> Run:
    """``watched`` has for each epoch the L1 norm of each weight's gradient, from the first layer to the last.

    A norm is that of the steps of an epoch, in the mean. Weights of BatchNorm and biases are no layers of the paper.
    """
    policy, lr = CASES[job.case]
    norms: list[Tensor] = []

    def build(parameters: list[Tensor], steps: int) -> Optimizer:
        made = optimizers.adaptive("AdamW", policy, parameters, lr, steps)
        weights = [p for p in parameters if p.ndim > 1]
        made.register_step_pre_hook(lambda *_: norms.append(torch.stack([p.grad.abs().sum() for p in weights])))  # pyright: ignore[reportOptionalMemberAccess]
        return made

    def watch(model: nn.Module, optimizer: Optimizer) -> list[float]:
        means = torch.stack(norms).mean(0).tolist()
        norms.clear()
        return [float(f"{norm:.4g}") for norm in means]

    return training.train(task_of(job.setting), build, batch=job.batch, seed=job.seed, watch=watch)


# ---- what the runs show ----


def course(run: Run) -> list[float]:
    """By epoch, the mean over the convolutions of the norm relative to its largest value over training.

    Relative, so that no layer outweighs the others; the last layer is the dense one.
    """
    layers = list(zip(*run["watched"], strict=True))[:-1]
    relative = [[norm / max(layer) for norm in layer] for layer in layers]
    return [fmean(epoch) for epoch in zip(*relative, strict=True)]


def at_the_end(runs: Runs, case: str) -> float:
    """What is left at the last epoch of the course's largest value, in the mean over the seeds."""
    courses = [course(run) for run in select(runs, case=case)]
    return fmean(values[-1] / max(values) for values in courses)


def table(runs: Runs) -> str:
    header = ["", "training loss at the end", "best test accuracy %", "epoch of the largest norms", "left at the end"]
    rows = []
    for case, label in LABELS.items():
        own = select(runs, case=case)
        courses = [course(run) for run in own]
        peaks = mean_and_std([1.0 + values.index(max(values)) for values in courses])
        left = mean_and_std([values[-1] / max(values) for values in courses], 2)
        rows.append(
            [label, mean_and_std((run["train_loss"][-1] for run in own), 3), mean_and_std(map(best, own)), peaks, left]
        )
    return markdown((header, rows))


def draw(runs: Runs, figure: Figure) -> None:
    axes = panels(figure, [f"{case}) {label}" for case, label in LABELS.items()], sharex=True)
    for ax, case in zip(axes, LABELS, strict=True):
        own = select(runs, case=case)
        if not own:
            continue
        norms = torch.tensor([run["watched"] for run in own]).mean(0).numpy()
        ax.imshow(norms.T, aspect="auto", origin="lower", extent=(0.5, len(norms) + 0.5, 0.5, norms.shape[1] + 0.5))
        ax.grid(visible=False)
        ax.set(xlabel="epoch")
        losses = torch.tensor([run["train_loss"] for run in own]).mean(0).numpy()
        ax.twinx().plot(range(1, len(losses) + 1), losses, color="white", label="training loss")
    axes[0].set_ylabel("layer; colour: L1 norm of its gradient, white: loss")


def _loss(runs: Runs, case: str) -> float:
    return mean(run["train_loss"][-1] for run in select(runs, case=case)) or float("inf")


EXPERIMENT = Experiment(
    title="[ActiveLR] Fig. 2: gradient norm of each layer over training",
    paper="CIFAR-10, ResNet-18, L1 norms. Adam at 10⁻⁵ (a): the norms of the convolutions grow all the time and the "
    "loss reaches a plateau. Adam at 10⁻³ (b): they grow to a maximum and decrease slowly. ActiveAdam at 10⁻⁵ (c): "
    "they grow to a maximum as in (b), and decrease sharply once the loss is minimal.",
    ours={
        "cpu": "Fashion-MNIST, 12 000 images of 14×14 pixels, ResNet-20 with 8 channels, AdamW, 12 epochs of 188 "
        "steps, batch 64; three seeds.",
        "gpu": "Fashion-MNIST, ResNet-20, AdamW, 100 epochs, batch 64; three seeds.",
    },
    jobs=jobs,
    train=train,
    trained_by=(train, CASES, *optimizers.TRAINED_BY, *training.TRAINED_BY),
    floor=Floor(
        f"AdamW at 10⁻³ reaches {FLOOR:g} %",
        lambda runs: (mean(map(best, select(runs, case="b"))) or 0.0) >= FLOOR,
    ),
    criteria=(
        Criterion(
            "(a) the norms never fall: 95 % of the largest are left at the end", lambda r: at_the_end(r, "a") >= 0.95
        ),
        Criterion("(a) its loss stays above twice that of (b)", lambda r: _loss(r, "a") > 2 * _loss(r, "b")),
        Criterion("(c) the loss gets as low as that of (b)", lambda r: _loss(r, "c") <= _loss(r, "b")),
        Criterion("(c) the norms fall further than those of (b)", lambda r: at_the_end(r, "c") < at_the_end(r, "b")),
    ),
    table=table,
    draw=draw,
)
