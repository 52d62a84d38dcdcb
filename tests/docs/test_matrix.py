"""The table of docs/matrix.md matches docs/matrix.json, which matches the markers of the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .. import matrix
from ..cuda_emulation import test_backend

TESTS = Path(__file__).parents[1]
MARKER = re.compile(r"mark\.feature\(\s*\"([^\"]+)\"")
AGAIN = "run `python -m tests.matrix`, or with `--only`"


of_suites = {feature for features in test_backend.FEATURES.values() for feature in features}


def results() -> dict:
    return json.loads(matrix.RESULTS.read_text())


def test_the_table_matches_the_results():
    block = matrix.DOCUMENT.read_text(encoding="utf-8").split(matrix.BEGIN)[1].split(matrix.END)[0]
    assert block.strip() == matrix.table(results()).strip(), "run `python -m tests.matrix --table`"


def test_marked_features_equal_those_of_the_results():
    marked = {name for path in TESTS.rglob("test_*.py") for name in MARKER.findall(path.read_text(encoding="utf-8"))}
    features = set(results()["features"])
    assert features == marked - {"a feature", "another"}, AGAIN
    assert set(matrix.ORDER) | set(matrix.EMULATED.values()) | of_suites <= features


def test_every_test_of_the_results_exists():
    cells = [cell for feature in results()["features"].values() for cell in feature.values()]
    tests = {test for cell in cells for test in cell["tests"]}
    assert len(tests) > 30
    for test in tests:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (matrix.ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), AGAIN


def test_no_feature_fails():
    assert "**fails**" not in matrix.table(results())


def test_text_of_a_cell():
    def says(*outcomes: str, reason: str = "") -> str:
        return matrix.verdict(
            {"tests": {f"test {i}": {outcome: 1} for i, outcome in enumerate(outcomes)}, "reason": reason}
        )

    assert matrix.verdict(None) == "–"
    assert says("passed", "skipped", reason="no GPU") == "yes"
    assert says("emulated", "skipped", reason="no GPU") == "emulated"
    assert says("emulated", "PTX", "skipped", reason="no GPU") == "PTX"
    assert says("emulated", "PTX", "passed") == "yes"
    assert says("failed", "PTX") == "**fails**"
    assert says("skipped", reason="no GPU") == "no GPU: not run"
    assert says("skipped", reason="needs 16 GB") == "not run"
    assert says("passed", "failed") == "**fails**"
    assert says("PTX", "GPU") == "GPU"
    assert says("GPU", "failure") == "**fails**"


def test_the_last_run_on_a_gpu_counts():
    def cell(**outcomes: int) -> dict:
        return {"tests": {"a.py::test_graph": outcomes}}

    features = {"graphs": {"native-cuda": cell(emulated=2), "triton": cell(emulated=2), "reference": cell(passed=1)}}
    names = [f"a.py::test_graph[{backend}]" for backend in ("native", "triton")]
    runs = [{"tests": {names[0]: {"failure": 1, "passed": 1}}}, {"tests": {names[0]: {"passed": 2}}}]
    found = matrix.with_gpu(features, runs)["graphs"]
    assert {b: matrix.verdict(c) for b, c in found.items()} == {
        "native-cuda": "GPU",
        "triton": "emulated",
        "reference": "yes",
    }
    assert matrix.verdict(matrix.with_gpu(features, runs[:1])["graphs"]["native-cuda"]) == "**fails**"
    assert features["graphs"]["native-cuda"] == cell(emulated=2)


SAMPLE = """
import pytest

@pytest.mark.feature("a feature")
def test_on_whatever_is_chosen():
    pass

@pytest.mark.feature("a feature")
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_on_two(backend):
    assert backend == "reference"

@pytest.mark.gpu
@pytest.mark.feature("another", backend="native")
def test_on_a_gpu():
    pytest.skip("no GPU")

@pytest.mark.feature("another", backend="native-cuda", emulated=True)
def test_emulated():
    pass

@pytest.mark.feature("another", backend="triton", ptx=True)
def test_of_a_compiler():
    pass

def test_of_no_feature():
    pass
"""


def test_outcomes_are_recorded(tmp_path):
    """Runs pytest in a separate process, as the command does."""
    import os
    import subprocess
    import sys

    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n feature\n gpu\n")
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.matrix", "--matrix", str(file), str(tmp_path)]
    environment = {**os.environ, "FUSED_ADAPTIVE_BACKEND": "reference", "PYTHONPATH": str(matrix.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    features = json.loads(file.read_text())
    verdicts = {name: {b: matrix.verdict(c) for b, c in cells.items()} for name, cells in features.items()}
    assert verdicts == {
        "a feature": {"reference": "yes", "native": "**fails**"},
        "another": {"native-cuda": "emulated", "triton": "PTX"},
    }
    assert features["a feature"]["reference"]["tests"] == {
        "test_sample.py::test_on_whatever_is_chosen": {"passed": 1},
        "test_sample.py::test_on_two": {"passed": 1},
    }
