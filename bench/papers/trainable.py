"""[TLR] Fig. 1, 2, 6 to 10: the MLP over rates and batch sizes, against schedules, Adam and hypergradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import fused_adaptive as fa

from . import timing, training
from .experiment import Experiment, Floor, Run
from .trainable_shown import CRITERIA, FLOOR, draw, plain_best, table
from .training import Setting, scheduled, task_of

#: [TLR, D]: of all methods with SGD.
SGD: dict[str, Any] = {"momentum": 0.8, "weight_decay": 5e-4}
GRID = ("sgd", "sgd_mstep", "sgd_exp", "adam", "hypergradient 1e-5", "hypergradient 1e-4", "hypergradient 1e-3")
TLR = ("sgd_tlr", "sgd_tlr_pl")
BOUNDS, FRACTIONS, ETAS = (0.1, 1.0, 5.0, 10.0), (0.1, 0.25, 0.5, 1.0), (1e-4, 1e-2, 1.0)
#: Where the bound, the fraction and the meta-rate are varied: D.3 and D.4 have batch 256.
BATCH, RATES = 256, (0.001, 0.1)


@dataclass(frozen=True)
class Job:
    """One training run.

    Args:
        bound: c of Eq. 9.
        fraction: p, the interval as a share of an epoch.
        eta: the fixed meta-rate in place of the Newton step.
    """

    setting: Setting
    method: str
    lr: float
    batch: int
    seed: int
    bound: float = 0.25
    fraction: float = 1 / 3
    eta: float | None = None


@dataclass(frozen=True)
class Timing:
    """Training steps of SGD, sgd_tlr and Adam by turns."""

    setting: Setting
    batch: int
    rounds: int


SIZES = {
    "smoke": (Setting("mnist5k", 256, 200, 14, "mlp", 2), (0.001, 0.1), (64,), 1),
    "cpu": (Setting("fashion-mnist", 6000, 2000, 14, "mlp", 15), (0.001, 0.01, 0.1), (64, 128, 256, 512), 3),
    "gpu": (
        Setting("fashion-mnist", None, None, 28, "wrn-16-4", 80, "cuda"),
        (0.001, 0.01, 0.1),
        (64, 128, 256, 512),
        3,
    ),
}


def jobs(scale: str) -> list[Job | Timing]:
    setting, rates, batches, seeds = SIZES[scale]
    found: list[Job | Timing] = []
    for seed in range(seeds):
        one = partial(Job, setting, seed=seed)
        found += [one(method, lr, batch) for method in (*GRID, *TLR) for lr in rates for batch in batches]
        tlr = partial(one, "sgd_tlr", batch=BATCH)
        found += [tlr(lr, bound=bound) for bound in BOUNDS for lr in RATES]
        found += [tlr(lr, fraction=fraction) for fraction in FRACTIONS for lr in RATES]
        found += [tlr(lr, eta=eta) for eta in ETAS for lr in RATES]
    return [*found, Timing(setting, 128, 5 if scale == "smoke" else 200)]


def train(job: Job | Timing) -> Run:
    if isinstance(job, Timing):
        return _time(job)
    epochs = job.setting.epochs

    def build(parameters: list[Tensor], steps: int) -> Optimizer:
        return optimizer_of(job, parameters, steps, epochs)

    watch = _rates_of_tensors if job.method == "sgd_tlr_pl" else None
    return training.train(task_of(job.setting), build, batch=job.batch, seed=job.seed, watch=watch)


def optimizer_of(job: Job, parameters: list[Tensor], steps: int, epochs: int) -> Optimizer:
    name, _, number = job.method.partition(" ")
    if name == "adam":
        return fa.Adam(parameters, lr=job.lr)
    if name == "hypergradient":
        return fa.SGD(parameters, lr=job.lr, policy=fa.Hypergradient(hyper_lr=float(number)), **SGD)
    if name in ("sgd_tlr", "sgd_tlr_pl"):
        interval = max(1, round(steps * job.fraction))
        granularity = "tensor" if name == "sgd_tlr_pl" else "global"
        policy = fa.TrainableLR(interval=interval, granularity=granularity, c=job.bound, eta=job.eta)
        return fa.SGD(parameters, lr=job.lr, policy=policy, **SGD)
    made = fa.SGD(parameters, lr=job.lr, **SGD)
    total = steps * epochs
    if name == "sgd_mstep":
        return scheduled(made, lambda step: 0.1 ** ((step >= total / 2) + (step >= 3 * total / 4)))
    # The paper does not say how fast: here to a hundredth.
    return made if name == "sgd" else scheduled(made, lambda step: 0.01 ** (step / total))


def _rates_of_tensors(model: nn.Module, optimizer: Optimizer) -> list[float]:
    assert isinstance(optimizer, fa.AdaptiveOptimizer)
    tensors = optimizer.learning_rates(per_tensor=True)[0]["tensors"]
    return [float(f"{rates['mean']:.4g}") for rates in tensors]


def _time(job: Timing) -> Run:
    """Of whole training steps: forward, backward and the optimizer's, as the paper times epochs."""
    task = task_of(job.setting)
    inputs, targets = (part[: job.batch] for part in task.load()[0])

    def contender(method: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = task.build()
        own = Job(job.setting, method, 0.01, job.batch, 0)
        optimizer = optimizer_of(own, list(model.parameters()), len(task.load()[0][1]) // job.batch, 1)

        def step() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            if job.setting.device != "cpu":
                torch.cuda.synchronize()

        return step

    return {"timing": timing.by_turns({name: contender(name) for name in ("sgd", "sgd_tlr", "adam")}, job.rounds)}


EXPERIMENT = Experiment(
    title="[TLR] Fig. 1, 2, 6 to 10: the MLP over rates and batch sizes",
    paper="MNIST, an MLP with 1000 hidden units, 80 epochs: sgd_tlr converges into a common behaviour from all rates "
    "and batch sizes; rates rise first, then fall; it constantly outperforms SGD and its schedules; hypergradients "
    "depend on β; with c = 5 and 10 it diverges (D.3); layers have very different rates, those near the output rise "
    "faster, with the same loss and accuracy (D.2). Seconds an epoch, WRN-16-4: SGD 24.26, sgd_tlr 24.27, Adam 24.28.",
    ours={
        "cpu": "Fashion-MNIST, 6000 images of 14×14 pixels, an MLP with 1000 hidden units, 15 epochs (1410 to 180 "
        "steps); three seeds. Gradients of intervals are those of Eq. 10 where an interval outlasts the momentum, as "
        "it does with all of the paper's sizes, else (batch 256 and 512) means of gradients. Hypergradients on the "
        "MLP, not on a WRN. Times as ratios by turns, of training steps of 128 images in one process on a machine "
        "with other work.",
        "gpu": "Fashion-MNIST, WRN-16-4, 80 epochs; three seeds. Times of training steps, by turns.",
    },
    jobs=jobs,
    train=train,
    trained_by=(train, optimizer_of, SGD, *training.TRAINED_BY),
    floor=Floor(f"SGD or Adam reaches {FLOOR:g} % at its best", lambda runs: (plain_best(runs) or 0.0) >= FLOOR),
    criteria=CRITERIA,
    table=table,
    draw=draw,
)
