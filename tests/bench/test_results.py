"""Command line of the benchmark, and tables, plots, verdicts and comparisons of its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.step import bars, compare, end_to_end, goals, merge, report, results, run
from bench.step.growth import fits

from ..common.cases import KERNELS

ROOT = Path(__file__).parents[2]
native = pytest.mark.skipif("native" not in KERNELS, reason="the native library is not built")


def row(name: str, family: str, policy: str, milliseconds: float, size: int = 28, **more: Any) -> dict[str, Any]:
    seconds = [milliseconds / 1e3 * (1 + 0.001 * (i % 5)) for i in range(30)]
    algorithm = {"fixed": "AdamW", "active": "AdamW + active"}.get(policy, "")
    found = {"cache": "large", "name": name, "family": family, "policy": policy, "algorithm": algorithm}
    found |= {
        "why_not": "",
        "bytes": size * 50_000_000,
        "numel": 50_000_000 if policy else 0,
        "warm_up": 0.1,
        "launches": 2,
        "state_bytes": 8.0,
    }
    return found | {"seconds": seconds, "wall": [], "host": []} | more


def made_up() -> dict[str, Any]:
    """Returns results with known numbers: copy moves 40 GB/s, a step of AdamW 35."""
    rows = [
        row("ours, native", "ours", "fixed", 40),
        row("ours, native", "ours", "active", 56, 40),
        row("torch fused", "torch", "fixed", 50),
        row("copy", "ceiling", "", 50, 40),
        row("null, native", "ceiling", "fixed", 38),
        row("null, native", "ceiling", "active", 50, 40),
        row("torch foreach", "torch", "fixed", 160),
        row("torch.compile of torch's", "compiled", "fixed", 60),
        row("foreach composition", "composition", "active", 280, 40),
        row("torch.compile of it", "compiled", "active", 80, 40),
        row("as the authors wrote it", "authors", "active", 560, 40),
        row("bitsandbytes, 32 bit", "bnb", "fixed", 1, why_not="runs on GPUs only", seconds=[]),
    ]
    head = {"backbone": "AdamW", "shapes": "10 x 5M", "tensors": 10, "numel": 50_000_000, "dtype": "float32"}
    machine = {"device": "cpu", "processor": "a processor", "threads": 2, "kernels": "v3", "torch": "2", "packages": {}}
    growth = [
        {"over": over, "n": n, "name": name, "algorithm": "AdamW", "why_not": "", "seconds": [a + slope * n]}
        for over, points, a in (("tensors", (10, 300, 1000), 1e-5), ("elements", (10**6, 10**8), 0.0))
        for name, slope in (("ours, native", 1e-6 if over == "tensors" else 1e-9), ("torch fused", 5e-6))
        for n in points
    ]
    for point in growth:
        if (point["over"], point["name"]) == ("tensors", "ours, native"):
            point["host"] = [s / 4 for s in point["seconds"]]
    trained = [
        {"model": "M", "optimizer": "AdamW", "parameters": 10**6, "tensors": 3, "gradients": [0.3], "step": [0.1]}
    ]
    return {
        "schema": results.SCHEMA,
        "machine": machine | {"commit": "0" * 40, "load": 0.1},
        "settings": {},
        "cases": [{**head, "took": 1.0, "load": 0.1, "why_not": "", "rows": rows}],
        "growth": growth,
        "end_to_end": trained,
    }


def test_columns_have_the_expected_numbers():
    lines = {(x.name, x.algorithm): x for x in results.lines_of(made_up()["cases"][0], "large", "cpu")}
    ours = lines["ours, native", "AdamW"].numbers
    assert ours["ms"] == pytest.approx(40, rel=0.01)
    assert ours["B"] == 28
    assert ours["GB/s"] == pytest.approx(35, rel=0.01)
    expected = {"÷ copy": 35 / 40, "÷ null": 38 / 40, "× torch fused": 0.8, "× foreach composition": 0.25}
    for column, value in (expected | {"× torch.compile": 40 / 60}).items():
        assert ours[column] == pytest.approx(value, rel=0.01), column
    active = lines["ours, native", "AdamW + active"].numbers
    assert active["÷ null"] == pytest.approx(50 / 56, rel=0.01)
    assert active["× foreach composition"] == pytest.approx(0.2, rel=0.01)
    assert active["× torch.compile"] == pytest.approx(0.7, rel=0.01)
    assert lines["copy", ""].numbers["GB/s"] == pytest.approx(40, rel=0.01)


def test_a_row_that_did_not_run_is_in_the_table_with_a_reason():
    text = report.full(made_up())
    assert "| AdamW | bitsandbytes, 32 bit | runs on GPUs only |" in text
    assert "noisy" not in report.noise(made_up())


def test_a_noisy_run_is_marked():
    record = made_up()
    for r in record["cases"][0]["rows"]:
        r["seconds"] = [s * (1 + 0.5 * (i % 2)) for i, s in enumerate(r["seconds"])]
    assert "Too noisy to compare: 7 of 7 rows" in report.noise(record)
    assert report.noise(record) in report.block(record, "x")
    assert " ~ |" in report.full(record)


def test_verdicts():
    body = {line[0]: line[2:] for line in goals.goals_table(made_up(), None)}
    assert body["AdamW / torch fused, 10 x 5M"][0].startswith("0.80 (0.80 to 0.80), holds")
    assert body["ActiveAdamW / AdamW, 10 x 5M"][0].endswith("holds")
    assert body["ActiveAdamW / the authors' form, 10 x 5M"][0].startswith("0.10")
    assert body["AdamW / torch fused, 2000 x 1000"] == ["not measured"] * 3
    assert body["host time / torch fused, 300 tensors"][0].startswith("0.2")
    assert body["host time / torch fused, 10 000 tensors"][0] == "not measured"
    assert body["time grows as n to the power of, 1e6 … 1e9"][0] == "1.00, holds"
    assert body["AdamW, share of the null step, 10 x 5M"][0].startswith("0.95 (0.95 to 0.95)")
    assert body["ActiveAdamW, share of the null step, 10 x 5M"][0] == "0.89 (0.89 to 0.89), misses"
    assert body["share of copy, ResNet-50, float32"] == ["", "not measured", "not measured"]
    record = made_up()
    record["cases"][0]["rows"][0]["seconds"] = [0.0515 * (1 + 0.05 * (i % 2)) for i in range(30)]
    assert goals.verdict(goals.GOALS[0], record, "native", "cpu").endswith("undecided")


def test_slopes_are_fitted():
    found = {(f["over"], f["name"]): f for f in fits(made_up()["growth"])}
    assert found["tensors", "ours, native"]["slope"] == pytest.approx(1e-6)
    assert found["tensors", "ours, native"]["intercept"] == pytest.approx(1e-5)
    assert found["tensors", "ours, native"]["host_slope"] == pytest.approx(0.25e-6)
    assert found["tensors", "torch fused"]["host_slope"] is None
    assert found["elements", "torch fused"]["exponent"] == pytest.approx(1.0)


def test_comparison_marks_changes(tmp_path, capsys):
    old, new = made_up(), made_up()
    assert compare.compare(old, new, 0.05) == ([], [], [])
    for r in new["cases"][0]["rows"]:  # a machine under load: everything takes longer, ratios stay
        r["seconds"] = [1.5 * s for s in r["seconds"]]
    assert compare.compare(old, new, 0.05) == ([], [], [])
    ours = new["cases"][0]["rows"][0]
    ours["seconds"] = [1.2 * s for s in ours["seconds"]]
    worse, better, lacking = compare.compare(old, new, 0.05)
    assert len(worse) == 2
    assert "AdamW, 10 x 5M, float32, large, ours, native, fixed / torch fused: 0.800 -> 0.960 (+20.0%)" in worse
    assert (better, lacking) == ([], [])
    assert len(compare.compare(new, old, 0.05)[1]) == 2
    for r in new["cases"][0]["rows"]:  # a null step with fewer elements, because of little memory, is not a change
        if r["family"] == "ceiling" and r["policy"]:
            r["bytes"], r["seconds"] = r["bytes"] / 4, [s / 4 for s in r["seconds"]]
    assert compare.compare(old, new, 0.05)[0] == worse
    ours["seconds"] = [s * (0.5 if i % 2 else 1.5) for i, s in enumerate(ours["seconds"])]  # too noisy to compare
    assert compare.compare(old, new, 0.05)[0] == []
    for name, record in (("old", old), ("new", made_up())):
        results.save(record, tmp_path / name)
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    ours = old["cases"][0]["rows"][0]
    ours["seconds"] = [s / 2 for s in ours["seconds"]]
    results.save(old, tmp_path / "old")
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "worse: 2" in capsys.readouterr().out


def test_results_of_another_schema_are_refused(tmp_path):
    (tmp_path / "old.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match="schema 1"):
        results.load(tmp_path / "old.json")


def test_results_file_has_the_measurements(tmp_path):
    results.save(made_up(), tmp_path / "x.json")
    assert results.load(tmp_path / "x.json") == made_up()
    assert len((tmp_path / "x.json").read_text().splitlines()) > 20  # one line per row


@native
def test_a_run_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "bandwidth_contenders", lambda _: [])  # this needs hundreds of megabytes
    monkeypatch.setattr(run, "measure_end_to_end", lambda *_: [])
    output = tmp_path / "out" / "tiny.json"
    chosen = [
        "--shapes",
        "3x50",
        "7b",
        "--policies",
        "fixed",
        "active",
        "displacement",
        "--rivals",
        "torch",
        "composition",
    ]
    limits = ["--samples", "3", "--seconds", "0.05", "--most", "2e4", "--threads", "1", "--device", "cpu"]
    monkeypatch.setattr("bench.step.measure.available_memory", lambda _: 10**9)
    assert run.main([*chosen, *limits, "--output", str(output)]) == 0
    printed, record = capsys.readouterr().out, results.load(output)
    assert [case["shapes"] for case in record["cases"]] == ["3 x 50", "8 layers of 7B"]
    small, large = (case["rows"] for case in record["cases"])
    assert {r["name"] for r in small} >= {"ours, native", "torch fused", "torch foreach", "foreach composition"}
    here = [r for r in small if r["name"] != "ours, triton"]  # without the row that is for GPUs only
    assert all(r["why_not"] == "" and 1 <= len(r["seconds"]) <= 3 for r in here)
    assert {r["policy"] for r in small} == {"fixed", "active"}  # displacements are only for SGD
    assert all(r["why_not"].startswith("not enough memory") for r in large)
    assert {p["n"] for p in record["growth"]} == {10, 30, 100, 300, 10_000}
    apart = {(p["over"], p["name"]) for p in record["growth"] if p["host"]}
    assert apart == {("tensors", "ours, native")}
    for point in record["growth"]:
        assert all(0 < host < whole for host, whole in zip(point["host"], point["seconds"], strict=False))
    assert record["machine"]["torch"] == torch.__version__
    assert "µs a tensor" in printed
    assert "not enough memory" in output.with_suffix(".md").read_text()
    if "tiny_roofline.png" in printed:
        assert (output.parent / "tiny_roofline.png").read_bytes().startswith(b"\x89PNG")


def test_measurements_skipped_for_lack_of_time_are_reported(tmp_path):
    output = tmp_path / "late.json"
    assert run.main(["--quick", "--minutes", "0", "--device", "cpu", "--threads", "1", "--output", str(output)]) == 0
    record = results.load(output)
    assert [case["why_not"] for case in record["cases"]] == ["no time was left"] * 2
    assert all(point["why_not"] == "no time was left" for point in record["growth"])


def test_plots_and_tables_are_made_from_results(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "made.json"
    results.save(made_up(), path)
    document = tmp_path / "results.md"
    document.write_text("before\n<!-- run:begin -->\nyesterday's\n<!-- run:end -->\nafter\n", encoding="utf-8")
    assert report.main([str(path), "--document", str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert "yesterday" not in text
    assert report.block(made_up(), "made") in text
    for key in report.PLOTS:
        assert (tmp_path / f"made_{key}.png").stat().st_size > 5000
        assert f"made_{key}.png" in text


def test_bars_and_their_table_have_the_expected_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    cpu, gpu = made_up(), made_up()
    gpu["machine"]["device"] = "NVIDIA H200"
    lines = [line.split(" | ") for line in bars.table(cpu, gpu).splitlines()]
    assert lines[0][3:] == ["CPU", "H200, C++", "H200, Triton |"]
    assert lines[2] == ["| AdamW", "10 x 5M", "torch's fused AdamW", "0.80", "0.80", "not measured |"]
    assert lines[5][3:] == ["1.12", "1.12", "not measured |"]
    assert bars.relative(cpu, "10 x 5M", ("ours", "fixed"))[0] == pytest.approx(0.8, rel=0.01)
    assert bars.relative(cpu, "ResNet-50", ("ours", "fixed")) is None
    bars.draw(cpu, gpu, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["run_cpu", "run_gpu"])
def test_committed_documents_match_the_committed_results(name):
    path = ROOT / "bench" / "results" / f"{name}.json"
    if not path.exists():
        pytest.skip(f"there is no {name}.json")
    record = results.load(path)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == report.full(record)
    assert {key for key in report.PLOTS if path.with_name(f"{name}_{key}.png").exists()} == set(report.plots_of(record))


@pytest.mark.heavy
def test_training_steps_are_split_into_gradients_and_optimizer():
    found = end_to_end.measure_end_to_end(torch.device("cpu"), 2)
    assert {f["optimizer"] for f in found} == set(end_to_end.OPTIMIZERS)
    assert len(found) == len(end_to_end.OPTIMIZERS) * len(end_to_end.MODELS)
    assert all(len(f["step"]) == len(f["gradients"]) == 2 for f in found)
    sizes = {f["model"].split(",")[0]: f["parameters"] for f in found}
    assert 250_000 < sizes["ResNet-20"] < 300_000


def test_json_has_no_nan_or_infinity(tmp_path):
    record = made_up()
    record["cases"][0]["rows"][0]["seconds"] = [float("nan")]
    with pytest.raises(ValueError, match="JSON"):
        results.save(record, tmp_path / "x.json")


def in_two_placements() -> dict[str, Any]:
    """Returns results in which torch's fused step takes 50 ms with threads near each other, 80 with threads apart."""
    record = made_up()
    near = record["cases"][0]["rows"]
    for r in [*near, *record["growth"]]:
        r["threads"] = "near" if r["seconds"] else ""
    apart = [row("ours, native", "ours", "fixed", 40, threads="apart")]
    apart.append(row("torch fused", "torch", "fixed", 80, threads="apart"))
    near += [r | {"seconds": r["seconds"][:20]} for r in apart]
    return record


