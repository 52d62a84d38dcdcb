"""Checks of the documentation: snippets run, tables match the results, links and paths exist."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_adaptive as fa
from bench.demo.report import markdown, rate_rows
from bench.experiments import defaults, increments
from bench.step import bars, report, results
from fused_adaptive.optimizers.adam import AdamWBackbone
from fused_adaptive.optimizers.sgd import SGDBackbone

from .. import environments

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    path for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".json")
)


def block(document: str, name: str) -> str:
    """Returns what stands between the marks of that name."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0].strip()


def test_the_demos_table_matches_the_committed_results():
    demo = json.loads((ROOT / "bench" / "results" / "demo.json").read_text())
    assert block("docs/quickstart.md", "demo") == markdown(rate_rows(demo)).strip()


@pytest.mark.parametrize(("name", "show"), [("increments", increments.table), ("defaults", defaults.summary)])
def test_tables_of_the_experiments_match_the_committed_results(name, show):
    found = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    assert block("docs/policies/active.md", name) == show(found).strip()


def test_the_default_increments_are_those_chosen_by_the_experiment():
    found = json.loads((ROOT / "bench" / "results" / "increments.json").read_text())
    for family, backbone in {"AdamW": AdamWBackbone(), "SGD": SGDBackbone()}.items():
        grid = [run for run in found["runs"] if (run["stage"], run["family"]) == ("grid", family)]
        choice = increments.chosen(increments.summary(increments.deficits(grid, family)))
        assert choice is not None
        assert (choice["increment"], choice["low"]) == (backbone.increment, backbone.low)


@pytest.mark.parametrize(("name", "mark"), [("run_cpu", "run"), ("run_gpu", "run_gpu")])
def test_benchmarks_match_the_committed_results(name, mark):
    record = results.load(ROOT / "bench" / "results" / f"{name}.json")
    assert block("docs/results.md", mark) == report.block(record, name).strip()


def test_readmes_performance_matches_the_committed_results():
    cpu, gpu = (results.load(ROOT / "bench" / "results" / f"run_{where}.json") for where in ("cpu", "gpu"))
    assert block("README.md", "performance") == bars.table(cpu, gpu).strip()


def test_environments_match_the_committed_results():
    tried = json.loads((ROOT / "docs" / "environments.json").read_text())
    assert block("docs/matrix.md", "environments") == environments.table(tried).strip()


def test_readme_is_short():
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("\n") <= 130


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


def without_math(text: str) -> str:
    return re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_linked_files_exist(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", without_math(document.read_text(encoding="utf-8"))):
        assert target.startswith("http") or (document.parent / target).exists(), target


#: Files that commands in the documents write.
WRITTEN = {"bench/results/run_gpu.json"}


def missing_paths(text: str) -> list[str]:
    """Returns the paths into the package and its sources that a text names and that do not exist."""
    named = re.findall(r"(?<![\w/])(?:fused_adaptive|csrc|tests|bench)/[\w/.*-]*[\w/*]", text)
    return [path for path in named if path not in WRITTEN and not any(ROOT.glob(path.rstrip("/")))]


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.suffix == ".md"], ids=lambda p: str(p.relative_to(ROOT))
)
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
