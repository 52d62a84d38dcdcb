"""The demo on a few digits, and the reports from its results."""

from __future__ import annotations

import copy
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from bench.demo import __main__ as demo
from bench.demo import report, runs

TINY = ["--samples", "300", "--epochs", "1", "--methods", "sgd", "adamw", "--lrs", "1e-2", "1e-4", "--batches", "64"]
ROOT = Path(demo.__file__).parents[2]


def train(*, method: str, lr: float, epochs: int = 1, seed: int = 0, batch: int = 128) -> dict[str, Any]:
    return runs.train(runs.Job(method, lr, batch, epochs, seed, 300, "cpu"))


def without_seconds(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "seconds"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sets the number of threads of the workers, since it decides the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    assert demo.main([*TINY, "--workers", "2", "--out", str(out)]) == 0
    return out, report.load(out / "demo.json")


def made_up(**finals: list[float | None]) -> dict[str, Any]:
    """Returns results with these accuracies at 1e-5, 1e-3, …; the first method is the baseline."""
    lrs = [10.0 ** (2 * i - 5) for i in range(len(next(iter(finals.values()))))]
    baseline = next(iter(finals))
    made = [
        {"method": key, "lr": lr, "batch": 128, "epochs": 1, "diverged": final is None, "accuracy": final}
        for key, values in finals.items()
        for lr, final in zip(lrs, values, strict=True)
    ]
    methods = {key: {"label": key.upper(), "family": "F", "baseline": baseline} for key in finals}
    config = {
        "methods": methods,
        "rates": {"methods": list(finals), "lrs": lrs, "epochs": 1, "batch": 128},
        "swap": {"lrs": [], "epochs": 1, "batch": 128},
        "batches": {"lrs": {}, "batches": [], "epochs": 1},
        "train_digits": 4000,
        "test_digits": 1000,
        "layers": [7, 3],
    }
    return {"schema": report.SCHEMA, "config": config, "runs": made, "seconds": 1.0}


def test_a_tiny_run_writes_results_and_plots(tiny: tuple[Path, dict[str, Any]]) -> None:
    out, results = tiny
    for name in ("demo.png", "demo_batches.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert results["config"]["train_digits"] == pytest.approx(240, abs=5)
    assert results["config"]["rates"]["lrs"] == [1e-4, 1e-2]
    # Two methods at two rates, the swap at two rates, two methods at one batch size and two rates.
    assert len(results["runs"]) == 4 + 4 + 4
    for run in results["runs"]:
        assert len(run["train_loss"]) == 1
        rates = run["learning_rates"]
        assert rates is None if run["method"] == "torch-adamw" else rates == dict.fromkeys(rates, run["lr"])
    assert [len(rows) for _, (_, rows) in report.tables(results)] == [2, 4]


def test_our_adamw_gives_the_results_of_torchs(tiny: tuple[Path, dict[str, Any]]) -> None:
    assert "agree bit for bit" in report.equality(tiny[1])


def test_a_difference_between_methods_is_reported(tiny: tuple[Path, dict[str, Any]]) -> None:
    results = copy.deepcopy(tiny[1])
    next(run for run in results["runs"] if run["method"] == "torch-adamw" and run["lr"] == 1e-2)["accuracy"] = 0.0
    assert report.equality(results).endswith("DIFFER at 1e-2.")


def test_results_depend_only_on_the_seed(tiny: tuple[Path, dict[str, Any]], one_thread: None) -> None:
    """Results are the same in this process and in two others."""
    for run in tiny[1]["runs"]:
        again = train(method=run["method"], lr=run["lr"], batch=run["batch"])
        assert again | {"seconds": run["seconds"]} == {key: run[key] for key in again}
    other = train(method="adamw", lr=1e-2, seed=1)
    assert other["weights_sha256"] not in {run["weights_sha256"] for run in tiny[1]["runs"]}


def test_each_method_trains(one_thread: None) -> None:
    for key in runs.METHODS:
        run = train(method=key, lr=1e-3, epochs=3)
        assert run["train_loss"][-1] < run["train_loss"][0]
        if "trainable" in key or "active" in key:
            assert run["learning_rates"]["max"] > 1e-3


def test_report_rewrites_the_table(
    tiny: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--report", str(tiny[0] / "demo.json"), "--out", str(tmp_path)]) == 0
    assert report.markdown(report.rate_rows(tiny[1])) in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.png", "demo_batches.png"]


def test_readme_block_is_rewritten_in_place(tiny: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    command = ["--readme", str(readme), "--report", str(tiny[0] / "demo.json")]
    for _ in range(2):
        assert demo.main(command) == 0
        table = report.markdown(report.rate_rows(tiny[1]))
        expected = f"before\n{report.BEGIN}\n{table}\n{report.END}\nafter\n"
        assert readme.read_text(encoding="utf-8") == expected


def test_readme_without_block_is_an_error(
    tiny: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n", encoding="utf-8")
    assert demo.main(["--readme", str(readme), "--report", str(tiny[0] / "demo.json")]) == 1
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "nothing here\n"


def test_table_and_findings_of_given_numbers() -> None:
    results = made_up(plain=[44.44, 91.0, None], ours=[91.26, 90.9, 92.0], wild=[None, 80.0, None])
    assert report.markdown(report.rate_rows(results)).splitlines() == [
        "| test accuracy % |     1e-5 | 1e-3 |     1e-1 | best |    worst | range |",
        "| --------------- | -------: | ---: | -------: | ---: | -------: | ----: |",
        "| PLAIN           |     44.4 | 91.0 | diverged | 91.0 | diverged |     – |",
        "| OURS            |     91.3 | 90.9 |     92.0 | 92.0 |     90.9 |   1.1 |",
        "| WILD            | diverged | 80.0 | diverged | 80.0 | diverged |     – |",
    ]
    ours, wild, _ = report.findings(results)
    assert ours == (
        "OURS against PLAIN: clearly better at 1e-5 (+46.8), 1e-1 (the other diverged); no clear difference at "
        "1e-3 (-0.1)."
    )
    assert wild == "WILD against PLAIN: clearly worse at 1e-3 (-11.0); diverged at 1e-5, 1e-1 (so did the other)."


def test_json_is_saved_and_divergence_is_plotted(tmp_path: Path) -> None:
    results = made_up(plain=[10.0, 90.0], ours=[None, 90.0])
    report.save(results, tmp_path / "demo.json")
    assert report.load(tmp_path / "demo.json") == results
    assert demo.main(["--report", str(tmp_path / "demo.json"), "--out", str(tmp_path)]) == 0


def test_a_divergent_run_is_marked() -> None:
    run = train(method="sgd", lr=1e30)
    assert (run["diverged"], run["accuracy"], run["train_loss"]) == (True, None, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nadam"], "invalid choice: 'nadam'"),
        (["--lrs", "-1"], "invalid positive float value: '-1'"),
        (["--lrs", "0"], "invalid positive float value: '0'"),
        (["--epochs", "0"], "invalid positive int value: '0'"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ('{"schema": 0}', "schema 2"), (None, "No such file")]
)
def test_unusable_results_give_an_error_of_one_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert demo.main(["--report", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_packages_give_an_error_with_the_command_to_install_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "mlxtend" else object())
    assert demo.main(["--quick"]) == 1
    assert capsys.readouterr().err == (
        "bench.demo: needs mlxtend: pip install 'fused_adaptive[demo]', or use `make demo`\n"
    )


def test_interrupt_ends_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_line", interrupted)
    assert demo.main([*TINY, "--workers", "1", "--out", str(tmp_path)]) == demo.INTERRUPTED
    assert capsys.readouterr().err.strip() == "interrupted: nothing was written"
    assert not list(tmp_path.iterdir())
    for _ in range(100):  # a thread of the pool may be about to strike an ended process off
        if multiprocessing.active_children():
            time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_committed_results_are_complete() -> None:
    results = report.load(ROOT / "bench" / "results" / "demo.json")
    grids = results["config"]
    assert grids["rates"]["methods"] == list(runs.METHODS)
    assert grids["rates"]["lrs"] == list(demo.LRS)
    assert grids["batches"]["batches"] == list(demo.BATCHES)
    assert "agree bit for bit" in report.equality(results)
    assert len(results["runs"]) == len(demo._keys(grids))
    assert json.dumps(results).count("NaN") == 0
