"""Training runs of ``bench/schedules``: a smoke run, resuming, and checks of the data."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("rich")

from bench.experiments import runner
from bench.schedules import __main__ as controllers
from bench.schedules import fetch as controllers_fetch
from bench.schedules import memory as controllers_memory
from bench.schedules import report as controllers_report
from bench.schedules.data import Part, Splits, load
from bench.schedules.model import ResNet20
from bench.schedules.runs import METHODS, Job, evaluate, train

from ..schedules.common import one_thread  # noqa: F401


def job(method: str, **changes) -> Job:
    settings = {"batch_size": 32, "seed": 0, "lr": METHODS[method].lr, "epochs": 2, "images": 200, "data": "mnist5k"}
    return Job(method, **{**settings, "side": 14, "channels": 4, "patience": 1, **changes})


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load("mnist5k", train=200, test=50, side=14, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, splits):
    run = train(job(method), splits)
    assert not run["diverged"]
    assert len(run["train_loss"]) == len(run["accuracy"]) == 2
    assert run["train_loss"][0] < 4
    assert method == "aalr" or run["train_loss"][1] < run["train_loss"][0], "AALR tries twice the rate"
    assert run["rates"][0] == [0.0, pytest.approx(METHODS[method].lr / (100 if method == "cyclic" else 1))]
    assert [when for when, _ in run["rates"]][7] == 1.0
    assert (run["checkpoint_accuracy"] is None) is (method != "aalr")
    json.dumps(run, allow_nan=False)


def test_a_run_depends_only_on_its_job(splits):
    first, again, other = (train(job("aslr", seed=seed, images=64), splits) for seed in (3, 3, 4))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["train_loss"] != other["train_loss"]


def test_a_divergent_run_is_recorded_and_aalr_recovers(splits):
    lost = train(job("sgdr", lr=1e8), splits)
    assert lost["diverged"]
    assert len(lost["train_loss"]) < 3
    kept = train(job("aalr", lr=1e5, epochs=24), splits)
    assert not kept["diverged"]
    assert {"restore_initial", "save"} <= set(kept["action"])
    assert kept["checkpoint_accuracy"] is not None
    assert min(loss for loss in kept["train_loss"] if loss is not None) < 5  # it tries too large a rate later


@pytest.mark.heavy
def test_the_smoke_scale_in_processes_resumes_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(controllers, "ROOT", tmp_path)
    output = tmp_path / "out" / "results.json"
    arguments = ["--data", "mnist5k", "--images", "64", "--methods", "aalr", "--workers", "1", "--output", str(output)]
    assert controllers.main(arguments) == 0
    first = json.loads(output.read_text())
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert [run["lr"] for run in first["runs"]] == [0.1, controllers.DIVERGENT_LR]
    assert first["machine"]["torch"] == torch.__version__
    monkeypatch.setattr(runner, "ProcessPoolExecutor", None)  # nothing is left to train
    document = tmp_path / "document.md"
    document.write_text("a <!-- runs:begin --> old <!-- runs:end --> z")
    assert controllers.main([*arguments, "--document", str(document)]) == 0
    assert controllers_report.markdown(first) in document.read_text()
    assert document.read_text().endswith("<!-- runs:end --> z")
    assert json.loads(output.read_text()) == first
    assert "AALR, batch 128, from lr 10" in controllers_report.markdown(first)
    assert "with AALR's patience 1" in capsys.readouterr().out


def test_the_model_is_resnet20():
    model = ResNet20()
    assert sum(p.numel() for p in model.parameters()) == 269_434
    assert sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules()) == 20
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_parts_are_disjoint_and_normalised():
    whole = load("mnist5k", train=None, test=None, side=28, device="cpu")
    assert [len(part) for part in (whole.train, whole.validation, whole.test)] == [3200, 800, 1000]
    images = torch.cat([part.images for part in (whole.train, whole.validation, whole.test)])
    assert len({image.numpy().tobytes() for image in images}) > 4990
    assert abs(whole.train.images.mean().item()) < 1e-3
    assert abs(whole.train.images.std().item() - 1) < 1e-3
    assert len(whole.test.labels.unique()) == 10
    with pytest.raises(ValueError, match="has 3200 training images"):
        load("mnist5k", train=5000, test=None, side=28, device="cpu")


def test_evaluation_weights_a_smaller_last_batch():
    part = Part(torch.randn(7, 1, 8, 8), torch.arange(7))
    model = ResNet20(2)
    loss, accuracy = evaluate(model, part, size=3)
    expected = torch.nn.functional.cross_entropy(model.eval()(part.images), part.labels).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert math.isclose(accuracy * 7 / 100, round(accuracy * 7 / 100), abs_tol=1e-9)


def test_files_that_are_not_the_data_set_are_refused(tmp_path):
    name = "t10k-labels-idx1-ubyte.gz"
    with pytest.raises(FileNotFoundError, match="python -m bench"):
        controllers_fetch.read(tmp_path, name)
    (tmp_path / name).write_bytes(gzip.compress(b"other"))
    with pytest.raises(ValueError, match="does not have the content of Fashion-MNIST"):
        controllers_fetch.read(tmp_path, name)
    (tmp_path / name).write_bytes(gzip.compress(b"other")[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        controllers_fetch.read(tmp_path, name)


def test_download_without_debian_raises_an_error_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(controllers_fetch.shutil, "which", lambda tool: None)
    with pytest.raises(RuntimeError, match="apt-get is not here"):
        controllers_fetch.fetch(tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_documentation_has_the_measured_numbers():
    document = (controllers.ROOT / "docs" / "controllers.md").read_text(encoding="utf-8")
    results = controllers.ROOT / "bench" / "results"
    runs = json.loads((results / "controllers.json").read_text(encoding="utf-8"))
    assert f"<!-- runs:begin -->\n{controllers_report.markdown(runs)}\n<!-- runs:end -->" in document
    memory = json.loads((results / "controllers_memory.json").read_text(encoding="utf-8"))
    table = controllers_report.markdown_table(controllers_memory.HEADER, controllers_memory.rows(memory))
    assert f"<!-- memory:begin -->\n{table}\n<!-- memory:end -->" in document
