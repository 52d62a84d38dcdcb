"""Results of ``bench.step.run``: the file format, and the numbers of tables and plots."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .growth import fits
from .stats import Summary, summarize

SCHEMA = 2
Record = dict[str, Any]

COLUMNS = ("ms", "p20 to p80", "wall ms", "launches", "B", "GB/s", "÷ copy", "÷ null")
COLUMNS += ("× torch fused", "× foreach composition", "× torch.compile", "state B")
EXPLANATION = (
    "ms: median of a step, on a GPU of the device alone; wall ms: as the caller waits for it, with fresh gradients; "
    "launches: on a GPU kernels and copies, on a CPU operators called from Python; B: bytes a parameter that the "
    "algorithm cannot avoid; GB/s: those by ms; ÷ copy, ÷ null: that rate as a share of a copy's and of the same "
    "streams' without arithmetic; ×: this time by that of torch's fused optimizer of the backbone, of the same "
    "algorithm as foreach operations, of those under torch.compile; state B: kept for each parameter; ~: too noisy to "
    "compare, p20 to p80 is more than 15 % of the median."
)


def save(record: Record, path: Path) -> None:
    """Writes each row on its own line, so that diffs are readable."""
    lines = json.dumps(record, allow_nan=False, separators=(",", ":"))
    for mark in ('{"cache":', '{"over":', '{"model":', '{"backbone":', '"cases":', '"growth":', '"end_to_end":'):
        lines = lines.replace(mark, f"\n{mark}")
    path.write_text(lines + "\n", encoding="utf-8")


def save_runs(results: dict[str, Any], path: Path) -> None:
    """Writes training runs, each on its own line, so that diffs are readable."""
    head = json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=1, allow_nan=False)
    runs = ",\n  ".join(json.dumps(run, allow_nan=False) for run in results["runs"])
    path.write_text(f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n', encoding="utf-8")


def load(path: Path) -> Record:
    """Reads results.

    Raises:
        ValueError: if they have another schema.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} has schema {record.get('schema')}, this is for {SCHEMA}: measure anew with bench.step.run"
        )
    return record


