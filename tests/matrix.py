"""Makes the table of features and backends from the outcomes of the tests.

A marker says which feature a test covers::

    @pytest.mark.feature("closures")                       # each backend that runs here, by FUSED_ADAPTIVE_BACKEND
    @pytest.mark.feature("empty tensors", backend="reference")
    @pytest.mark.feature("parity", backend="native-cuda", emulated=True)  # the kernels' source, executed on the CPU
    @pytest.mark.feature("parity", backend="native-cuda", ptx=True)       # their PTX, executed on the CPU

A test with a parameter ``backend`` needs no ``backend=``; with the marker ``gpu``, "native" is "native-cuda". Then::

    python -m tests.matrix                # runs the marked tests, writes docs/matrix.json and the table in matrix.md
    python -m tests.matrix tests/training …   # runs the marked tests of these files; keeps the other results
    python -m tests.matrix --only PART …  # runs the tests of features whose names contain one of these
    python -m tests.matrix --table        # only writes the table, from the existing results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
RESULTS, DOCUMENT = ROOT / "docs" / "matrix.json", ROOT / "docs" / "matrix.md"
#: What has run on a GPU, from ``bench/gpu_check.sh``.
ON_GPU = ROOT / "bench" / "results" / "gpu_checks.json"
BEGIN, END = "<!-- matrix:begin -->", "<!-- matrix:end -->"

#: The columns. A column without tests is left out.
BACKENDS = {
    "reference": "reference",
    "native": "native, CPU",
    "native-cuda": "native, CUDA",
    "triton": "Triton",
}
#: The order of the rows. Features that are not named here follow.
ORDER = (
    "every optimizer, policy, decay and dtype within rounding of float64",
    "golden trajectories in float64",
    "mixed dtypes; state that loading does not cast",
    "channels_last, strided and misaligned tensors",
    "empty tensors",
    "intermittent gradients, groups and policies that change",
    "parameters that come and go",
    "add_param_group in the middle",
    "10 000 tensors",
    "100 param groups",
    "a tensor of more than 2³¹ elements",
    "the same bits with any number of threads, any grid",
    "the same bits on AVX-512, AVX2 and neither",
    "no copy of the parameters in a step",
    "no host synchronisation in step()",
    "a captured CUDA graph, through interval ends",
    "GradScaler, with and without fused=True",
    "max_grad_norm= and skip_nonfinite=, inside of the step",
    "exact float32 masters of bfloat16 parameters",
    "stochastic rounding of bfloat16 parameters",
    "torch.compile(fullgraph=True), no recompiles with a tensor lr",
    "DDP, FSDP2, tensor parallelism, mixed meshes",
    "maximize",
    "closures",
    "hooks of step() and state_dict()",
    "named parameters",
    "every torch.optim.lr_scheduler, with an adapting policy",
    "end_interval() by hand",
    "bad gradients are refused before anything changes",
    "checkpoints resume bit for bit, anywhere in an interval",
    "checkpoints of torch.optim go on, bit for bit",
    "torch.distributed.checkpoint, one process",
    "torch.distributed.checkpoint, 4 ranks to 4, 2 and 1",
    "kill -9, and on from the last checkpoint, bit for bit",
    "gradient release: step in backward",
    "log_learning_rates: one transfer an interval",
    "Hugging Face Trainer",
    "Accelerate",
    "Lightning Trainer",
)

#: Tests of one file that cover features of the CUDA kernels. They execute the kernels' source on the CPU.
EMULATED = {
    "test_every_kernel_is_within_rounding_of_the_float64_reference": ORDER[0],
    "test_float64_trajectories_equal_those_of_the_reference": ORDER[1],
    "test_amp_maximize_and_draws": "GradScaler, with and without fused=True",
    "test_the_same_bits_with_any_grid_and_order": "the same bits with any number of threads, any grid",
    "test_elements_beyond_2_to_the_31": "a tensor of more than 2³¹ elements",
    "test_intervals_ended_by_hand_and_restarted": "end_interval() by hand",
}

#: A run on a GPU, and what replaces it, nearest first: the kernels' PTX, or their source, executed on the CPU.
GPU, INSTEAD = "GPU", ("PTX", "emulated")

Features = dict[str, dict[str, dict[str, Any]]]


# ---- plugin: records markers and outcomes ----


class Recorder:
    """Collects the outcomes of marked tests, by feature and backend."""

    def __init__(self, config: pytest.Config) -> None:
        self.path, self.only = config.getoption("--matrix"), config.getoption("--matrix-only") or [""]
        self.auto_only = config.getoption("--matrix-auto")
        self.features: Features = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen, others = [], []
        for item in items:
            marks = [mark for mark in features_of(item) if any(part in mark["feature"] for part in self.only)]
            if self.auto_only:
                marks = [mark for mark in marks if mark["auto"]]
            item.user_properties.extend(("feature", mark) for mark in marks)
            (chosen if marks else others).append(item)
        config.hook.pytest_deselected(items=others)
        items[:] = chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        for mark in [value for name, value in report.user_properties if name == "feature"]:
            self.count(mark, report)  # type: ignore[arg-type]

    def count(self, mark: dict[str, Any], report: pytest.TestReport) -> None:
        cell = self.features.setdefault(mark["feature"], {}).setdefault(mark["backend"], {"tests": {}})
        outcome = report.outcome
        if outcome == "passed" and mark["instead"]:
            outcome = mark["instead"]
        if outcome == "skipped" and isinstance(report.longrepr, tuple):
            cell["reason"] = str(report.longrepr[2]).removeprefix("Skipped: ")
        outcomes = cell["tests"].setdefault(report.nodeid.split("[")[0], {})
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            Path(self.path).write_text(json.dumps(self.features))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", help="where the outcomes of marked tests go")
    parser.addoption("--matrix-only", action="append", help="features whose names contain one of these")
    parser.addoption("--matrix-auto", action="store_true", help="those that run on the backend that is chosen outside")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--matrix"):
        config.pluginmanager.register(Recorder(config), "matrix-recorder")


def features_of(item: pytest.Item) -> list[dict[str, Any]]:
    """Returns the arguments of a test's markers, with its backend filled in."""
    from fused_adaptive import backends

    found = []
    marks = list(item.iter_markers("feature"))
    if item.path.parent.name == "cuda_emulation" and getattr(item, "originalname", "") in EMULATED:
        feature = EMULATED[getattr(item, "originalname", "")]
        marks.append(pytest.mark.feature(feature, backend="native-cuda", emulated=True).mark)
    for mark in marks:
        arguments = {**dict(zip(("feature", "backend", "emulated", "ptx"), mark.args, strict=False)), **mark.kwargs}
        parameter = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
        backend = arguments.get("backend") or parameter
        auto = backend is None
        backend = backends.select("auto", ()).name if auto else backend
        if backend == "native" and item.get_closest_marker("gpu"):
            backend = "native-cuda"
        # Triton's kernels run in its interpreter if there is no GPU.
        emulated = arguments.get("emulated") or (backend == "triton" and not item.get_closest_marker("gpu"))
        instead = "PTX" if arguments.get("ptx") else "emulated" if emulated else ""
        found.append({"feature": arguments["feature"], "backend": backend, "instead": instead, "auto": auto})
    return found


