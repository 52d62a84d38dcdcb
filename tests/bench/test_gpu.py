"""The two scripts for a GPU machine, without a GPU and with stubbed commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import bandwidth
from bench.gpu import bench as gpu_bench
from bench.gpu import check as gpu_check
from bench.step import measure, results, run, sets
from bench.step.rivals import contenders

from .test_results import made_up

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["gpu_check.sh --built", "gpu_bench.sh 2"])
def test_the_scripts_say_that_there_is_no_gpu(script, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [str(ROOT / "bench" / script.split()[0]), *script.split()[1:]]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no GPU" in done.stdout
    assert not (tmp_path / "out").exists()


#: Code that simulates a bare GPU machine: packages that it lacks cannot be imported.
BARE = """
import importlib.abc, sys

class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ImportError(f"{name} is not on a bare GPU machine")

MISSING = {"rich", "matplotlib", "hypothesis", "mlxtend", "pytorch_optimizer", "optimi", "accelerate", "lightning"}
MISSING |= {"transformers", "setuptools", "scipy", "pandas", "sklearn", "xdist"}
sys.meta_path.insert(0, Bare())
"""


def test_scripts_need_no_packages_that_a_gpu_machine_lacks():
    files = [gpu_check.NATIVE, gpu_check.TRITON, gpu_check.GRAPHS, *gpu_check.OTHERS]
    modules = ", ".join(f"bench.{m}" for m in ("gpu.check", "gpu.bench", "gpu.bandwidth", "step.run", "step.report"))
    modules += ", bench.step.null_triton"
    collected = f"import pytest; sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *{files}]))"
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for code in (f"import {modules}", collected):
        command = [sys.executable, "-c", f"{BARE}\n{code}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture
def stubbed(monkeypatch):
    """Pretends that there is a GPU; commands are recorded and not run."""
    noted: list[gpu_check.Step] = []

    def run_none(step: gpu_check.Step, out: Path, left: float) -> dict[str, Any]:
        noted.append(step)
        if step.name.startswith("bench"):
            results.save(made_up(), Path(step.command[-1]))
        return {"outcome": "passed", "code": 0, "seconds": 1.0, "end": ""}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check, "describe", lambda *_: {"device": "a GPU"})
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.setenv("FUSED_ADAPTIVE_REQUIRE_EXT", "")
    for module in (gpu_check, gpu_bench):
        monkeypatch.setattr(module, "run", run_none)
    return noted


def test_the_check_runs_all_steps(stubbed, tmp_path):
    for options in ([], ["--built"]):
        stubbed.clear()
        assert gpu_check.main(["--out", str(tmp_path), *options]) == 0
        record = json.loads((tmp_path / "gpu_check.json").read_text())
        assert all(found["outcome"] == "passed" for found in record["steps"].values())
        names = [step.name for step in stubbed]
        assert names[:1] == ["build"] or options
        assert {"native", "triton", "graphs", "sync", "huge", "memcheck", "racecheck"} <= set(names[:-3])
        assert names[-3:] == ["timing", "bandwidth", "counters"]
    for step in stubbed:  # files are named, so that nothing else is collected
        if "pytest" in step.command:
            files = [argument for argument in step.command if argument.startswith("tests")]
            assert files
            assert all((ROOT / file).is_file() for file in files)


@pytest.mark.heavy
def test_each_gpu_test_is_in_one_step_of_the_check(tmp_path):
    """According to pytest's own selection. Sanitizers repeat some tests."""
    chosen: list[str] = []
    for step in gpu_check.together(tmp_path):
        if step.command[1:3] == ("-m", "pytest"):
            options = list(step.command[3:])
            if "-n" in options:
                del options[(at := options.index("-n")) : at + 2]
            found = collect(*(option for option in options if option != "-q"))
            assert found, step.name
            chosen += found
    every = collect("-m", "gpu", "tests", "--ignore", "tests/docs/test_matrix.py")
    assert sorted(chosen) == sorted(every)


def collect(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 5), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.parametrize("stopped_after", [0, 1])
def test_an_interrupted_check_keeps_its_results(stubbed, stopped_after, tmp_path, monkeypatch):
    run_none = gpu_check.run

    def run_some(*arguments: Any) -> dict[str, Any]:
        if len(stubbed) == stopped_after:
            raise KeyboardInterrupt
        return run_none(*arguments)

    monkeypatch.setattr(gpu_check, "run", run_some)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "gpu_check.json").read_text())["steps"]) == stopped_after


def test_the_benchmark_runs_all_steps(stubbed, tmp_path):
    for part in ("1", "2"):
        assert gpu_bench.main([part, "--out", str(tmp_path)]) == 0
        assert results.load(tmp_path / f"run_gpu_{part}.json")["cases"]
    assert [step.name for step in stubbed] == ["build", "bench_1", "build", "bench_2"]
    assert all(step.seconds <= 8 * 60 + 120 for step in stubbed)


