"""Checks of the documentation: snippets run, tables match the results, links and paths exist."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_adaptive as fa
from bench.demo.report import markdown, rate_rows
from bench.experiments import defaults, increments
from bench.step import report, results
from fused_adaptive.optimizers.adam import AdamWBackbone
from fused_adaptive.optimizers.sgd import SGDBackbone

from .. import environments

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").glob("*")
)
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def given() -> dict[str, Any]:
    """Returns the names that snippets use: a model, data and a loss."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    data = torch.utils.data.TensorDataset(torch.randn(40, 4), torch.randint(3, (40,)))
    loader, loss_fn = torch.utils.data.DataLoader(data, batch_size=8), torch.nn.functional.cross_entropy
    return {"model": model, "loader": loader, "loss_fn": loss_fn, "k": 5}


def run_snippets(document: str, names: dict[str, Any]) -> None:
    snippets = SNIPPET.findall((ROOT / document).read_text(encoding="utf-8"))
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, document, "exec"), names)


def test_readme_snippets_run_in_order(tmp_path, capsys):
    names = given() | {"path": tmp_path / "checkpoint.pt"}
    run_snippets("README.md", names)
    assert "'mean'" in capsys.readouterr().out
    assert names["path"].exists()


@pytest.mark.parametrize("document", ["docs/policies.md", "docs/clipping.md"])
def test_snippets_run_in_order(document):
    run_snippets(document, given())


@pytest.mark.filterwarnings("ignore")  # warnings of the trainers
def test_snippets_on_controllers_and_trainers_run_in_order(tmp_path, capsys):
    pytest.importorskip("lightning")
    transformers = pytest.importorskip("transformers")
    names = given()
    evaluate = lambda model: sum(names["loss_fn"](model(x), y).item() for x, y in names["loader"])  # noqa: E731

    def train_epoch(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        for x, y in names["loader"]:
            optimizer.zero_grad()
            names["loss_fn"](model(x), y).backward()
            optimizer.step()
        return evaluate(model)

    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    names |= {"evaluate": evaluate, "train_epoch": train_epoch, "epochs": 3, "arguments": arguments}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLBACKEND", "agg")
        run_snippets("docs/controllers.md", names)
    optimizer = torch.optim.SGD(names["model"].parameters(), lr=0.1)
    names |= {"optimizer": optimizer, "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}
    run_snippets("docs/training.md", names)
    assert "None" not in capsys.readouterr().out


def test_snippets_on_distributed_training_run_in_order(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    try:
        names = given()
        flat = [p.detach().flatten().requires_grad_() for p in names["model"].parameters()]
        names |= {"flat_shards": flat, "group": dist.group.WORLD, "path": tmp_path / "checkpoint"}
        run_snippets("docs/distributed.md", names)
    finally:
        dist.destroy_process_group()


def test_readme_table_matches_the_committed_results():
    demo = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())
    block = README.split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    assert block.strip() == markdown(rate_rows(demo)).strip()


@pytest.mark.parametrize(("name", "show"), [("increments", increments.table), ("defaults", defaults.summary)])
def test_tables_of_the_experiments_match_the_committed_results(name, show):
    found = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    text = (ROOT / "docs" / "policies.md").read_text()
    assert text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip() == show(found).strip()


def test_the_default_increments_are_those_chosen_by_the_experiment():
    found = json.loads((ROOT / "bench" / "results" / "increments.json").read_text())
    for family, backbone in {"AdamW": AdamWBackbone(), "SGD": SGDBackbone()}.items():
        grid = [run for run in found["runs"] if (run["stage"], run["family"]) == ("grid", family)]
        choice = increments.chosen(increments.summary(increments.deficits(grid, family)))
        assert choice is not None
        assert (choice["increment"], choice["low"]) == (backbone.increment, backbone.low)


def test_readme_timings_match_the_committed_results():
    record = results.load(ROOT / "bench" / "results" / "run_cpu.json")
    block = README.split("<!-- run:begin -->")[1].split("<!-- run:end -->")[0]
    assert block.strip() == report.readme(record, "run_cpu").strip()


def test_readme_environments_match_the_committed_results():
    tried = json.loads((ROOT / "docs" / "environments.json").read_text())
    block = README.split(environments.BEGIN)[1].split(environments.END)[0]
    assert block.strip() == environments.table(tried).strip()


def test_counts_of_environments_match_pytests_report(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip()\n"
        "@pytest.fixture\ndef broken(): assert 0\ndef test_d(broken): pass\n"
    )
    report = tmp_path / "report.xml"
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_it.py"]
    subprocess.run(pytest_, cwd=tmp_path, capture_output=True)
    result = environments.outcomes(report)
    assert result == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["test_it::test_b", "test_it::test_d"]}
    tried = {"python": "3.10.1", "torch": "2.10.0", "date": "2026-01-01", "wheel": {"torch": "2.13.0", "loads": False}}
    assert "| 3.10.1 | 2.10.0 | 1 | **2** | 1 | torch 2.13.0: **does not load** |" in environments.table(
        [tried | result]
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_linked_files_exist(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        assert target.startswith("http") or (document.parent / target).exists(), target


#: Files that commands in the documents write.
WRITTEN = {"bench/results/run_gpu.json"}


def missing_paths(text: str) -> list[str]:
    """Returns the paths into the package and its sources that a text names and that do not exist."""
    named = re.findall(r"(?<![\w/])(?:fused_adaptive|csrc|tests|bench)/[\w/.*-]*[\w/*]", text)
    return [path for path in named if path not in WRITTEN and not any(ROOT.glob(path.rstrip("/")))]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.suffix == ".md"], ids=lambda p: p.name)
def test_named_paths_exist(document):
    assert missing_paths(document.read_text(encoding="utf-8")) == []


def test_missing_paths_are_noticed():
    text = "`tests/no_such_folder/`, `csrc/rules/*.rs`, `tests/docs/test_docs.py`, `bench/step/`, `build/bench/x`."
    assert missing_paths(text) == ["tests/no_such_folder/", "csrc/rules/*.rs"]


def test_every_pitfall_names_existing_tests():
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")))
    assert named <= set(re.findall(r"def (test_\w+)", tests))
    assert len(named) >= 19


@pytest.mark.parametrize(("name", "thing"), [(n, getattr(fa, n)) for n in fa.__all__ if callable(getattr(fa, n))])
def test_everything_public_is_documented(name, thing):
    assert thing.__doc__, name
    for attribute, value in vars(thing).items() if isinstance(thing, type) else ():
        if callable(value) and not attribute.startswith("_"):
            inherited = getattr(super(thing, thing), attribute, None)
            assert value.__doc__ or (inherited and inherited.__doc__), f"{name}.{attribute}"


SOURCES = [p for folder in ("fused_adaptive", "tests", "bench") for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_have_a_docstring(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 400
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "module docstring"


def test_triton_is_not_imported_by_the_package():
    package = ROOT / "fused_adaptive"
    files = [p for p in package.rglob("*.py") if not p.is_relative_to(package / "backends" / "triton")]
    code = [p.read_text(encoding="utf-8") for p in files]
    assert not any(re.search(r"^\s*(import|from) triton", text, re.MULTILINE) for text in code)
    assert len(code) > 50
