"""The papers' experiments: runs are kept, resumed and shown."""

from __future__ import annotations

import json
import linecache
import re
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from bench.experiments import runner
from bench.papers import __main__ as program
from bench.papers import catalogue, digests, measure, report, rules
from bench.papers.experiment import verdict

ROOT = Path(__file__).parents[2]
#: What only some experiments need, installed with the extra "experiments".
NEEDS = {"language": ("gensim", "tokenizers"), "rivals": ("prodigyopt", "dadaptation", "schedulefree")}


@dataclass(frozen=True)
class Job:
    number: int
    folder: str


def square(job: Job) -> dict[str, Any]:
    """Leaves a trace of each call, and fails where it is told to."""
    folder = Path(job.folder)
    with (folder / "calls").open("a", encoding="utf-8") as file:
        file.write(f"{job.number}\n")
    if job.number == 3 and (folder / "broken").exists():
        raise ValueError("interrupted")
    return {"square": job.number**2}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measure, "BUILD", tmp_path / "build")
    numbers = lambda scale: [Job(n, str(tmp_path)) for n in (1, 2, 3, 4)]  # noqa: E731
    return replace(rules.EXPERIMENT, jobs=numbers, train=square, trained_by=(square,))


def calls(folder: Path) -> list[int]:
    path = folder / "calls"
    numbers = sorted(map(int, path.read_text().split())) if path.exists() else []
    path.unlink(missing_ok=True)
    return numbers


def squares(name: str = "squares") -> list[int]:
    results = measure.load(measure.path_of(name, "cpu"))
    assert results is not None
    return [run["square"] for run in results["runs"]]


def test_an_interrupted_experiment_has_its_finished_runs_and_goes_on(tmp_path, experiment):
    (tmp_path / "broken").touch()
    with pytest.raises(ValueError, match="interrupted"):
        measure.measure(experiment, "squares", "cpu", workers=1)
    assert squares() == [1, 4]
    assert calls(tmp_path)[:3] == [1, 2, 3]
    (tmp_path / "broken").unlink()
    measure.measure(experiment, "squares", "cpu", workers=1)
    assert squares() == [1, 4, 9, 16]
    assert calls(tmp_path) == [3, 4]


def test_results_are_enough_to_go_on_from_and_tell_the_commit(tmp_path, experiment, monkeypatch):
    monkeypatch.setattr(measure, "commit_of_code", lambda: "abc")
    measure.measure(experiment, "squares", "cpu", workers=1)
    (tmp_path / "build" / "squares-cpu.jsonl").unlink()
    calls(tmp_path)
    monkeypatch.setattr(measure, "commit_of_code", lambda: "def")
    measure.measure(experiment, "squares", "cpu", workers=1)
    assert calls(tmp_path) == []
    results = measure.load(measure.path_of("squares", "cpu"))
    assert results is not None
    assert [run["commit"] for run in results["runs"]] == ["abc"] * 4
    assert results["planned"] == 4


def test_results_are_not_lost_where_there_is_nothing_new(tmp_path, experiment):
    measure.measure(experiment, "squares", "cpu", workers=1)
    before = measure.path_of("squares", "cpu").read_text()
    measure.journal_of("squares", "cpu").unlink()
    measure.collect(replace(experiment, trained_by=(square, "changed")), "squares", "cpu")
    assert measure.path_of("squares", "cpu").read_text() == before


def test_runs_of_other_training_code_are_made_again(tmp_path, experiment):
    measure.measure(experiment, "squares", "cpu", workers=1)
    calls(tmp_path)
    measure.measure(replace(experiment, trained_by=(square, "changed")), "squares", "cpu", workers=1)
    assert calls(tmp_path) == [1, 2, 3, 4]


def test_new_results_do_not_make_a_commit_dirty_and_new_code_does(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "commit", lambda: "abc-dirty")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    files = [tmp_path / "code.py", tmp_path / "bench" / "results" / "a.json"]
    for file in files:
        file.write_text("1")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    files[1].write_text("2")
    assert measure.commit_of_code() == "abc"
    files[0].write_text("2")
    assert measure.commit_of_code() == "abc-dirty"


def test_smoke_never_overwrites_results():
    assert measure.RESULTS not in measure.path_of("rules", "smoke").parents
    assert measure.path_of("rules", "cpu") != measure.path_of("rules", "gpu")


# ---- digests ----


def test_code_is_what_decides_a_run_not_its_comments(tmp_path):
    module = tmp_path / "made_up.py"

    def source(text: str) -> str:
        module.write_text(text)
        names: dict[str, Any] = {}
        exec(compile(text, str(module), "exec"), names)
        linecache.checkcache(str(module))
        return digests.source(names["train"])

    first = source("def train(job):\n    return job + 1\n")
    assert source('def train(job):\n    """Adds."""\n    # one\n    return (job + 1)\n') == first
    assert source("def train(job):\n    return job + 2\n") != first