# ---- command ----


def run(files: list[str], only: list[str]) -> dict[str, Any]:
    """Runs the marked tests, again for each further backend, and returns the results."""
    import torch

    from fused_adaptive import backends

    names = [name for name, why_not in backends.available(["cpu"]).items() if not why_not]
    features: Features = {}
    for i, name in enumerate(names):
        file = ROOT / "build" / f"matrix_{name}.json"
        file.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.matrix", "-p", "no:cacheprovider"]
        command += ["--matrix", str(file), *(f"--matrix-only={part}" for part in only)]
        command += [*files, *(["--matrix-auto"] if i else [])]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, backends.ENVIRONMENT_VARIABLE: name})
        if done.returncode not in (0, 1, 5):
            raise SystemExit(f"pytest ended with {done.returncode}")
        for feature, cells in json.loads(file.read_text()).items():
            for backend, cell in cells.items():
                merge(features.setdefault(feature, {}).setdefault(backend, {"tests": {}}), cell)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    where = {"torch": torch.__version__, "python": platform.python_version(), "gpu": gpu}
    return {"where": where, "features": features}


def merge(into: dict[str, Any], cell: dict[str, Any]) -> None:
    if "reason" in cell:
        into["reason"] = cell["reason"]
    for test, outcomes in cell["tests"].items():
        own = into["tests"].setdefault(test, {})
        for outcome, number in outcomes.items():
            own[outcome] = own.get(outcome, 0) + number


