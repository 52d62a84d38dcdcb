"""The output of the demo: tables, findings, the block of docs/quickstart.md and the JSON file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..step.results import save_runs

if TYPE_CHECKING:
    from rich.table import Table as RichTable

SCHEMA = 2
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"

Results = dict[str, Any]


def rate_name(lr: float) -> str:
    """Formats a rate as ``1e-5``, in the same notation for all rates."""
    mantissa, exponent = f"{lr:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


# ---- JSON ----

save = save_runs


def load(path: Path) -> Results:
    """Loads results.

    Raises:
        ValueError: if the file does not hold results of this schema.
        OSError: if the file cannot be read.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} does not hold demo results of schema {SCHEMA}; make them anew with python -m bench.demo"
        )
    return results


# ---- tables ----

Table = tuple[list[str], list[list[str]]]


def runs_by_key(results: Results) -> dict[tuple[Any, ...], Results]:
    return {(run["method"], run["lr"], run["batch"], run["epochs"]): run for run in results["runs"]}


def accuracies(results: Results) -> dict[str, list[float | None]]:
    """Returns each method's test accuracies in the order of the rates; None if the run diverged."""
    grid, runs = results["config"]["rates"], runs_by_key(results)
    return {
        key: [runs[key, lr, grid["batch"], grid["epochs"]]["accuracy"] for lr in grid["lrs"]] for key in grid["methods"]
    }


def accuracies_by_batch(results: Results) -> dict[tuple[str, float], list[float | None]]:
    """Returns the test accuracies of each method and rate in the order of the batch sizes; None if the run diverged."""
    grid, runs = results["config"]["batches"], runs_by_key(results)
    return {
        (key, lr): [runs[key, lr, batch, grid["epochs"]]["accuracy"] for batch in grid["batches"]]
        for key, lrs in grid["lrs"].items()
        for lr in lrs
    }


def rate_rows(results: Results) -> Table:
    """Returns header and rows as text. With a diverged run, the worst is "diverged" and there is no range."""
    header = ["test accuracy %", *map(rate_name, results["config"]["rates"]["lrs"]), "best", "worst", "range"]
    rows = []
    for key, values in accuracies(results).items():
        finite = [value for value in values if value is not None]
        best = max(finite) if finite else None
        worst = min(finite) if len(finite) == len(values) else None
        width = "–" if best is None or worst is None else f"{best - worst:.1f}"
        rows.append([label(results, key), *map(_cell, [*values, best, worst]), width])
    return header, rows


def batch_rows(results: Results) -> Table:
    header = ["test accuracy %", "lr", *(f"batch {batch}" for batch in results["config"]["batches"]["batches"])]
    rows = [
        [label(results, key), rate_name(lr), *map(_cell, values)]
        for (key, lr), values in accuracies_by_batch(results).items()
    ]
    return header, rows


def label(results: Results, key: str) -> str:
    return results["config"]["methods"][key]["label"]


def _cell(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.1f}"


def markdown(table: Table) -> str:
    """Returns the table in Markdown, with columns that are aligned in plain text too."""
    header, rows = table
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {_aligned(line, widths)} |" for line in (header, rule, *rows))


def _aligned(cells: list[str], widths: list[int]) -> str:
    first, *numbers = zip(cells, widths, strict=True)
    return " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in numbers)])


def terminal(title: str, table: Table) -> RichTable:
    from rich.table import Table as RichTable

    header, rows = table
    shown = RichTable(title=title)
    shown.add_column("method")
    for name in header[1:]:
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def tables(results: Results) -> list[tuple[str, Table]]:
    """Returns the tables that have results, with titles."""
    config, shown = results["config"], []
    if config["rates"]["methods"]:
        epochs, batch = config["rates"]["epochs"], config["rates"]["batch"]
        shown.append((f"At each initial learning rate: {epochs} epochs, batch {batch}", rate_rows(results)))
    if config["batches"]["lrs"]:
        shown.append((f"At each batch size: {config['batches']['epochs']} epochs", batch_rows(results)))
    return shown


# ---- findings ----


def findings(results: Results) -> list[str]:
    """Returns the findings as sentences, those in favour of plain optimizers included."""
    config = results["config"]
    lines = [equality(results)] if config["swap"]["lrs"] else []
    values = accuracies(results)
    for key in values:
        baseline = config["methods"][key]["baseline"]
        if baseline in values and baseline != key:
            lines.append(_comparison(results, key, baseline))
    return [
        *lines,
        f"One seed, {config['test_digits']} test digits: a difference is called clear beyond two standard errors, "
        "the two accuracies taken as independent.",
    ]


def equality(results: Results) -> str:
    """Returns a sentence on whether our AdamW and torch's agree bit for bit."""
    pairs = _swapped(results)
    names = "torch.optim.AdamW and fa.AdamW(backend='reference')"
    differing = [rate_name(ours["lr"]) for ours, theirs in pairs if not _same(ours, theirs)]
    if not differing:
        rates = ", ".join(rate_name(ours["lr"]) for ours, _ in pairs)
        return f"{names} agree bit for bit: losses, accuracies and final weights, at {rates}."
    return f"{names} DIFFER at {', '.join(differing)}."


def _swapped(results: Results) -> list[tuple[Results, Results]]:
    swap, runs = results["config"]["swap"], runs_by_key(results)
    keys = [(lr, swap["batch"], swap["epochs"]) for lr in swap["lrs"]]
    return [(runs[("reference-adamw", *key)], runs[("torch-adamw", *key)]) for key in keys]


def _same(a: Results, b: Results) -> bool:
    return all(a[name] == b[name] for name in ("train_loss", "accuracy", "diverged", "weights_sha256"))


def _comparison(results: Results, key: str, baseline: str) -> str:
    config, values = results["config"], accuracies(results)
    verdicts: dict[str, list[str]] = {}
    for lr, ours, theirs in zip(config["rates"]["lrs"], values[key], values[baseline], strict=True):
        verdict, points = _verdict(ours, theirs, config["test_digits"])
        verdicts.setdefault(verdict, []).append(rate_name(lr) + points)
    order = ("clearly better", "no clear difference", "clearly worse", "diverged")
    parts = [f"{verdict} at {', '.join(verdicts[verdict])}" for verdict in order if verdict in verdicts]
    return f"{label(results, key)} against {label(results, baseline)}: {'; '.join(parts)}."


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


# ---- docs/quickstart.md ----


def rewrite_block(text: str, results: Results) -> str:
    """Returns ``text`` with the table between the markers.

    Raises:
        ValueError: unless ``text`` has exactly one block between the markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one block {BEGIN} … {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{markdown(rate_rows(results))}\n{END}{rest.split(END)[1]}"
