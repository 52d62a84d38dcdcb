"""The plots of the demo: test accuracy against the initial learning rate, and against the batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Results, accuracies, accuracies_by_batch, label, rate_name

# Okabe and Ito's colours, which remain distinct under colour-blindness. Markers and dashes also differ.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#777777", "linestyle": "--", "marker": "o"},
    "active-sgd": {"color": "#E69F00", "linestyle": "-", "marker": "s", "linewidth": 2.4},
    "trainable-sgd": {"color": "#009E73", "linestyle": ":", "marker": "v", "linewidth": 2},
    "adamw": {"color": "#777777", "linestyle": "--", "marker": "o"},
    "active-adamw": {"color": "#E69F00", "linestyle": "-", "marker": "s", "linewidth": 2.4},
    "trainable-adamw": {"color": "#0072B2", "linestyle": ":", "marker": "^", "linewidth": 2},
    "active-radam": {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
    "active-adabelief": {"color": "#D55E00", "linestyle": "-.", "marker": "P"},
}
Line = tuple[str, dict[str, Any], Sequence[float | None]]


def draw(results: Results, rates: Path, batches: Path) -> list[Path]:
    """Writes a PNG of the rates and one of the batch sizes, where measured, with a panel per family of methods.

    Returns:
        The paths of the files that were written.
    """
    config, written = results["config"], []
    if values := accuracies(results):
        panels: dict[str, list[Line]] = {}
        for key, line in values.items():
            panels.setdefault(_family(results, key), []).append((label(results, key), _style(key), line))
        lrs = config["rates"]["lrs"]
        _save(
            rates,
            results,
            config["rates"]["epochs"],
            panels,
            lrs,
            [rate_name(lr) for lr in lrs],
            "initial learning rate",
        )
        written.append(rates)
    if by_batch := accuracies_by_batch(results):
        panels = {}
        for (key, lr), line in by_batch.items():
            # The line of the bad rate is paler.
            style = {**_style(key), "alpha": 1.0 if lr == max(config["batches"]["lrs"][key]) else 0.45}
            panels.setdefault(_family(results, key), []).append(
                (f"{label(results, key)}, lr {rate_name(lr)}", style, line)
            )
        sizes = config["batches"]["batches"]
        _save(batches, results, config["batches"]["epochs"], panels, sizes, list(map(str, sizes)), "batch size")
        written.append(batches)
    return written


def _style(key: str) -> dict[str, Any]:
    return STYLES.get(key, {"marker": "o"})


def _family(results: Results, key: str) -> str:
    return results["config"]["methods"][key]["family"]


def _save(
    path: Path,
    results: Results,
    epochs: int,
    panels: dict[str, list[Line]],
    xs: Sequence[float],
    ticks: Sequence[str],
    name: str,
) -> None:
    figure = Figure(figsize=(5.2 * len(panels) + 0.6, 5.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, lines in zip(axes, panels.values(), strict=True):
        _panel(ax, lines, xs)
        ax.set_xticks(xs, ticks)
        ax.minorticks_off()
        ax.set_xlabel(name)
    axes[0].set_ylabel("test accuracy, %   (scale: logarithm of the error)")
    config = results["config"]
    digits = config["train_digits"] + config["test_digits"]
    layers = "-".join(map(str, config["layers"]))
    figure.suptitle(f"{layers} MLP on {digits} MNIST digits, {epochs} epochs", fontsize=11)
    figure.savefig(path, dpi=130)


def _panel(ax: Axes, lines: Sequence[Line], xs: Sequence[float]) -> None:
    ax.set_xscale("log")
    # On a linear axis the differences between methods would be thinner than a line.
    ax.set_yscale("function", functions=(_stretch, _unstretch))
    for text, style, values in lines:
        finite = [float("nan") if value is None else value for value in values]
        ax.plot(xs, finite, label=text, **style)
        if diverged := [x for x, value in zip(xs, values, strict=True) if value is None]:
            ax.plot(
                diverged, [3] * len(diverged), "x", color=style.get("color"), markersize=9, label=f"{text}: diverged"
            )
    ax.set_yticks([0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 98])
    ax.set_ylim(0, 97)
    ax.grid(alpha=0.3)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _stretch(accuracy: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(100.0 - np.asarray(accuracy), 0.1))


def _unstretch(value: np.ndarray) -> np.ndarray:
    return 100.0 - np.exp(-np.asarray(value))
