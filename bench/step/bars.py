"""Draws README's bar chart and fills its table of performance, from the committed results of a CPU and of a GPU::

    python -m bench.step.bars --document README.md

Bars are the time of a step relative to torch's fused AdamW on the same parameters and machine. A bar that is longer
than 1 is slower.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import results
from .goals import case_of
from .results import Record, by_threads, fill, find, with_threads
from .stats import ratio_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).parents[1] / "results"
PLOT = FOLDER / "step_bars.png"
TORCH = ("torch fused", "fixed")
BOX: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}

#: A row of the table: what is compared, on which parameters, and the two contenders as name and policy.
ROWS = (
    ("AdamW", "10 x 5M", ("ours", "fixed"), TORCH, "torch's fused AdamW"),
    ("AdamW", "ResNet-50", ("ours", "fixed"), TORCH, "torch's fused AdamW"),
    ("AdamW", "1 x 1e8", ("ours", "fixed"), ("torch.compile of torch's", "fixed"), "`torch.compile` of torch's AdamW"),
    ("ActiveAdamW", "10 x 5M", ("ours", "active"), TORCH, "torch's fused AdamW"),
    ("ActiveAdamW", "10 x 5M", ("ours", "active"), ("foreach composition", "active"), "the same in foreach operations"),
    ("ActiveAdamW", "1 x 1e8", ("ours", "active"), ("torch.compile of it", "active"), "`torch.compile` of those"),
)
#: The groups of bars, and the bars of a group.
SHAPES = ("ResNet-50", "10 x 5M", "1 x 1e8")
BARS = (
    ("AdamW", ("ours", "fixed"), "#0072B2"),
    ("ActiveAdamW", ("ours", "active"), "#E69F00"),
    ("torch foreach AdamW", ("torch foreach", "fixed"), "#999999"),
)


def samples(record: Record, shapes: str, contender: tuple[str, str], backend: str) -> list[float]:
    """Returns the times of a step, [] where it was not measured."""
    case = case_of(record, shapes)
    name, policy = contender
    name = f"ours, {backend}" if name == "ours" else name
    return find(case, case["rows"][0]["cache"], name, policy) if case else []


def table(cpu: Record, gpu: Record) -> str:
    """Returns the table of performance, with a bar chart below it."""
    from .report import markdown_table, noise

    columns = [(with_threads(_name(cpu), threads), part, "native") for threads, part in by_threads(cpu).items()]
    columns += [(f"{_name(gpu)}, C++", gpu, "native"), (f"{_name(gpu)}, Triton", gpu, "triton")]
    body = [["a step of", "parameters", "its time ÷ that of", *(title for title, *_ in columns)]]
    for what, shapes, ours, other, described in ROWS:
        cells = []
        for _, record, backend in columns:
            of, to = (samples(record, shapes, contender, backend) for contender in (ours, other))
            cells.append(_cell(ratio_interval(of, to)) if of and to else "not measured")
        body.append([what, shapes, described, *cells])
    plot = f"![Time of a step relative to torch's fused AdamW](bench/results/{PLOT.name})"
    noisy = " ".join(f"{_name(record)}: {noise(record)}" for record in (cpu, gpu) if noise(record))
    return "\n\n".join(part for part in (markdown_table(body, text_columns=3), plot, noisy) if part)


def _cell(interval: tuple[float, float, float]) -> str:
    low, middle, high = interval
    return f"{middle:.2f}" if high - low < 0.02 else f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _name(record: Record) -> str:
    machine = record["machine"]
    return "CPU" if machine["device"] == "cpu" else machine["device"].removeprefix("NVIDIA ")


def relative(record: Record, shapes: str, contender: tuple[str, str]) -> tuple[float, float, float] | None:
    """Returns the ratio to torch's fused AdamW, and the ratios of p20 and p80 to its median."""
    ours, torchs = (samples(record, shapes, c, "native") for c in (contender, TORCH))
    if not ours or not torchs:
        return None
    whole = statistics.median(torchs)
    cuts = statistics.quantiles(ours, n=5)
    return statistics.median(ours) / whole, cuts[0] / whole, cuts[3] / whole


def draw(cpu: Record, gpu: Record, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    threads, part = next(iter(by_threads(cpu).items()))  # the placement of most rows
    for ax, record, where in zip(figure.subplots(1, 2, sharey=True), (part, gpu), (threads, ""), strict=True):
        _panel(ax, record, where)
    figure.supxlabel(
        "time of a step ÷ torch's fused AdamW (shorter is faster); lines: p20 to p80; cut at 3", fontsize=9
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(BARS), fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


def _panel(ax: Axes, record: Record, threads: str) -> None:
    longest = 3.0
    for i, (label, contender, colour) in enumerate(BARS):
        for j, shapes in enumerate(SHAPES):
            y, found = j + (i - 1) * 0.27, relative(record, shapes, contender)
            name = label if j == 0 else None
            if found is None:
                ax.text(0.03, y, "not measured", va="center", fontsize=7)
                continue
            middle, low, high = found
            ax.barh(y, min(middle, longest), 0.25, color=colour, label=name)
            if middle < longest:
                ax.plot([low, min(high, longest)], [y, y], color="black", linewidth=0.8)
            ax.text(min(max(middle, high), longest) + 0.04, y, f"{middle:.2f}", va="center", fontsize=7, bbox=BOX)
    ax.axvline(1, color="black", linestyle="--", linewidth=0.8)
    ax.set_xlim(0, longest + 0.4)
    ax.set_yticks(range(len(SHAPES)), SHAPES)
    ax.set_ylim(len(SHAPES) - 0.5, -0.5)
    machine: dict[str, Any] = record["machine"]
    cpu = with_threads(f"CPU: {machine['processor']}, {machine['threads']} threads", threads)
    ax.set_title(f"{cpu if _name(record) == 'CPU' else machine['device']}, torch {machine['torch']}", fontsize=9)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step.bars", description=__doc__)
    parser.add_argument("--cpu", type=Path, default=FOLDER / "run_cpu.json")
    parser.add_argument("--gpu", type=Path, default=FOLDER / "run_gpu.json")
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--document", type=Path, help="put the table between the marks performance:begin and :end")
    options = parser.parse_args(argv)
    cpu, gpu = results.load(options.cpu), results.load(options.gpu)
    draw(cpu, gpu, options.plot)
    print(options.plot)
    if options.document is not None:
        fill(options.document, "performance", table(cpu, gpu))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
