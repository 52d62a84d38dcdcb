"""The page's plots. Plotly, with colours that are told apart without red and green, on light and dark pages."""

from __future__ import annotations

import base64
import math
from functools import lru_cache
from typing import Any

import numpy as np
import plotly.graph_objects as go  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor

from .problems import PROBLEMS, Range, logits, moons
from .settings import Settings
from .training import Run, label, sweep_rates

COLORS = {"FixedLR": "#7a7a7a", "ActiveLR": "#d55e00", "TrainableLR": "#009e73", "Hypergradient": "#8e5bd0"}
CLASSES = ("#56b4e9", "#e6a817")
SURFACE = [[0, "#2b6a99"], [0.35, "#8fbcd9"], [0.7, "#d6e6f0"], [1, "#f7fafc"]]
#: Frames of the animation, at most (of the net, whose frames are larger), and how long one is shown, in ms.
FRAMES, NET_FRAMES, DURATION = 40, 20, 60
GRID, NET_GRID = 81, 25
#: Traces below those of the runs.
BACKGROUND = 2
LOGARITHMIC = {"type": "log", "exponentformat": "power", "nticks": 6}


def layout(**options: Any) -> dict[str, Any]:
    grid = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.35)", "automargin": True}
    common = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "#808793", "size": 12},
        "margin": {"l": 8, "r": 8, "t": 32, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"namelength": -1},
    }
    axes = {name: grid | options.pop(name) for name in list(options) if name.startswith(("xaxis", "yaxis"))}
    return common | axes | options


def line(run: Run, x: Any, y: Any, **options: Any) -> dict[str, Any]:
    color = COLORS[run.policy]
    return {"type": "scatter", "mode": "lines", "name": run.label, "x": x, "y": y, "line": {"color": color}} | options


# ---- loss and rate over time ----


def history_figure(runs: list[Run]) -> go.Figure:
    """Loss above, mean local learning rate below, against the epoch."""
    data = []
    for run in runs:
        epochs = list(range(len(run.losses)))
        sizes = [0] * (len(epochs) - 1) + [10 if run.diverged else 0]  # a cross where it is lost
        marker = {"symbol": "x", "size": sizes, "color": COLORS[run.policy], "opacity": 1}
        losses = [loss or None for loss in run.losses]  # 0 has no place on a logarithmic axis
        data.append(line(run, epochs, losses, mode="lines+markers", marker=marker, legendgroup=run.policy))
        data.append(line(run, epochs, run.rates, legendgroup=run.policy, showlegend=False, yaxis="y2"))
    return go.Figure(
        data,
        layout(
            height=420,
            hovermode="x",
            xaxis={"title": {"text": "epoch"}, "anchor": "y2"},
            yaxis={"title": {"text": "loss"}, "domain": [0.54, 1]} | LOGARITHMIC,
            yaxis2={"title": {"text": "mean rate"}, "domain": [0, 0.46]} | LOGARITHMIC,
        ),
    )


def sensitivity_figure(settings: Settings, losses: dict[str, list[float]]) -> go.Figure:
    """The loss after the last epoch against the initial rate; a gap where a run diverged."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": label(settings.optimizer, policy),
            "x": sweep_rates(),
            "y": [None if math.isnan(loss) else loss or None for loss in final],
            "line": {"color": COLORS[policy]},
        }
        for policy, final in losses.items()
    ]
    title = f"loss after {settings.epochs} epochs"
    return go.Figure(
        data,
        layout(
            height=500,
            hovermode="x",
            xaxis={"title": {"text": "initial learning rate"}, "dtick": 1} | LOGARITHMIC,
            yaxis={"title": {"text": title}} | LOGARITHMIC,
        ),
    )


# ---- paths ----


def path_figure(settings: Settings, runs: list[Run]) -> go.Figure:
    """Where the runs go, with a button and a slider for the frames of :func:`path_frames`."""
    problem = PROBLEMS[settings.problem]
    if problem.window is None:
        background = points_of_classes()
        axes = {"xaxis": {"range": NET_WINDOW[0]}, "yaxis": {"range": NET_WINDOW[1]}}
    else:
        background = surface(settings.problem, settings.epochs)
        windows, named = problem.window, ("x", "y")
        if len(problem.starts) == 1:
            windows, named = ((0, settings.epochs), problem.window[0]), ("epoch", "w")
        axes = {
            f"{axis}axis": {"range": list(window), "title": {"text": name, "standoff": 4}}
            for axis, window, name in zip("xy", windows, named, strict=True)
        }
    names = [str(epoch) for epoch in shown_epochs(settings)]
    data = [*background, *traces(settings, runs, settings.epochs)]
    return go.Figure(data, layout(height=500, **axes, **controls(names)))


def path_frames(settings: Settings, runs: list[Run]) -> list[dict[str, Any]]:
    """The frames of the animation, plain JSON. Gradio passes a figure's own frames on to nobody, so they go apart."""
    moving = [BACKGROUND + i for i in range(len(runs))]
    return [
        {"name": str(epoch), "data": traces(settings, runs, epoch), "traces": moving}
        for epoch in shown_epochs(settings)
    ]


def shown_epochs(settings: Settings) -> list[int]:
    count = min(settings.epochs, FRAMES if PROBLEMS[settings.problem].window else NET_FRAMES)
    return [round(i * settings.epochs / count) for i in range(count + 1)]


