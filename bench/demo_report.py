"""What the demo shows of its results: tables, findings, the plot, the README's block, the JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"

Results = dict[str, Any]


def rate_name(lr: float) -> str:
    """``1e-5``, not ``1e-05`` or ``0.1``: all rates in one notation."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# ---- JSON ----


def save(results: Results, path: Path) -> None:
    """Writes one line a run, so that a change of one number is a change of one line."""
    head = json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=1, allow_nan=False)
    runs = ",\n  ".join(json.dumps(run, allow_nan=False) for run in results["runs"])
    path.write_text(f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n', encoding="utf-8")


def load(path: Path) -> Results:
    """Raises ValueError for anything but results of this schema, OSError where the file cannot be read."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"{path} does not hold demo results of schema {SCHEMA}; make them anew with bench.demo")
    return results


# ---- tables ----


def accuracies(results: Results) -> dict[str, list[float | None]]:
    """Of each method, the final test accuracies in the order of the rates; None where the run diverged."""
    final = {(run["method"], run["lr"]): run["final_accuracy"] for run in results["runs"]}
    config = results["config"]
    return {key: [final[key, lr] for lr in config["lrs"]] for key in config["methods"]}


def table_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text. A diverged run is the worst there is, and makes the spread meaningless."""
    config = results["config"]
    header = ["test accuracy %", *map(rate_name, config["lrs"]), "best", "worst", "spread"]
    rows = []
    for key, values in accuracies(results).items():
        finite = [value for value in values if value is not None]
        best = max(finite) if finite else None
        worst = min(finite) if len(finite) == len(values) else None
        spread = "–" if best is None or worst is None else f"{best - worst:.1f}"
        rows.append([config["methods"][key]["label"], *map(_cell, [*values, best, worst]), spread])
    return header, rows


def _cell(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.1f}"


def markdown_table(results: Results) -> str:
    """The table in Markdown, its columns aligned as plain text too."""
    header, rows = table_rows(results)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [header, rule, *rows]
    return "\n".join(f"| {_aligned(line, widths)} |" for line in lines)


def _aligned(cells: list[str], widths: list[int]) -> str:
    first, *numbers = zip(cells, widths, strict=True)
    return " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in numbers)])


def terminal_table(results: Results) -> Table:
    from rich.table import Table

    config = results["config"]
    title = f"Test accuracy (%) after {config['epochs']} epochs, at each initial learning rate"
    header, rows = table_rows(results)
    table = Table(title=title)
    table.add_column("method")
    for name in header[1:]:
        table.add_column(name, justify="right")
    for key, row in zip(config["methods"], rows, strict=True):
        # A new family of methods begins at each optimizer that is compared with no other.
        if config["methods"][key]["baseline"] is None:
            table.add_section()
        table.add_row(*row)
    return table


# ---- findings ----


def findings(results: Results) -> list[str]:
    """What was measured, in words: also where torch's rate was as good as an adapted one, or better."""
    config = results["config"]
    lines = [equality(results)] if {"adamw", "torch-adamw"} <= set(config["methods"]) else []
    for key, method in config["methods"].items():
        if method["baseline"] in config["methods"] and key != "adamw":
            lines.append(_comparison(results, key, method["baseline"]))
    return [
        *lines,
        f"One seed, {config['test_digits']} test digits: a difference is called clear beyond two standard errors, "
        "the two accuracies taken as independent.",
    ]


def equality(results: Results) -> str:
    """Whether our AdamW without a policy went the way of torch's, by the bits of the final weights."""
    pairs = _pairs(results, "adamw", "torch-adamw")
    names = "fa.AdamW and torch.optim.AdamW"
    differing = differing_runs(results)
    if not differing:
        return f"{names} agree bit for bit: losses, accuracies and final weights, at all {len(pairs)} rates."
    gap = max(_loss_gap(ours, theirs) for ours, theirs in pairs)
    rates = ", ".join(rate_name(run["lr"]) for run in differing)
    return f"{names} DIFFER at {rates} (of {len(pairs)} rates); largest difference of a training loss {gap:.3g}."


def differing_runs(results: Results) -> list[Results]:
    """The runs of our AdamW that did not go the way of torch's."""
    return [ours for ours, theirs in _pairs(results, "adamw", "torch-adamw") if not _same(ours, theirs)]


def _pairs(results: Results, key: str, baseline: str) -> list[tuple[Results, Results]]:
    runs = {(run["method"], run["lr"]): run for run in results["runs"]}
    return [(runs[key, lr], runs[baseline, lr]) for lr in results["config"]["lrs"]]


def _same(a: Results, b: Results) -> bool:
    return all(a[name] == b[name] for name in ("train_loss", "test_accuracy", "diverged", "weights_sha256"))


def _loss_gap(a: Results, b: Results) -> float:
    return max((abs(x - y) for x, y in zip(a["train_loss"], b["train_loss"], strict=False)), default=0.0)


def _comparison(results: Results, key: str, baseline: str) -> str:
    methods, digits = results["config"]["methods"], results["config"]["test_digits"]
    verdicts: dict[str, list[str]] = {}
    for ours, theirs in _pairs(results, key, baseline):
        verdict, points = _verdict(ours["final_accuracy"], theirs["final_accuracy"], digits)
        verdicts.setdefault(verdict, []).append(rate_name(ours["lr"]) + points)
    order = ("clearly better", "no clear difference", "clearly worse", "diverged")
    parts = [f"{verdict} at {', '.join(verdicts[verdict])}" for verdict in order if verdict in verdicts]
    return f"{methods[key]['label']} against {methods[baseline]['label']}: {'; '.join(parts)}."


def _verdict(ours: float | None, theirs: float | None, digits: int) -> tuple[str, str]:
    if ours is None:
        return "diverged", "" if theirs is not None else " (so did the other)"
    if theirs is None:
        return "clearly better", " (the other diverged)"
    noise = 2 * math.sqrt(sum(p * (100 - p) for p in (ours, theirs)) / digits)
    difference = ours - theirs
    verdict = "no clear difference"
    if abs(difference) > noise:
        verdict = "clearly better" if difference > 0 else "clearly worse"
    return verdict, f" ({difference:+.1f})"


# ---- README ----


def rewrite_block(text: str, results: Results) -> str:
    """``text`` with the table between the markers. Raises ValueError unless there is exactly one such place."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one block {BEGIN} … {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{markdown_table(results)}\n{END}{rest.split(END)[1]}"