def split(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Splits rows by where the threads were, see ``placement_of_threads``; the placement of most rows comes first.

    Rows that did not run are in each part. The only key is ``""`` where the placement was not measured.
    """
    counts = Counter(row.get("threads", "") for row in rows if row.get("seconds"))
    placements = [threads for threads, _ in counts.most_common()] or [""]
    return {at: [row for row in rows if row.get("threads", "") in (at, "")] for at in placements}


def by_threads(record: Record) -> dict[str, Record]:
    """Splits results by where the threads were, the placement of most rows first."""

    def part(rows: Sequence[dict[str, Any]], threads: str) -> list[dict[str, Any]]:
        parts = split(rows)
        return parts.get(threads, parts.get("", []))

    return {
        threads: record
        | {"cases": [case | {"rows": part(case["rows"], threads)} for case in record["cases"]]}
        | {"growth": part(record["growth"], threads)}
        for threads in split([row for case in record["cases"] for row in case["rows"]] + record["growth"])
    }


def with_threads(title: str, threads: str) -> str:
    """Returns the title with the placement of the threads, if it is known."""
    return f"{title}, threads {threads}" if threads else title


@dataclass(frozen=True)
class Line:
    """A row of a table.

    ``numbers`` has a value for each of :data:`COLUMNS`, which is None if the number does not exist.
    """

    algorithm: str
    name: str
    why_not: str
    summary: Summary | None
    numbers: dict[str, Any]


def caches_of(case: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["cache"] for row in case["rows"]))


def find(case: dict[str, Any], cache: str, name: str, policy: str = "") -> list[float]:
    """Returns the samples of a row, [] if it did not run. Without a policy, takes the first row of that name."""
    for row in case["rows"]:
        if row["cache"] == cache and row["name"] == name and (not policy or row["policy"] == policy):
            return row["seconds"]
    return []


def lines_of(case: dict[str, Any], cache: str, device: str) -> list[Line]:
    """Returns all rows of a case in one state of the caches."""
    copy = next((r for r in case["rows"] if r["cache"] == cache and r["name"] == "copy" and r["seconds"]), None)
    rate_of_copy = copy["bytes"] / statistics.median(copy["seconds"]) if copy else None
    found = []
    for row in case["rows"]:
        if row["cache"] != cache:
            continue
        summary = summarize(row["seconds"]) if row["seconds"] else None
        numbers = dict.fromkeys(COLUMNS) | {"launches": row["launches"], "state B": row["state_bytes"]}
        if row["numel"]:
            numbers["B"] = row["bytes"] / row["numel"]
        if summary is not None:
            rate = row["bytes"] / summary.median
            numbers |= {"ms": summary.median * 1e3, "p20 to p80": summary, "GB/s": rate / 1e9}
            numbers["wall ms"] = statistics.median(row["wall"]) * 1e3 if row["wall"] else summary.median * 1e3
            if device == "cuda" and not row["wall"]:
                numbers["wall ms"] = None
            if rate_of_copy and row["name"] != "copy":
                numbers["÷ copy"] = rate / rate_of_copy
            if row["family"] != "ceiling":
                numbers |= _comparisons(case, cache, row, summary)
        found.append(Line(row["algorithm"], row["name"], row["why_not"], summary, numbers))
    return found


def _comparisons(case: dict[str, Any], cache: str, row: dict[str, Any], summary: Summary) -> dict[str, float | None]:
    fixed = row["policy"] == "fixed" and bool(find(case, cache, "torch foreach"))

    def against(samples: list[float]) -> float | None:
        return summary.median / statistics.median(samples) if samples else None

    composition = ("torch foreach",) if fixed else ("foreach composition", row["policy"])
    compiled = ("torch.compile of torch's",) if fixed else ("torch.compile of it", row["policy"])
    return {
        "÷ null": _share_of_null(case, row),
        "× torch fused": against(find(case, cache, "torch fused")),
        "× foreach composition": against(find(case, cache, *composition)),
        "× torch.compile": against(find(case, cache, *compiled)),
    }


def of_null(case: dict[str, Any], row: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Returns the samples of a row and of the null step of its streams, in seconds per byte; [] if it did not run.

    The unit is seconds per byte because the null step of a very large case has fewer elements. Rows of Triton are
    compared with Triton's null step.
    """
    names = ("null, triton", "null, native") if row["name"] == "ours, triton" else ("null, native", "null, triton")
    nulls = {r["name"]: r for r in case["rows"] if (r["cache"], r["policy"]) == (row["cache"], row["policy"])}
    null = next((nulls[name] for name in names if name in nulls and nulls[name]["seconds"]), None)
    ours, ceiling = ([s / r["bytes"] for s in r["seconds"]] if r and r["bytes"] else [] for r in (row, null))
    return ours, ceiling


def _share_of_null(case: dict[str, Any], row: dict[str, Any]) -> float | None:
    ours, null = of_null(case, row)
    return statistics.median(null) / statistics.median(ours) if ours and null else None


def text(column: str, value: Any) -> str:
    """Formats a number for a table."""
    if value is None:
        return ""
    if isinstance(value, Summary):
        return f"{value.p20 * 1e3:.3g} to {value.p80 * 1e3:.3g}" + (" ~" if value.is_noisy else "")
    if column == "launches":
        return str(value)
    if column in ("ms", "wall ms"):
        return f"{value:.4g}"
    return f"{value:.2f}" if column[0] in "÷×" else f"{value:.4g}"


# ---- output for the terminal ----


def describe_case(case: dict[str, Any], device: str) -> Iterator[str]:
    if case["why_not"]:
        yield f"  {case['why_not']}"
    for threads, rows in split(case["rows"]).items():
        part = case | {"rows": rows}
        for cache in caches_of(part):
            yield f"  {with_threads(f'caches: {cache}', threads)}"
            yield from aligned(table(part, cache, device, ("ms", "p20 to p80", *COLUMNS[5:])))


def table(case: dict[str, Any], cache: str, device: str, columns: Sequence[str] = COLUMNS) -> list[list[str]]:
    """Returns header and rows. A row that did not run has the reason instead of numbers."""
    body = [["algorithm", "by", *columns]]
    for line in lines_of(case, cache, device):
        values = [text(c, line.numbers[c]) for c in columns]
        body.append([line.algorithm, line.name, *([line.why_not] if line.why_not else values)])
    return body


def aligned(body: Sequence[Sequence[str]]) -> Iterator[str]:
    full = [row for row in body if len(row) == len(body[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(body[0]))]
    widths[:2] = (max(len(row[i]) for row in body) for i in range(2))
    for row in body:
        yield "  " + "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        )


def describe_growth(record: Record) -> Iterator[str]:
    for threads, points in split(record["growth"]).items():
        yield with_threads("growth", threads)
        yield from aligned(growth_table(points))


def growth_table(points: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns the table of the lines that are fitted to points of one placement of the threads."""
    body = [["over", "by", "slope", "the host's of it", "grows as"]]
    for fit in fits(points):
        per = (
            f"{fit['slope'] * 1e6:.2f} µs a tensor" if fit["over"] == "tensors" else f"{fit['slope'] * 1e9:.3f} ns each"
        )
        power = "" if fit["exponent"] is None else f"n^{fit['exponent']:.2f}"
        host = "" if fit["host_slope"] is None else f"{fit['host_slope'] * 1e6:.2f} µs"
        body.append([fit["over"], f"{fit['algorithm']}, {fit['name']}", per, host, power])
    return body


def describe_end_to_end(record: Record) -> Iterator[str]:
    yield from aligned(end_to_end_table(record))


def end_to_end_table(record: Record) -> list[list[str]]:
    """Returns the table of a training step's medians: gradients, optimizer, and the optimizer's share."""
    body = [["model", "optimizer", "forward and backward ms", "step ms", "share of the step %"]]
    for row in record["end_to_end"]:
        gradients, step = statistics.median(row["gradients"]), statistics.median(row["step"])
        share = 100 * step / (gradients + step)
        cells = [f"{gradients * 1e3:.2f}", f"{step * 1e3:.3f}", f"{share:.1f}"]
        body.append([f"{row['model']}: {row['parameters'] / 1e6:.2f}M in {row['tensors']}", row["optimizer"], *cells])
    return body


def fill(document: Path, name: str, text: str) -> None:
    """Replaces the text between ``<!-- name:begin -->`` and ``<!-- name:end -->``.

    Raises:
        ValueError: if the document does not have these marks.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = document.read_text(encoding="utf-8")
    if begin not in content or end not in content:
        raise ValueError(f"{document} has no marks {begin} and {end}")
    head, tail = content.split(begin)[0], content.split(end)[1]
    document.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