def traces(settings: Settings, runs: list[Run], epoch: int) -> list[dict[str, Any]]:
    """What a frame changes: one trace a run."""
    return paths(runs, epoch) if PROBLEMS[settings.problem].window else boundaries(runs, epoch)


def packed(array: np.ndarray) -> dict[str, str]:
    """An array as Plotly's pages read it: a third of the characters that its numbers take, and no time to write."""
    return {"dtype": array.dtype.str[1:], "bdata": base64.b64encode(array.tobytes()).decode()}


def controls(names: list[str]) -> dict[str, Any]:
    """A button that plays the frames, and a slider that goes to one."""
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    play = still | {"frame": {"duration": DURATION, "redraw": True}}
    buttons = [
        {"label": "▶", "method": "animate", "args": [names, play]},
        {"label": "■", "method": "animate", "args": [[None], still]},
    ]
    place = {"y": -0.16, "yanchor": "top", "pad": {"t": 0, "b": 0}}
    steps = [{"label": name, "method": "animate", "args": [[name], still]} for name in names]
    slider = {"active": len(names) - 1, "steps": steps, "x": 0.32, "len": 0.68, "currentvalue": {"prefix": "epoch "}}
    menu = {"type": "buttons", "direction": "left", "buttons": buttons, "x": 0, "xanchor": "left", "showactive": False}
    return {"updatemenus": [menu | place], "sliders": [slider | place]}


def paths(runs: list[Run], epoch: int) -> list[dict[str, Any]]:
    """Of each run its path up to an epoch, with a point at the end. One number alone is shown over time."""
    found = []
    for run in runs:
        upto = run.points[: epoch + 1].numpy().astype("f4")
        x, y = (upto[:, 0], upto[:, 1]) if upto.shape[1] > 1 else (np.arange(len(upto), dtype="f4"), upto[:, 0])
        sizes = np.full(len(x), 3, dtype="i1")
        sizes[-1:] = 12
        marker = {"color": COLORS[run.policy], "size": packed(sizes), "opacity": 1, "line": {"width": 0}}
        found.append(line(run, packed(x), packed(y), mode="lines+markers", marker=marker))
    return found


@lru_cache
def surface(name: str, epochs: int) -> list[dict[str, Any]]:
    """What lies under the paths: contours of the loss, and where it is least."""
    problem = PROBLEMS[name]
    assert problem.window is not None
    best = {"type": "scatter", "name": "minimum", "showlegend": False}
    if len(problem.starts) == 1:
        y = torch.linspace(*problem.window[0], GRID, dtype=torch.float64)
        x, z = np.array([0, epochs]), problem.loss(y[:, None])[:, None].expand(-1, 2)
        (minimum,) = problem.minima
        best |= {"mode": "lines", "line": {"color": "#333", "dash": "dot"}, "x": x, "y": [minimum[0]] * 2}
    else:
        x, y, grid = plane(problem.window, GRID)
        z = problem.loss(grid)
        best |= {"mode": "markers", "x": [p[0] for p in problem.minima], "y": [p[1] for p in problem.minima]}
        best["marker"] = {"symbol": "star", "size": 14, "color": "#f0e442", "line": {"color": "#333", "width": 1}}
    levels = z.add(1e-3).log10().numpy().astype("f4")
    contour = {"type": "contour", "x": x, "y": np.asarray(y), "z": levels, "colorscale": SURFACE}
    contour |= {"showscale": False, "hoverinfo": "skip", "ncontours": 18}
    contour |= {"contours": {"coloring": "heatmap"}, "line": {"width": 0.6, "color": "rgba(60,90,120,.45)"}}
    return [contour, best]


def plane(window: tuple[Range, ...], size: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
    x, y = (torch.linspace(*bounds, size, dtype=torch.float64) for bounds in window)
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    return x.numpy(), y.numpy(), grid


# ---- the net ----

NET_WINDOW = ((-1.7, 2.7), (-1.3, 1.8))


def points_of_classes() -> list[dict[str, Any]]:
    points, labels = moons()
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"class {i}",
            "showlegend": False,
            "hoverinfo": "skip",
            "x": points[labels == i, 0].numpy(),
            "y": points[labels == i, 1].numpy(),
            "marker": {"color": CLASSES[i], "size": 7, "opacity": 0.8},
        }
        for i in (0, 1)
    ]


def boundaries(runs: list[Run], epoch: int) -> list[dict[str, Any]]:
    """Of each run the line between the classes, as the net draws it after an epoch."""
    x, y, grid = plane(NET_WINDOW, NET_GRID)
    found = []
    for run in runs:
        z = logits(run.points[min(epoch, len(run.points) - 1)], grid.flatten(0, 1)).clamp(-20, 20)
        levels = packed(z.numpy().astype("f4")) | {"shape": f"{NET_GRID}, {NET_GRID}"}
        trace = {"type": "contour", "x": packed(x), "y": packed(y), "z": levels}
        trace |= {"contours": {"start": 0, "end": 0, "size": 1, "coloring": "none"}, "showscale": False}
        trace |= {"line": {"color": COLORS[run.policy], "width": 3}, "name": run.label, "showlegend": True}
        found.append(trace | {"hoverinfo": "skip"})
    return found