def test_golden_trajectories_decide_a_run(tmp_path):
    (tmp_path / "a.json").write_text("1")
    before = digests.golden(tmp_path)
    digests.golden.cache_clear()
    (tmp_path / "a.json").write_text("2")
    assert digests.golden(tmp_path) != before
    assert digests.GOLDEN.is_dir()
    assert list(digests.GOLDEN.glob("*.json"))


def test_what_has_no_stable_text_is_refused():
    with pytest.raises(TypeError, match="another text in each process"):
        digests.of((object(),))


@pytest.mark.parametrize("name", catalogue.EXPERIMENTS)
def test_every_experiment_has_a_digest_and_jobs_of_all_scales(name):
    experiment = catalogue.EXPERIMENTS[name]
    assert digests.of(experiment.trained_by) == digests.of(experiment.trained_by)
    assert experiment.train in experiment.trained_by
    for scale in ("smoke", "cpu", "gpu"):
        keys = [json.dumps(runner.fields(job), sort_keys=True) for job in experiment.jobs(scale)]
        assert len(set(keys)) == len(keys)
    seeds = {job.seed for job in experiment.jobs("cpu") if hasattr(job, "seed")}
    assert len(seeds) >= 3 or name == "surfaces"  # nothing there is drawn
    assert set(experiment.ours) == {"cpu", "gpu"}


# ---- what is shown ----


def test_the_document_is_what_the_committed_results_make():
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert text.split("<!-- papers:begin -->")[1].split("<!-- papers:end -->")[0].strip() == report.text().strip()


def test_every_committed_run_tells_its_commit_and_its_code():
    for path in measure.RESULTS.glob("*.json"):
        for entry in json.loads(path.read_text(encoding="utf-8"))["runs"]:
            assert re.fullmatch(r"[0-9a-f]{16}", entry["code"]), path
            assert re.match(r"[0-9a-f]{40}", entry["run"]["commit"]), path


def test_a_part_of_the_runs_is_shown_without_a_verdict(experiment, tmp_path, monkeypatch):
    made = catalogue.EXPERIMENTS["rules"]
    smoke = replace(made, jobs=lambda scale: made.jobs("smoke"))
    line = {
        "code": digests.of(made.trained_by),
        "job": asdict(made.jobs("smoke")[0]),
        "run": made.train(made.jobs("smoke")[0]),
    }
    journal = measure.journal_of("rules", "cpu")
    journal.parent.mkdir()
    journal.write_text(json.dumps({**line, "run": {**line["run"], "commit": None}}) + "\n{cut off")
    measure.collect(smoke, "rules", "cpu")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    shown = report.section("rules")
    assert "**Incomplete: 1 of 5 runs.**" in shown
    assert "multiply down, add up" in shown
    assert "**Not run yet: 0 of 20 runs.**" in report.section("surfaces")
    assert report.draw("rules", "cpu") == tmp_path / "results" / "rules.png"


def test_a_finished_run_is_printed_whatever_its_program_notes():
    assert measure._line({"method": "aalr", "test": 10_000, "history": [[0, 1]], "seed": None}) == "method=aalr"
    assert measure._line({"method": "plain", "test": [80.0, 81.5], "commit": "c"}) == "method=plain  81.5"


def test_the_program_lists_runs_and_resumes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "BUILD", tmp_path)
    assert program.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"`{name}`" in listed for name in catalogue.EXPERIMENTS)
    assert program.main(["nonsense"]) == 2
    assert program.main(["rules", "--scale", "smoke", "--workers", "1"]) == 0
    first = capsys.readouterr().out
    assert "multiply down, add up, seed 0" in first
    assert (tmp_path / "smoke" / "rules.png").stat().st_size > 10_000
    monkeypatch.setattr(runner, "ProcessPoolExecutor", None)  # nothing is left to run
    assert program.main(["rules", "--scale", "smoke"]) == 0


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::UserWarning")  # of packages that are compared with
@pytest.mark.parametrize("name", catalogue.EXPERIMENTS)
def test_every_experiment_runs_at_the_smoke_scale(name, tmp_path):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    experiment, jobs = catalogue.EXPERIMENTS[name], catalogue.EXPERIMENTS[name].jobs("smoke")
    runs = [{**asdict(job), "commit": None, **experiment.train(job)} for job in jobs]
    runs = json.loads(json.dumps(runs, allow_nan=False))
    assert verdict(experiment, runs, len(jobs)).word in ("confirmed", "partly", "not", "not at this scale")
    assert experiment.table(runs).startswith("| ")
    figure = Figure()
    experiment.draw(runs, figure)
    figure.savefig(tmp_path / "plot.png")
    assert all(criterion.holds(runs) in (True, False) for criterion in experiment.criteria)
