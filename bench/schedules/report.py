"""The output of the runs with AALR and ASLR: a table, and plots of rates and accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .runs import METHODS

Results = dict[str, Any]


def settings(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Groups the runs by setting: method, batch size and first rate. The keys are readable names."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        method = METHODS[run["method"]]
        name = f"{method.label}, batch {run['batch_size']}"
        if run["lr"] != method.lr:
            name += f", from lr {run['lr']:g}, {run['epochs']} epochs, patience {run['patience']}"
        found.setdefault(name, []).append(run)
    return found


HEADER = (
    "method",
    "test accuracy %",
    "of AALR's checkpoint %",
    "seeds",
    "train loss at end",
    "rate at end",
    "s an epoch",
)


def rows(results: Results) -> list[tuple[str, ...]]:
    """Returns a row per setting: accuracy as mean (min to max over the seeds), loss and rate of the last epoch."""
    return [(name, *_row(runs)) for name, runs in settings(results).items()]


def _row(runs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    kept = [run["checkpoint_accuracy"] for run in runs if run["checkpoint_accuracy"] is not None]
    losses = [run["train_loss"][-1] for run in runs]
    rates = sorted({float(f"{run['rates'][-1][1]:.2g}") for run in runs})
    seconds = statistics.mean(run["seconds"] / len(run["train_loss"]) for run in runs)
    lost = sum(run["diverged"] for run in runs)
    return (
        _mean_and_range([run["test_accuracy"] for run in runs]) + (f", {lost} diverged" if lost else ""),
        _mean_and_range(kept) if kept else "",
        str(len(runs)),
        "not finite" if None in losses else f"{statistics.mean(losses):.3f}",
        " / ".join(f"{rate:g}" for rate in rates),
        f"{seconds:.1f}",
    )


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def show(results: Results, console: Console) -> None:
    config = results["config"]
    table = Table(
        *HEADER, title=f"ResNet-20 ({config['channels']} channels) on {config['data']}, {config['epochs']} epochs"
    )
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(results["paper_scale"])


def markdown(results: Results) -> str:
    """Returns the table for the documentation, with the hardware and the differences from the paper."""
    config, machine = results["config"], results["machine"]
    where = (
        machine["gpu"] or f"{machine['processor']}, {config['workers']} processes of one thread, shared with other work"
    )
    return (
        f"ResNet-20 ({config['channels']} channels) on {config['data']}, {len(results['runs'])} runs; mean over the "
        f"seeds, and their range. {results['paper_scale']}. {where}; torch {machine['torch']}.\n\n"
        + markdown_table(HEADER, rows(results))
    )


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ("---",) * len(header), *body))


def plot(results: Results, path: Path) -> None:
    """Plots rates and validation accuracy over epochs, with a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = settings(results)
    usual = {name: runs for name, runs in every.items() if runs[0]["method"] != "aalr"}
    plain = {name: runs for name, runs in every.items() if name not in usual and "from lr" not in name}
    other = {name: runs for name, runs in every.items() if name not in usual and name not in plain}
    middle = {name: runs for name, runs in plain.items() if runs[0]["batch_size"] == 128}
    columns = {"AALR": {**plain, **other}, "The other methods, and AALR at the same batch size": {**middle, **usual}}
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), sharex="col", layout="constrained")
    for i, (title, settings_of) in enumerate(columns.items()):
        for j, (name, runs) in enumerate(settings_of.items()):
            for seed, run in enumerate(runs):
                style = {"color": f"C{j}", "label": name if seed == 0 else None, "alpha": 1 - 0.4 * (seed > 0)}
                axes[0, i].plot(*zip(*run["rates"], strict=True), drawstyle="steps-post", **style)
                accuracy = [a if a is not None else float("nan") for a in run["accuracy"]]
                axes[1, i].plot(range(1, len(accuracy) + 1), accuracy, marker=".", **style)
        axes[0, i].set(title=title, yscale="log", ylabel="learning rate")
        axes[1, i].set(xlabel="epochs", ylabel="validation accuracy %")
        axes[1, i].legend(fontsize="small")
    config = results["config"]
    figure.suptitle(f"ResNet-20, {config['data']}, {config['images'] or 'all'} images, {len(results['runs'])} runs")
    figure.savefig(path, dpi=110)
    plt.close(figure)