def test_an_interrupted_benchmark_keeps_its_json(tmp_path, monkeypatch):
    def cut_off(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_case", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--device", "cpu", "--shapes", "20x1e3", "--parts", "cases", "--output", str(tmp_path / "run.json")])
    assert results.load(tmp_path / "run.json")["cases"] == []


def test_gpu_shapes_begin_with_the_most_important():
    cases = sets.default_set("cuda")
    first = [(case.shapes, str(case.dtype)) for case in cases[:8]]
    sizes = ("10x5M", "1e8", "gpt2", "resnet50")
    assert first == [(size, dtype) for size in sizes for dtype in ("torch.float32", "torch.bfloat16")]
    assert all(case.backbone == "AdamW" and case.policies == ("fixed", "active") for case in cases[:8])
    assert all("torch" in case.families and case.part == 1 for case in cases[:8])
    assert [(case.shapes, case.dtype) for case in cases if "compiled" in case.families] == [("1e8", torch.float32)]
    ours = contenders("AdamW", ("fixed",), ["native"], cases[4].families, torch.float32, torch.device("cuda"), 10)
    assert not any("compile" in contender.name for contender in ours)


def test_commands_of_the_scripts_have_valid_arguments(tmp_path):
    for command in (
        gpu_bench.command("2", 300, tmp_path),
        gpu_check.alone(tmp_path)[0].command,
    ):
        assert command[:3] == (sys.executable, "-m", "bench.step.run")
        assert run.arguments_of(command[3:]).device == "cuda"


class Clock:
    """Time of the host, and of a device that is idle until something is launched, in seconds."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds


def test_device_time_excludes_host_time(monkeypatch):
    """Also for bandwidths: the device is busy until everything is launched."""
    clock = Clock()

    class Event:
        at = 0.0

        def record(self) -> None:
            self.at = max(clock.device, clock.host)

        def synchronize(self) -> None:
            clock.host = max(clock.host, self.at)

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    def step() -> None:
        clock.host += 0.001  # the host prepares the step
        clock.launch(0.003)

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: clock.launch(cycles / 2e9))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: setattr(clock, "host", max(clock.host, clock.device)))
    assert measure.device_seconds(step) == pytest.approx(0.003)
    monkeypatch.setattr(bandwidth.torch, "randn", lambda n, device: torch.zeros(n))
    array = SimpleNamespace(numel=lambda: 1000, copy_=lambda other: clock.launch(0.001))
    monkeypatch.setattr(bandwidth.torch, "empty", lambda n, dtype, device: array)
    optimizer = SimpleNamespace(step=step)
    monkeypatch.setitem(bandwidth.OPTIMIZERS, "stub", (lambda *_, **__: optimizer, 28))
    found = bandwidth.measure("stub", "native", torch.float32, 1000, 3)
    assert found["step_ms"] == pytest.approx([3.0] * 3)


def test_a_step_of_the_check_reports_its_outcome(tmp_path):
    def outcome(code: str, seconds: int = 60, left: float = 60) -> dict:
        return gpu_check.run(gpu_check.Step("x", (sys.executable, "-c", code), seconds), tmp_path, left)

    assert outcome("print('3 passed, 1 skipped in 2s')")["counts"] == {"passed": 3, "skipped": 1}
    assert outcome("raise SystemExit(2)")["outcome"] == "failed"
    assert outcome("import time; time.sleep(60)", seconds=6)["outcome"] == "timed out"
    assert outcome("", left=1)["outcome"] == "not run"
    missing = gpu_check.run(gpu_check.Step("x", ("/nonexistent",), 60), tmp_path, 60)
    assert missing["outcome"] == "not run"


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.test_graphs" name="test_masters[native-active-split]"/>
<testcase classname="tests.gpu.test_graphs" name="test_masters[native-fixed-split]"><failure message="no"/></testcase>
<testcase classname="tests.gpu.test_graphs" name="test_masters[triton-fixed-split]"><skipped message="no"/></testcase>
<testcase classname="tests.gpu.test_parity" name="test_ten[AdamW-active]"/>
<testcase time="0.1"/>
</testsuite></testsuites>"""


def test_outcomes_are_counted_by_test_and_backend(tmp_path):
    (tmp_path / "native.xml").write_text(JUNIT)
    assert gpu_check.outcomes_of(tmp_path / "native.xml") == {
        "tests/gpu/test_graphs.py::test_masters[native]": {"passed": 1, "failure": 1},
        "tests/gpu/test_graphs.py::test_masters[triton]": {"skipped": 1},
        "tests/gpu/test_parity.py::test_ten": {"passed": 1},
    }