def with_gpu(features: Features, runs: list[dict[str, Any]]) -> Features:
    """Returns a copy with the outcomes of tests that have run on a GPU. ``runs``: those of a test's last run count."""
    copy = deepcopy(features)
    last = {test: outcomes for run in runs for test, outcomes in run["tests"].items()}
    for of_feature in copy.values():
        for backend, cell in of_feature.items():
            word = backend.partition("-")[0]
            for test, own in cell["tests"].items():
                for outcome, number in {**last.get(test, {}), **last.get(f"{test}[{word}]", {})}.items():
                    own[GPU if outcome == "passed" else outcome] = number
    return copy


def verdict(cell: dict[str, Any] | None) -> str:
    """Returns the text of a cell of the table."""
    if cell is None:
        return "–"
    outcomes = list(cell["tests"].values())
    seen = {outcome for own in outcomes for outcome in own}
    if seen & {"failed", "failure", "error"}:
        return "**fails**"
    if "passed" in seen:
        return "yes"
    for word in (GPU, *INSTEAD):
        if word in seen:
            return word
    return "no GPU: not run" if "no GPU" in cell.get("reason", "") else "not run"


def table(results: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    runs = json.loads(ON_GPU.read_text())["runs"]
    features = with_gpu(results["features"], runs)
    columns = [name for name in BACKENDS if any(name in cells for cells in features.values())]
    lines = ["| | " + " | ".join(BACKENDS[name] for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    known = [name for name in ORDER if name in features]
    for feature in known + sorted(set(features) - set(known)):
        cells = [verdict(features[feature].get(name)) for name in columns]
        lines.append(f"| {feature} | " + " | ".join(cells) + " |")
    where, on_gpu = results["where"], runs[-1]["machine"]
    here = f"torch {where['torch']}, Python {where['python']}, {where['gpu'] or 'no GPU'}"
    there = f"{on_gpu['device']}, torch {on_gpu['torch']}, where not all of a row's cases have run"
    lines += ["", f"From {count(results['features'])} tests; {here}. {GPU}: {there}."]
    return "\n".join(lines)


def count(features: Features) -> int:
    """Returns the number of tests that ran, with all their parameters."""
    cells = [cell for of_feature in features.values() for cell in of_feature.values()]
    return sum(n for cell in cells for own in cell["tests"].values() for o, n in own.items() if o != "skipped")


def write_table(results: dict[str, Any]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"where": {}, "features": {}}
    if not arguments.table:
        new = run(arguments.files, arguments.only)
        features = results["features"] if arguments.files or arguments.only else {}
        for feature, cells in new["features"].items():
            for backend, cell in cells.items():
                kept = features.setdefault(feature, {}).setdefault(backend, {"tests": {}})
                others = kept["tests"] if arguments.files else {}  # all of its tests have run
                kept.update({**cell, "tests": {**others, **cell["tests"]}})
        results = {"where": new["where"], "features": features}
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    write_table(results)


if __name__ == "__main__":
    main()
