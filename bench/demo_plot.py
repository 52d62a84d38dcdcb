"""The plot of the demo: test accuracy against the initial learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .demo_report import Results, accuracies, differing_runs, rate_name

# Okabe and Ito's colours, which people with colour-blindness tell apart; marker and dashes say the same once more.
# torch's AdamW is wide and pale: what follows it exactly lies upon it and hides nothing.
STYLES: dict[str, dict[str, Any]] = {
    "torch-adamw": {"color": "#bbbbbb", "linestyle": "-", "linewidth": 9, "marker": "", "solid_capstyle": "round"},
    "adamw": {"color": "#000000", "linestyle": "--", "marker": "o", "markersize": 5},
    "active-adamw": {"color": "#E69F00", "linestyle": "-.", "marker": "s"},
    "trainable-adamw": {"color": "#0072B2", "linestyle": "-", "marker": "^"},
    "both-adamw": {"color": "#CC79A7", "linestyle": ":", "marker": "D", "linewidth": 2.4},
    "torch-sgd": {"color": "#777777", "linestyle": "-.", "marker": "o", "linewidth": 2.4},
    "trainable-sgd": {"color": "#009E73", "linestyle": "-", "marker": "v", "markersize": 8},
    "trainable-sgd-tensor": {"color": "#D55E00", "linestyle": "--", "marker": "P"},
}


def draw(results: Results, path: Path) -> None:
    """Writes a PNG with a panel for each family of methods."""
    panels = _families(results["config"]["methods"])
    figure = Figure(figsize=(5.2 * len(panels) + 0.6, 5.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, keys in zip(axes, panels, strict=True):
        _draw_panel(ax, results, keys)
    axes[0].set_ylabel("test accuracy, %   (scale: logarithm of the error)")
    figure.suptitle(_title(results), fontsize=11)
    figure.savefig(path, dpi=130)


def _title(results: Results) -> str:
    config = results["config"]
    digits = config["train_digits"] + config["test_digits"]
    return f"{'-'.join(map(str, config['layers']))} MLP on {digits} MNIST digits, {config['epochs']} epochs"


def _families(methods: dict[str, Any]) -> list[list[str]]:
    """Methods with the same baseline, the baseline among them and drawn first."""
    families: dict[str, list[str]] = {}
    for key, method in methods.items():
        families.setdefault(method["baseline"] or key, []).append(key)
    return list(families.values())


def _draw_panel(ax: Axes, results: Results, keys: list[str]) -> None:
    lrs, methods, values = results["config"]["lrs"], results["config"]["methods"], accuracies(results)
    ax.set_xscale("log")
    # On a linear axis everything worth telling apart would lie within a line's width.
    ax.set_yscale("function", functions=(_stretch, _unstretch))
    for key in keys:
        style = STYLES.get(key, {"marker": "o"})
        finite = [float("nan") if value is None else value for value in values[key]]
        ax.plot(lrs, finite, label=methods[key]["label"] + _remark(results, key), **style)
        if diverged := [lr for lr, value in zip(lrs, values[key], strict=True) if value is None]:
            label = f"{methods[key]['label']}: diverged"
            ax.plot(diverged, [3] * len(diverged), "x", color=style.get("color"), markersize=9, label=label)
    ax.set_xticks(lrs, [rate_name(lr) for lr in lrs])
    ax.minorticks_off()
    ax.set_yticks([0, 20, 40, 60, 70, 80, 85, 90, 92, 94, 96, 98])
    ax.set_ylim(0, 97)
    ax.grid(alpha=0.3)
    ax.set_xlabel("initial learning rate")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)


def _remark(results: Results, key: str) -> str:
    compared = key == "adamw" and "torch-adamw" in results["config"]["methods"]
    return "  (bit for bit the line beneath)" if compared and not differing_runs(results) else ""


def _stretch(accuracy: np.ndarray) -> np.ndarray:
    return -np.log(np.maximum(100.0 - np.asarray(accuracy), 0.1))


def _unstretch(value: np.ndarray) -> np.ndarray:
    return 100.0 - np.exp(-np.asarray(value))
