"""What the runs of ``trainable`` show: criteria, tables, the plot."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure

from ..demo.report import markdown, rate_name
from .experiment import Criterion, Run, Runs, mean, mean_and_std, select
from .plotting import band, epochs, panels, style
from .training import final

FLOOR = 85.0
PLAIN = ("sgd", "sgd_mstep", "sgd_exp")
DEFAULT = {"bound": 0.25, "fraction": 1 / 3, "eta": None}
#: What a run counts as that diverges.
CHANCE, LOST = 10.0, float("inf")
Cell = tuple[float, int]


def methods(runs: Runs) -> list[str]:
    return list(dict.fromkeys(run["method"] for run in runs if "method" in run))


def cells(runs: Runs, method: str) -> dict[Cell, list[Run]]:
    """The runs of the grid by rate and batch size, all seeds of a cell."""
    found: dict[Cell, list[Run]] = {}
    for run in select(runs, method=method, **DEFAULT):
        found.setdefault((run["lr"], run["batch"]), []).append(run)
    return found


def accuracies(runs: Runs, method: str) -> dict[Cell, float]:
    """At the end, in the mean over the seeds; that of chance where one diverged."""
    return {cell: mean(map(final, own)) or CHANCE for cell, own in cells(runs, method).items()}


def losses(runs: Runs, method: str) -> dict[Cell, float]:
    """Training losses of the last epoch."""
    found = {cell: mean(run["train_loss"][-1] for run in own) for cell, own in cells(runs, method).items()}
    return {cell: LOST if loss is None else loss for cell, loss in found.items()}


def range_of(runs: Runs, *names: str) -> float:
    """Between the best and the worst cell of one method, or of several taken as one."""
    values = [accuracy for name in names for accuracy in accuracies(runs, name).values()]
    return max(values) - min(values)


def plain_best(runs: Runs) -> float | None:
    return max((x for name in ("sgd", "adam") for x in accuracies(runs, name).values()), default=None)


def diverges(run: Run) -> bool:
    """Whether it ended no better than 20 %, twice chance, or not at all."""
    accuracy = final(run)
    return accuracy is None or accuracy < 20


def _share_of_cells(better: Callable[[Cell], bool], runs: Runs) -> float:
    compared = list(cells(runs, "sgd_tlr"))
    return sum(map(better, compared)) / len(compared)


def _is_below_schedules(runs: Runs) -> bool:
    ours, theirs = losses(runs, "sgd_tlr"), [losses(runs, name) for name in PLAIN]
    return _share_of_cells(lambda cell: all(ours[cell] <= other[cell] for other in theirs), runs) >= 0.75


def _rises_and_falls(runs: Runs) -> bool:
    """From the smallest rate, with each batch size: the mean rate's largest value is neither its first nor its last."""
    lowest = min(lr for lr, _ in cells(runs, "sgd_tlr"))
    curves = [run["learning_rate"] for (lr, _), own in cells(runs, "sgd_tlr").items() if lr == lowest for run in own]
    return all(0 < rates.index(max(rates)) < len(rates) - 1 for rates in curves)


def _diverges_with_large_bounds(runs: Runs) -> bool:
    """Some run with 5 and some with 10 diverges, none with a smaller bound."""
    by_bound = {c: [diverges(r) for r in varied(runs, "bound", c)] for c in values_of(runs, "bound")}
    return all(any(of) for c, of in by_bound.items() if c >= 5) and not any(
        any(of) for c, of in by_bound.items() if c < 5
    )


def _output_rises_faster(runs: Runs) -> bool:
    """Per-layer rates from the smallest initial one: the output weight's largest is above the hidden weight's."""
    lowest = min(lr for lr, _ in cells(runs, "sgd_tlr_pl"))
    own = [run for (lr, _), of in cells(runs, "sgd_tlr_pl").items() if lr == lowest for run in of]
    peaks = [[max(rates) for rates in zip(*run["watched"], strict=True)] for run in own]
    return all(of[-2] > of[0] for of in peaks)  # weight, bias; weight, bias


def _per_layer_is_as_good(runs: Runs) -> bool:
    a, b = accuracies(runs, "sgd_tlr"), accuracies(runs, "sgd_tlr_pl")
    return _share_of_cells(lambda cell: abs(a[cell] - b[cell]) <= 1, runs) >= 0.75


def _hypergradients(runs: Runs) -> list[str]:
    return [name for name in methods(runs) if name.startswith("hypergradient")]


