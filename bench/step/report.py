"""Makes tables and plots from results: ``python -m bench.step.report build/bench/run.json``.

Writes ``NAME.md`` with all tables and the plots ``NAME_*.png`` beside ``NAME.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import results
from .goals import LARGE, case_of, goals_table
from .results import EXPLANATION, Record, fill

GPU_RESULTS = Path(__file__).parents[1] / "results" / "run_gpu.json"
#: The columns of a case on the page of results.
SHORT = ("ms", "GB/s", "÷ copy", "÷ null", "× torch fused", "× foreach composition", "× torch.compile", "state B")


def markdown_table(body: Sequence[Sequence[str]], text_columns: int = 2) -> str:
    """Returns a Markdown table. Short rows, which end with a reason, are filled with empty cells."""
    width = len(body[0])
    lines = [list(row) + [""] * (width - len(row)) for row in body]
    rule = ["---"] * text_columns + ["---:"] * (width - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def where(record: Record) -> str:
    """Returns a line that describes the machine."""
    m = record["machine"]
    name = m["device"] if m["device"] != "cpu" else f"{m['processor']}, {m['threads']} threads, {m['kernels']} kernels"
    parts = [name, f"torch {m['torch']}", *(f"{n} {v}" for n, v in m["packages"].items())]
    parts += [f"driver {m['driver']}"] if m.get("driver") else []
    return f"{', '.join(parts)}; commit {(m['commit'] or 'unknown')[:12]}, load {m['load']} at the start"


def noise(record: Record) -> str:
    """Returns a warning if the samples of too many rows vary too much; else ""."""
    rows = [
        r for c in record["cases"] for r in c["rows"] if r["seconds"] and r["family"] in ("ours", "ceiling", "torch")
    ]
    noisy = sum(results.summarize(r["seconds"]).is_noisy for r in rows)
    if not rows or noisy / len(rows) <= 0.1:
        return ""
    return f"**Too noisy to compare: {noisy} of {len(rows)} rows vary by more than 15 % of their median.**"


def device_of(record: Record) -> str:
    return "cpu" if record["machine"]["device"] == "cpu" else "cuda"


def full(record: Record) -> str:
    """Returns a Markdown document with all tables."""
    device = device_of(record)
    parts = [
        "# Results of `python -m bench.step.run`",
        f"{where(record)}. Made by `python -m bench.step.report`.",
        noise(record),
    ]
    parts += ["## Goals", markdown_table(_goals(record)), EXPLANATION]
    for threads, part in results.by_threads(record).items():
        for case in part["cases"]:
            if not case["rows"] and not case["why_not"]:  # measured in another placement
                continue
            parts.append(results.with_threads(f"## {case['backbone']}, {case['shapes']}, {case['dtype']}", threads))
            parts.append(f"{case['tensors']} tensors, {case['numel']:,} elements. {case['why_not']}".rstrip())
            for cache in results.caches_of(case):
                parts.append("" if cache == "large" else f"Caches: {cache}.")
                parts.append(markdown_table(results.table(case, cache, device)))
        if part["growth"]:
            parts.append(results.with_threads("## Growth", threads))
            parts.append(markdown_table(results.growth_table(part["growth"])))
    if record["end_to_end"]:
        parts += ["## End to end", markdown_table(results.end_to_end_table(record))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals(record: Record) -> list[list[str]]:
    if device_of(record) == "cuda":
        return goals_table(None, record)
    return goals_table(record, results.load(GPU_RESULTS) if GPU_RESULTS.exists() else None)


def block(record: Record, name: str) -> str:
    """Returns a block of ``docs/results.md``: the goals with the results of a CPU, the largest case and the plots."""
    parts = [markdown_table(_goals(record))] if device_of(record) == "cpu" else []
    missing: dict[str, None] = {}
    for threads, part in results.by_threads(record).items():
        case = case_of(part, LARGE)
        if case is None:
            continue
        head, *rows = results.table(case, results.caches_of(case)[0], device_of(record), SHORT)
        parts += [results.with_threads(f"AdamW and ActiveAdamW, {LARGE} parameters, float32", threads) + ":"]
        parts += [markdown_table([head, *(row for row in rows if len(row) == len(head))])]
        missing |= dict.fromkeys(f"{row[1]} ({row[-1]})" for row in rows if len(row) < len(head))
    parts += [f"Not among them: {'; '.join(missing)}."] if missing else []
    if record["end_to_end"]:
        parts += ["What it is of a training step:", markdown_table(results.end_to_end_table(record))]
    parts += [" ".join(f"![{t}](../bench/results/{name}_{key}.png)" for key, t in plots_of(record).items())]
    parts += [
        noise(record),
        f"{EXPLANATION} All tables: [bench/results/{name}.md](../bench/results/{name}.md). {where(record)}.",
    ]
    return "\n\n".join(part for part in parts if part)


PLOTS = {
    "roofline": "Bytes a step against its time",
    "sizes": "Bandwidth against size",
    "tensors": "Time of a step against the number of tensors",
}


def plots_of(record: Record) -> dict[str, str]:
    """Returns the plots, without that of growth where it was not measured."""
    return {key: title for key, title in PLOTS.items() if key != "tensors" or record["growth"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step.report", description=__doc__)
    parser.add_argument("results", type=Path, help="what bench.step.run wrote")
    parser.add_argument(
        "--document", type=Path, help="fill the block between the marks NAME:begin and NAME:end of this file"
    )
    parser.add_argument("--block", default="run", metavar="NAME", help="default: run")
    options = parser.parse_args(argv)
    record = results.load(options.results)
    stem = options.results.with_suffix("")
    stem.with_suffix(".md").write_text(full(record), encoding="utf-8")
    print(f"{stem}.md")
    try:
        from .plots import draw
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        for key in plots_of(record):
            path = stem.with_name(f"{stem.name}_{key}.png")
            draw(key, record, device_of(record), path)
            print(path)
    if options.document is not None:
        fill(options.document, options.block, block(record, stem.name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