def test_placements_of_the_threads_are_compared_apart():
    record = in_two_placements()
    assert list(results.by_threads(record)) == ["near", "apart"]  # that of most rows first
    head, first, *others = goals.goals_table(record, None)
    assert head[2:] == ["CPU, threads near", "CPU, threads apart", "GPU, C++", "GPU, Triton"]
    assert [cell.split(" ")[0] for cell in first[2:4]] == ["0.80", "0.50"]
    assert next(line for line in others if line[0] == "ActiveAdamW / AdamW, 10 x 5M")[3] == "not measured"
    text = report.full(record)
    assert text.count("bitsandbytes, 32 bit | runs on GPUs only") == 2  # what did not run is in both
    assert "## AdamW, 10 x 5M, float32, threads apart\n\n10 tensors" in text
    lines = [line.split(" | ") for line in bars.table(record, made_up()).splitlines()]
    assert lines[0][3:5] == ["CPU, threads near", "CPU, threads apart"]
    assert lines[2][3:5] == ["0.80", "0.50"]
    slower = in_two_placements()
    ours = next(r for r in slower["cases"][0]["rows"] if r["threads"] == "apart")
    ours["seconds"] = [1.2 * s for s in ours["seconds"]]
    assert compare.compare(record, slower, 0.05)[0] == [
        "AdamW, 10 x 5M, float32, large, threads apart, ours, native, fixed / torch fused: 0.500 -> 0.600 (+20.0%)"
    ]