CRITERIA = (
    Criterion(
        "sgd_tlr's range of accuracies over rates and sizes is a third of SGD's at most",
        lambda runs: range_of(runs, "sgd_tlr") <= range_of(runs, "sgd") / 3,
    ),
    Criterion(
        "its training loss is below that of SGD and its schedules in three quarters of the cells", _is_below_schedules
    ),
    Criterion(
        "hypergradients over the three β range wider",
        lambda r: range_of(r, *_hypergradients(r)) > range_of(r, "sgd_tlr"),
    ),
    Criterion("rates rise, then fall, from the smallest one", _rises_and_falls),
    Criterion("c = 5 and 10 diverge, smaller ones do not", _diverges_with_large_bounds),
    Criterion(
        "per layer the accuracy is the same within a point in three quarters of the cells", _per_layer_is_as_good
    ),
    Criterion("the rate of the output's weights rises higher than that of the hidden ones", _output_rises_faster),
    Criterion(
        "a training step takes 5 % more time than SGD's at most",
        lambda runs: all(run["timing"]["ratio"]["sgd_tlr"] <= 1.05 for run in runs if "timing" in run),
    ),
)


# ---- the variations ----


def values_of(runs: Runs, name: str) -> list[float]:
    """The values of a varied argument; the default among them."""
    own = [run for run in runs if run.get("method") == "sgd_tlr"]
    return sorted({run[name] for run in own if run[name] is not None})


def varied(runs: Runs, name: str, value: float | None) -> list[Run]:
    """At the rates and the batch size of the variations; all arguments but one at their defaults."""
    own = [run for run in runs if run.get("method") == "sgd_tlr"]
    places = {(r["lr"], r["batch"]) for r in own if any(r[n] != d for n, d in DEFAULT.items())}
    found = select(own, **{**DEFAULT, name: value})
    return [run for run in found if (run["lr"], run["batch"]) in places]


def table(runs: Runs) -> str:
    grid = sorted({cell for name in methods(runs) for cell in cells(runs, name)})
    header = ["test accuracy %, lr / batch", *(f"{rate_name(lr)} / {batch}" for lr, batch in grid), "range"]
    rows = []
    for name in methods(runs):
        own = cells(runs, name)
        results = [mean_and_std(map(final, own.get(cell, ()))) for cell in grid]
        rows.append([name, *results, f"{range_of(runs, name):.1f}" if own else "–"])
    parts = [markdown((header, rows))]
    rows = []
    for name, label in (("bound", "c"), ("fraction", "p"), ("eta", "η")):
        for value in values_of(runs, name):
            found = varied(runs, name, value)
            for lr in sorted({run["lr"] for run in found}):
                of = select(found, lr=lr)
                lost = f"{sum(map(diverges, of))} of {len(of)}"
                losses_of = mean_and_std((run["train_loss"][-1] for run in of), 3)
                rows.append(
                    [f"{label} = {value:.3g}, lr {rate_name(lr)}", mean_and_std(map(final, of)), losses_of, lost]
                )
    if rows:
        parts.append(markdown((["sgd_tlr, batch 256", "test accuracy %", "training loss", "below 20 %"], rows)))
    for run in runs:
        if "timing" in run:
            found = run["timing"]
            ratios = (
                f"{k} {v:.3f} ({found['low'][k]:.3f} to {found['high'][k]:.3f})" for k, v in found["ratio"].items()
            )
            parts.append(
                f"Time of a training step by that of SGD, quartiles of {found['rounds']} rounds on a machine "
                f"with other work (load {found['load']:g}): {', '.join(ratios)}."
            )
    return "\n\n".join(parts)


def draw(runs: Runs, figure: Figure) -> None:
    titles = ["training loss", "learning rate, sgd_tlr", "test accuracy %"]
    titles += ["training loss, all methods", "rates of tensors, sgd_tlr_pl", "training loss, bounds c"]
    axes = panels(figure, titles, rows=2)
    for i, (cell, own) in enumerate(sorted(cells(runs, "sgd_tlr").items())):
        label = f"{cell[1]}, {rate_name(cell[0])}"
        for ax, key in zip(axes, ("train_loss", "learning_rate", "test"), strict=False):
            band(ax, epochs([run[key] for run in own]), label, i, marker=None)
    for i, name in enumerate(methods(runs)):
        band(axes[3], epochs([run["train_loss"] for own in cells(runs, name).values() for run in own]), name, i)
    pl = cells(runs, "sgd_tlr_pl")
    for run in pl[min(pl)][:1] if pl else ():
        names = ("hidden weight", "hidden bias", "output weight", "output bias")
        for i, rates in enumerate(zip(*run["watched"], strict=True)):
            axes[4].plot(
                range(1, len(rates) + 1), rates, label=names[i] if len(run["watched"][0]) == 4 else None, **style(i)
            )
    for i, c in enumerate(values_of(runs, "bound")):
        band(axes[5], epochs([run["train_loss"] for run in varied(runs, "bound", c)]), f"c = {c:g}", i)
    for i, ax in enumerate(axes):
        ax.set(xlabel="epoch")
        if i != 2:
            ax.set_yscale("log")
        if ax.get_legend_handles_labels()[1]:
            ax.legend(fontsize=6, ncols=2 if i < 3 else 1)
