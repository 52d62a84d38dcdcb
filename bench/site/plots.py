"""The plots of the site's pages, one function a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import fused_adaptive as fa

from .task import BATCH, EPOCHS, STEPS, Make, Training, batches, data, net, train

# Okabe and Ito's colours, which remain distinct under colour-blindness.
ORANGE, GREEN, BLUE, GREY = "#E69F00", "#009E73", "#0072B2", "#777777"
COLOURS = (BLUE, GREEN, ORANGE)
REFERENCE: dict[str, Any] = {"backend": "reference"}
THIRD = max(1, STEPS // 3)

#: Initial rates of the sweeps, of adaptive backbones and of SGD.
ADAPTIVE, OF_SGD = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0), (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def two_panels() -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    return figure, left, right


def labelled(ax: Axes, x: str, y: str, log: str = "y") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")
    ax.grid(alpha=0.3)


def sweep(name: str) -> Figure:
    """The loss at the end against the initial rate, of a backbone and of its Active form; and over the epochs."""
    plain, active = getattr(fa, name), getattr(fa, f"Active{name}")
    more: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    rates = OF_SGD if name == "SGD" else ADAPTIVE
    makes: dict[str, Make] = {
        name: lambda params, lr: plain(params, lr=lr, **more, **REFERENCE),
        f"Active{name}": lambda params, lr: active(params, lr=lr, interval=STEPS, **more, **REFERENCE),
    }
    figure, left, right = two_panels()
    for (label, make), colour, marker in zip(makes.items(), (GREY, ORANGE), "os", strict=True):
        found = [train(make, lr) for lr in rates]
        left.plot(rates, [run.losses[-1] for run in found], color=colour, marker=marker, label=label)
        for run, lr, style in zip(found[1::2], rates[1::2], (":", "--", "-"), strict=True):
            right.plot(range(1, EPOCHS + 1), run.losses, color=colour, linestyle=style, label=f"{label}, {lr:g}")
    labelled(left, "initial rate", f"loss after {EPOCHS} epochs", "xy")
    labelled(right, "epoch", "loss")
    left.legend(fontsize=8)
    right.legend(fontsize=6.5)
    return figure


def over_time(
    make: Make,
    plain: Make,
    rates: Sequence[float],
    names: tuple[str, str],
    each_step: bool = False,
) -> Figure:
    """The rate over time from several initial rates, and the loss beside that of the plain optimizer."""
    figure, left, right = two_panels()
    for lr, colour in zip(rates, COLOURS, strict=True):
        ours, theirs = train(make, lr, each_step=each_step), train(plain, lr)
        xs = [i / STEPS for i in range(1, len(ours.rates) + 1)] if each_step else range(1, EPOCHS + 1)
        left.plot(xs, ours.rates, color=colour, label=f"from {lr:g}")
        right.plot(range(1, EPOCHS + 1), ours.losses, color=colour, label=f"{names[0]}, {lr:g}")
        right.plot(range(1, EPOCHS + 1), theirs.losses, color=colour, linestyle=":", label=f"{names[1]}, {lr:g}")
    labelled(left, "epoch", "mean rate")
    labelled(right, "epoch", "loss")
    left.legend(fontsize=8)
    right.legend(fontsize=6.5)
    return figure


def sgd(params: list[nn.Parameter], lr: float, **more: Any) -> torch.optim.Optimizer:
    return fa.SGD(params, lr=lr, **more, **REFERENCE)


def adamw(params: list[nn.Parameter], lr: float, **more: Any) -> torch.optim.Optimizer:
    return fa.AdamW(params, lr=lr, **more, **REFERENCE)


def fixed() -> Figure:
    figure, left, right = two_panels()
    for ax, make, name, rates in ((left, adamw, "AdamW", (1e-5, 1e-3, 1e-1)), (right, sgd, "SGD", (1e-3, 1e-2, 1e-1))):
        for lr, colour in zip(rates, COLOURS, strict=True):
            ax.plot(range(1, EPOCHS + 1), train(make, lr).losses, color=colour, label=f"{name}, {lr:g}")
        labelled(ax, "epoch", "loss")
        ax.legend(fontsize=8)
    return figure


def active() -> Figure:
    make: Make = lambda params, lr: adamw(params, lr, policy=fa.ActiveLR(interval=STEPS))  # noqa: E731
    return over_time(make, adamw, (1e-5, 1e-3, 1e-1), ("ActiveAdamW", "AdamW"))


def trainable() -> Figure:
    make: Make = lambda params, lr: sgd(params, lr, policy=fa.TrainableLR(interval=THIRD))  # noqa: E731
    return over_time(make, sgd, (1e-3, 1e-2, 1e-1), ("SGD + TrainableLR", "SGD"), each_step=True)


def hypergradient() -> Figure:
    make: Make = lambda params, lr: sgd(params, lr, policy=fa.Hypergradient(hyper_lr=1e-3))  # noqa: E731
    return over_time(make, sgd, (1e-3, 1e-2, 1e-1), ("SGD + Hypergradient", "SGD"), each_step=True)


def controlled(runs: dict[str, Training], rate: str, loss: str) -> Figure:
    figure, left, right = two_panels()
    for (label, run), colour in zip(runs.items(), COLOURS, strict=True):
        epochs = range(1, len(run.losses) + 1)
        left.plot(epochs, run.rates, color=colour, label=label, drawstyle="steps-post")
        right.plot(epochs, run.losses, color=colour, label=label)
    labelled(left, "epoch", rate)
    labelled(right, "epoch", loss)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def aalr() -> Figure:
    def run(lr: float) -> Training:
        schedule = lambda opt, model, loss: fa.AALR(opt, model, initial_loss=loss, lr=lr, patience=3)  # noqa: E731
        return train(sgd, lr, 2 * EPOCHS, schedule=schedule)

    return controlled({f"from {lr:g}": run(lr) for lr in (1e-3, 1e-1, 10.0)}, "rate", "loss")


def aslr() -> Figure:
    def run(lr: float) -> Training:
        return train(sgd, lr, 2 * EPOCHS, schedule=lambda opt, model, loss: fa.ASLR(opt), validation=True)

    return controlled({f"from {lr:g}": run(lr) for lr in (1e-3, 1e-1, 1.0)}, "center of the search", "validation cost")


def range_test() -> Figure:
    (x, y), model = data(), net()
    loader = [batch for epoch in range(3) for batch in batches(x, y, epoch)]
    assert len(loader[0][0]) == BATCH
    optimizer = sgd(list(model.parameters()), 0.1)
    test = fa.lr_range_test(
        model, optimizer, loader, nn.functional.cross_entropy, min_lr=1e-3, max_lr=100.0, steps=120, scale="exponential"
    )
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    ax = figure.subplots()
    ax.plot(test.lrs, test.losses, color=GREY, alpha=0.5, label="loss")
    ax.plot(test.lrs, test.smoothed(), color=BLUE, label="smoothed")
    for bound in test.bounds():
        ax.axvline(bound, color=ORANGE, linestyle="--", label="bounds" if bound == test.bounds()[0] else None)
    ax.axvline(test.suggestion, color=GREEN, label="suggestion")
    labelled(ax, "rate", "loss of a batch", "x")
    ax.legend(fontsize=8)
    return figure


PLOTS: dict[str, Callable[[], Figure]] = {
    "sgd": lambda: sweep("SGD"),
    "adam": lambda: sweep("Adam"),
    "adamw": lambda: sweep("AdamW"),
    "radam": lambda: sweep("RAdam"),
    "nadam": lambda: sweep("NAdam"),
    "adabelief": lambda: sweep("AdaBelief"),
    "fixed": fixed,
    "active": active,
    "trainable": trainable,
    "hypergradient": hypergradient,
    "aalr": aalr,
    "aslr": aslr,
    "range_test": range_test,
}


def draw(name: str, folder: Path) -> Path:
    """Writes a plot as SVG, with the same bytes each time, and returns its path."""
    path = folder / f"{name}.svg"
    with matplotlib.rc_context({"svg.hashsalt": "fused_adaptive", "svg.fonttype": "path"}):
        PLOTS[name]().savefig(path, metadata={"Date": None, "Creator": None})
    return path