def test_a_case_measured_in_one_placement_is_not_in_the_other():
    record = in_two_placements()
    near = [r for r in record["cases"][0]["rows"] if r["threads"] != "apart"]
    record["cases"].append(record["cases"][0] | {"shapes": "ResNet-50", "rows": near})
    assert "ResNet-50, float32, threads near" in report.full(record)
    assert "ResNet-50, float32, threads apart" not in report.full(record)


def test_several_runs_make_one_file(tmp_path):
    first, second = in_two_placements(), made_up()
    near = [r for r in first["cases"][0]["rows"] if r["threads"] != "apart"]
    rows = [r | {"threads": r["threads"] and "apart"} for r in near]  # what did not run has no placement
    first["cases"] = [first["cases"][0] | {"rows": rows}]
    second["cases"] = [in_two_placements()["cases"][0]]
    for r in second["cases"][0]["rows"]:
        r["seconds"] = [2 * s for s in r["seconds"]]
    second["cases"].append(second["cases"][0] | {"shapes": "other"})
    for name, record in (("1", first), ("2", second)):
        results.save(record, tmp_path / name)
    assert merge.main([str(tmp_path / name) for name in ("1", "2", "both")]) == 0
    both = results.load(tmp_path / "both")
    assert [case["shapes"] for case in both["cases"]] == ["10 x 5M", "other"]
    found = {r["threads"]: r["seconds"][0] for r in both["cases"][0]["rows"] if r["name"] == "torch fused"}
    assert found == {"apart": pytest.approx(0.05), "near": pytest.approx(0.1)}  # of the first, of the second
    assert [r["name"] for r in both["cases"][0]["rows"]].count("bitsandbytes, 32 bit") == 1
    assert both["growth"] == first["growth"] + second["growth"]  # whose threads are not known
    second["machine"]["commit"] = "1" * 40
    with pytest.raises(ValueError, match="differ in commit"):
        merge.merge([first, second])
