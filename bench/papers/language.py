"""[ActiveLR] Fig. 6, 10 and 11: a small GPT over Wikipedia from different initial rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from ..demo.report import markdown, rate_name
from ..experiments.tasks import GPT, Data, Task, wikipedia
from . import optimizers, training
from .experiment import Criterion, Experiment, Floor, Run, Runs, mean, mean_and_std, select
from .optimizers import ACTIVE, PLAIN
from .plotting import band, panels

#: The paper gives SGD 50 times the rates of the others.
SGD_FACTOR = 50
METHODS = (("SGD", PLAIN), ("SGD", ACTIVE), ("AdamW", PLAIN), ("AdamW", ACTIVE))


@dataclass(frozen=True)
class Setting:
    """The net and its text.

    Args:
        tokens: in the training text; a tenth as many are the test text.
        block: tokens of a window.
        width: of the embeddings.
    """

    tokens: int
    vocabulary: int
    block: int
    width: int
    epochs: int
    device: str = "cpu"


@dataclass(frozen=True)
class Job:
    """``rate``: AdamW's initial learning rate; SGD has 50 times as much."""

    setting: Setting
    backbone: str
    policy: str
    rate: float
    batch: int
    seed: int


SIZES = {
    "smoke": (Setting(2_000, 300, 20, 16, 2), (1e-4, 1e-2), 8, 1),
    "cpu": (Setting(60_000, 1_000, 32, 64, 8), (1e-5, 1e-4, 1e-3, 1e-2), 32, 3),
    "gpu": (Setting(400_000, 10_000, 200, 256, 200, "cuda"), (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2), 128, 3),
}


def jobs(scale: str) -> list[Job]:
    setting, rates, batch, seeds = SIZES[scale]
    return [
        Job(setting, backbone, policy, rate, batch, seed)
        for seed in range(seeds)
        for backbone, policy in METHODS
        for rate in rates
    ]


@cache
def text(tokens: int, vocabulary: int, block: int, device: str) -> tuple[Data, Data]:
    """Windows of tokens, and the tokens that follow each: those of training, and the tenth as many that come next.

    Tokens are GPT-2's kind, pairs of bytes merged by their frequency: here in the text that is used of the excerpt.
    """
    from tokenizers import ByteLevelBPETokenizer  # pyright: ignore[reportMissingImports]

    wanted = tokens + tokens // 10 + 1
    articles = wikipedia(5 * wanted)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([articles], vocab_size=vocabulary, show_progress=False)
    codes = tokenizer.encode(articles).ids[:wanted]
    if len(codes) < wanted:
        raise ValueError(f"the excerpt has {len(codes)} tokens, {wanted} are wanted")
    stream = torch.tensor(codes, device=device)

    def windows(first: int, last: int) -> Data:
        length = (last - first) // block * block
        inputs, targets = stream[first : first + length], stream[first + 1 : first + length + 1]
        return inputs.view(-1, block), targets.view(-1, block)

    return windows(0, tokens), windows(tokens, wanted - 1)


def task_of(setting: Setting) -> Task:
    load = partial(text, setting.tokens, setting.vocabulary, setting.block, setting.device)

    def build() -> GPT:
        # [ActiveLR, Table 1]: 2 layers, 2 heads.
        return GPT(setting.width, layers=2, heads=2, codes=setting.vocabulary, context=setting.block).to(setting.device)

    return Task("mini-GPT-2", setting.epochs, load, build, accurate=False)


def train(job: Job) -> Run:
    """With the perplexity on the test text of the training text's frequencies, which the floor is half of."""

    def build(parameters: list[Tensor], steps: int) -> Optimizer:
        return optimizers.adaptive(job.backbone, job.policy, parameters, lr(job.backbone, job.rate), steps)

    task = task_of(job.setting)
    run = training.train(task, build, batch=job.batch, seed=job.seed)
    return {**run, "unigram": round(unigram(*task.load(), codes=job.setting.vocabulary), 2)}


def lr(backbone: str, rate: float) -> float:
    return rate * (SGD_FACTOR if backbone == "SGD" else 1)


def unigram(train: Data, test: Data, codes: int) -> float:
    counts = torch.bincount(train[1].flatten(), minlength=codes).double() + 1  # nothing has probability 0
    return math.exp(-(counts / counts.sum()).log()[test[1].flatten()].mean().item())


# ---- what the runs show ----


def perplexity(run: Run) -> float | None:
    """The lowest on the test text of all epochs."""
    found = [loss for loss in run["test"] if loss is not None]
    return math.exp(min(found)) if found else None


