"""What the plots of the experiments share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with colour-blindness tell apart; marker and dashes say the same once more.
COLOURS = ("#777777", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osv^DPX*h"
DASHES = ("--", "-", ":", "-.")


def style(number: int) -> dict[str, Any]:
    """Of the nth line of a plot; the first is the plain method's."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def panels(figure: Figure, titles: Sequence[str], rows: int = 1, **shared: Any) -> list[Axes]:
    """Axes in rows of equal length; a size that suits their number."""
    columns = -(-len(titles) // rows)
    figure.set_size_inches(4.4 * columns + 0.6, 3.6 * rows + 0.6)
    every = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    axes = every[: len(titles)]
    for ax in every[len(titles) :]:
        ax.remove()
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    return axes


def band(ax: Axes, curves: Mapping[float, Sequence[float | None]], label: str, number: int, **extra: Any) -> None:
    """Mean over the seeds at each x, and a standard deviation around it. What diverged leaves a gap."""
    if not curves:
        return
    xs = sorted(curves)
    values = [[np.nan if y is None else y for y in curves[x]] for x in xs]
    means = np.array([np.mean(ys) for ys in values])
    deviations = np.array([np.std(ys, ddof=1) if len(ys) > 1 else 0.0 for ys in values])
    (line,) = ax.plot(xs, means, label=label, markersize=4, **{**style(number), **extra})
    ax.fill_between(xs, means - deviations, means + deviations, color=line.get_color(), alpha=0.2, linewidth=0)


def epochs(histories: Sequence[Sequence[float | None]]) -> dict[float, list[float | None]]:
    """Curves of :func:`band` from a list an epoch of each run, up to where the shortest ends."""
    length = min(map(len, histories), default=0)
    return {float(i + 1): [history[i] for history in histories] for i in range(length)}


def save(figure: Figure, title: str, path: Any) -> None:
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": ""})
