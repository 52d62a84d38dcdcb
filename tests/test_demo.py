"""The demo, end to end on a few digits, and what it makes of results."""

from __future__ import annotations

import copy
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from bench import demo, demo_pool, demo_report, demo_runs

pytestmark = pytest.mark.usefixtures("reference_backend")

TINY = ["--samples", "300", "--epochs", "1", "--methods", "torch-adamw", "adamw", "--lrs", "1e-2", "1e-4"]
ROOT = Path(demo.__file__).parent.parent


def train(digits: demo_runs.Digits, *, method: str, lr: float, epochs: int = 1, seed: int = 0) -> dict[str, Any]:
    return demo_runs.train(demo_runs.Job(method, lr, epochs, seed, "cpu"), digits, lambda *_: None)


def without_seconds(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "seconds"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the workers: the number of threads decides in which order numbers are added."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    assert demo.main([*TINY, "--workers", "2", "--out", str(out)]) == 0
    return out, demo_report.load(out / "demo.json")


def made_up(**finals: list[float | None]) -> dict[str, Any]:
    """Results of these final accuracies at 1e-5, 1e-3, …; the first method is everyone's baseline."""
    lrs = [10.0 ** (2 * i - 5) for i in range(len(next(iter(finals.values()))))]
    baseline = next(iter(finals))
    runs = [
        {
            "method": key,
            "lr": lr,
            "diverged": final is None,
            "final_accuracy": final,
            "train_loss": [1.0],
            "test_accuracy": [final],
            "weights_sha256": "0",
        }
        for key, values in finals.items()
        for lr, final in zip(lrs, values, strict=True)
    ]
    methods = {key: {"label": key.upper(), "baseline": None if key == baseline else baseline} for key in finals}
    config = {"lrs": lrs, "methods": methods, "epochs": 1, "train_digits": 4000, "test_digits": 1000, "layers": [7, 3]}
    return {"schema": demo_report.SCHEMA, "config": config, "runs": runs, "seconds": 1.0}


def test_a_tiny_run_writes_results_and_plot(tiny: tuple[Path, dict[str, Any]]) -> None:
    out, results = tiny
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert results["config"]["train_digits"] == pytest.approx(240, abs=5)
    assert results["config"]["lrs"] == [1e-4, 1e-2]
    assert len(results["runs"]) == 4
    for run in results["runs"]:
        assert len(run["train_loss"]) == len(run["test_accuracy"]) == 1
        assert run["final_accuracy"] == run["test_accuracy"][-1]
        rates = run["learning_rates"]
        assert rates is None if run["method"] == "torch-adamw" else rates == dict.fromkeys(rates, run["lr"])


def test_our_adamw_is_torchs(tiny: tuple[Path, dict[str, Any]]) -> None:
    assert "agree bit for bit" in demo_report.equality(tiny[1])


def test_a_difference_is_not_hidden(tiny: tuple[Path, dict[str, Any]]) -> None:
    results = copy.deepcopy(tiny[1])
    results["runs"][-1]["weights_sha256"] = "other"
    assert "DIFFER at 1e-2 (of 2 rates)" in demo_report.equality(results)


def test_results_follow_from_the_seed_alone(tiny: tuple[Path, dict[str, Any]], one_thread: None) -> None:
    """The same in this process as in two others."""
    digits = demo_runs.load_digits(seed=0, samples=300)
    for run in tiny[1]["runs"]:
        again = train(digits, method=run["method"], lr=run["lr"])
        assert without_seconds(again) == without_seconds(run)
    other = train(digits, method="adamw", lr=1e-2, seed=1)
    assert other["weights_sha256"] not in {run["weights_sha256"] for run in tiny[1]["runs"]}


def test_each_method_trains(one_thread: None) -> None:
    digits = demo_runs.load_digits(seed=0, samples=300)
    runs = {key: train(digits, method=key, lr=1e-3, epochs=3) for key in demo_runs.METHODS}
    for key, run in runs.items():
        assert run["train_loss"][-1] < run["train_loss"][0]
        if "trainable" in key or "active" in key or "both" in key:
            assert run["learning_rates"]["max"] > 1e-3


def test_report_makes_the_table_anew(
    tiny: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--report", str(tiny[0] / "demo.json"), "--out", str(tmp_path)]) == 0
    assert demo_report.markdown_table(tiny[1]) in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_readme_block_is_rewritten_in_place(tiny: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{demo_report.BEGIN}\nold\n{demo_report.END}\nafter\n", encoding="utf-8")
    command = ["--readme", str(readme), "--report", str(tiny[0] / "demo.json")]
    for _ in range(2):
        assert demo.main(command) == 0
        table = demo_report.markdown_table(tiny[1])
        expected = f"before\n{demo_report.BEGIN}\n{table}\n{demo_report.END}\nafter\n"
        assert readme.read_text(encoding="utf-8") == expected


def test_readme_without_block_is_an_error(
    tiny: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n", encoding="utf-8")
    assert demo.main(["--readme", str(readme), "--report", str(tiny[0] / "demo.json")]) == 1
    assert demo_report.BEGIN in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == "nothing here\n"


def test_table_and_findings_of_given_numbers() -> None:
    results = made_up(plain=[44.44, 91.0, None], ours=[91.26, 90.9, 92.0], wild=[None, 80.0, None])
    assert demo_report.markdown_table(results).splitlines() == [
        "| test accuracy % |     1e-5 | 1e-3 |     1e-1 | best |    worst | spread |",
        "| --------------- | -------: | ---: | -------: | ---: | -------: | -----: |",
        "| PLAIN           |     44.4 | 91.0 | diverged | 91.0 | diverged |      – |",
        "| OURS            |     91.3 | 90.9 |     92.0 | 92.0 |     90.9 |    1.1 |",
        "| WILD            | diverged | 80.0 | diverged | 80.0 | diverged |      – |",
    ]
    ours, wild, _ = demo_report.findings(results)
    assert ours == (
        "OURS against PLAIN: clearly better at 1e-5 (+46.8), 1e-1 (the other diverged); no clear difference at "
        "1e-3 (-0.1)."
    )
    assert wild == "WILD against PLAIN: clearly worse at 1e-3 (-11.0); diverged at 1e-5, 1e-1 (so did the other)."


def test_json_survives_saving_and_divergence_is_drawn(tmp_path: Path) -> None:
    results = made_up(plain=[10.0, 90.0], ours=[None, 90.0])
    demo_report.save(results, tmp_path / "demo.json")
    assert demo_report.load(tmp_path / "demo.json") == results
    assert demo.main(["--report", str(tmp_path / "demo.json"), "--out", str(tmp_path)]) == 0


def test_a_diverging_run_is_shown_as_such() -> None:
    run = train(demo_runs.load_digits(seed=0, samples=300), method="torch-sgd", lr=1e30)
    assert (run["diverged"], run["final_accuracy"], run["test_accuracy"]) == (True, None, [])


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
    ("content", "message"), [("{", "is not JSON"), ('{"schema": 0}', "schema 1"), (None, "No such file")]
)
def test_unusable_results_are_a_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "demo.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert demo.main(["--report", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_missing_packages_are_a_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "mlxtend" else object())
    assert demo.main(["--quick"]) == 1
    assert capsys.readouterr().err == (
        "bench.demo: needs mlxtend: pip install 'fused_adaptive[demo]', or use `make demo`\n"
    )


def test_interrupt_leaves_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_pool.Lines, "finished", interrupted)
    assert demo.main([*TINY, "--workers", "1", "--out", str(tmp_path)]) == demo.INTERRUPTED
    assert capsys.readouterr().err.strip() == "interrupted: nothing was written"
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_committed_results_are_complete() -> None:
    results = demo_report.load(ROOT / "bench" / "results" / "demo.json")
    assert len(results["runs"]) == 40
    assert len(results["config"]["methods"]) == 8
    assert json.dumps(results).count("NaN") == 0