def trained(run: Run) -> float | None:
    """On the training text, in the last epoch."""
    return None if run["train_loss"][-1] is None else math.exp(run["train_loss"][-1])


def by_rate(runs: Runs, backbone: str, policy: str) -> dict[float, list[Run]]:
    own = select(runs, backbone=backbone, policy=policy)
    return {rate: select(own, rate=rate) for rate in sorted({run["rate"] for run in runs})}


def perplexities(runs: Runs, backbone: str, policy: str) -> list[float]:
    """At each rate, in the mean over the seeds; infinite where one diverged."""
    found = [mean(map(perplexity, own)) for own in by_rate(runs, backbone, policy).values() if own]
    return [math.inf if value is None else value for value in found]


def _ratio(runs: Runs, backbone: str, policy: str) -> float:
    """The worst rate's perplexity by the best one's."""
    values = perplexities(runs, backbone, policy)
    return max(values) / min(values)


def table(runs: Runs) -> str:
    rates = sorted({run["rate"] for run in runs})
    header = ["test perplexity", *map(rate_name, rates), "worst by best"]
    rows = []
    for backbone, policy in METHODS:
        own = by_rate(runs, backbone, policy)
        cells = [mean_and_std(map(perplexity, of)) for of in own.values()]
        ratio = f"{_ratio(runs, backbone, policy):.2f}" if any(own.values()) else "–"
        rows.append([optimizers.name(backbone, policy), *cells, ratio])
    known = f"the unigram model of the training text has {runs[0]['unigram']:g}" if runs else ""
    return f"{markdown((header, rows))}\n\nSGD's rates are {SGD_FACTOR} times those of the header; {known}."


def draw(runs: Runs, figure: Figure) -> None:
    axes = panels(figure, ["test perplexity", "training perplexity in the last epoch"])
    for ax, of in zip(axes, (perplexity, trained), strict=True):
        for number, (backbone, policy) in enumerate(METHODS):
            values = {rate: [of(run) for run in own] for rate, own in by_rate(runs, backbone, policy).items() if own}
            band(ax, values, optimizers.name(backbone, policy), number)
        ax.set(xscale="log", yscale="log", xlabel=f"initial learning rate (SGD: {SGD_FACTOR} times)")
    axes[0].legend(fontsize=8)


def _floor(runs: Runs) -> bool:
    return min(perplexities(runs, "AdamW", PLAIN), default=math.inf) <= runs[0]["unigram"] / 2


EXPERIMENT = Experiment(
    title="[ActiveLR] Fig. 6, 10, 11: language",
    paper="WikiText-103, mini-GPT-2 (2 layers, 2 heads, block 200, vocabulary 10 000), rates of 10⁻⁷ to 10⁻² (SGD: "
    "5·10⁻⁶ to 10⁻¹), batch 128, up to 200 epochs: the Active forms have the lower test and training perplexities, "
    "and depend less on the rate.",
    ours={
        "cpu": "60 000 tokens of Wikipedia (gensim's excerpt; GPT-2's kind of tokens), vocabulary 1000, block "
        "32, 2 layers, 2 heads, width 64, 8 epochs of 59 steps, batch 32; four rates, three seeds.",
        "gpu": "400 000 tokens of Wikipedia, vocabulary 10 000, block 200, width 256, 200 epochs, batch 128; "
        "three seeds.",
    },
    jobs=jobs,
    train=train,
    trained_by=(
        train,
        lr,
        SGD_FACTOR,
        text,
        task_of,
        unigram,
        GPT,
        wikipedia,
        *optimizers.TRAINED_BY,
        *training.TRAINED_BY,
    ),
    floor=Floor("AdamW at its best rate has half of a unigram model's perplexity at most", _floor),
    criteria=(
        Criterion(
            "the worst rate's perplexity by the best one's is smaller, for SGD and for AdamW",
            lambda r: all(_ratio(r, b, ACTIVE) < _ratio(r, b, PLAIN) for b in ("SGD", "AdamW")),
        ),
        Criterion(
            "the lowest perplexity is lower, for SGD and for AdamW",
            lambda r: all(min(perplexities(r, b, ACTIVE)) < min(perplexities(r, b, PLAIN)) for b in ("SGD", "AdamW")),
        ),
        Criterion(
            "ActiveSGD has the lowest perplexity of all (Fig. 6)",
            lambda r: min(METHODS, key=lambda m: min(perplexities(r, *m))) == ("SGD", ACTIVE),
        ),
    ),
    table=table,
    draw=draw,
)
