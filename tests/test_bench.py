"""The benchmark runs, and what it times ours against computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_adaptive as fa
from bench import gpu_check, run
from bench.rivals import ForeachActiveAdamW

from .cases import KERNELS, Gradients, parameters


def test_the_foreach_composition_is_active_adamw():
    params, copies = parameters(torch.float64), parameters(torch.float64)
    ours = fa.ActiveAdamW(params, lr=0.1, weight_decay=3.0, interval=3, backend="reference")
    theirs = ForeachActiveAdamW(copies, lr=0.1, weight_decay=3.0, interval=3)
    for step in range(10):
        Gradients().set(params, step)
        Gradients().set(copies, step)
        ours.step()
        theirs.step()
        for p, q in zip(params, copies, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert len(set(ours.state[params[0]]["element_gain"].tolist())) > 1


@pytest.mark.skipif("native" not in KERNELS, reason="the native library is not built")
def test_the_benchmark_runs_and_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "results.json"
    assert run.main(["--scale", "0.0005", "--samples", "3", "--threads", "1", "--output", str(output)]) == 0
    printed, results = capsys.readouterr().out, json.loads(output.read_text())
    assert "AdamW / torch AdamW fused" in printed
    assert [r["shapes"] for r in results["results"]] == list(run.SHAPES)
    assert all(len(samples) == 3 for r in results["results"] for samples in r["seconds"].values())
    assert results["machine"]["torch"] == torch.__version__
    for r in results["results"]:
        assert r["ratios"] == run.ratios(r["seconds"], r["shapes"])


def test_the_gpu_check_says_that_there_is_no_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    script = Path(__file__).parent.parent / "bench" / "gpu_check.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert gpu_check.NO_GPU in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_step_of_the_gpu_check_says_how_it_ended(tmp_path):
    def outcome(code: str, seconds: int = 60, left: float = 60) -> dict:
        return gpu_check.run(gpu_check.Step("x", (sys.executable, "-c", code), seconds), tmp_path, left)

    assert outcome("print('3 passed, 1 skipped in 2s')")["counts"] == {"passed": 3, "skipped": 1}
    assert outcome("raise SystemExit(2)")["outcome"] == "failed"
    assert outcome("import time; time.sleep(60)", seconds=6)["outcome"] == "timed out"
    assert outcome("", left=1)["outcome"] == "not run"
    missing = gpu_check.run(gpu_check.Step("x", ("/nonexistent",), 60), tmp_path, 60)
    assert missing["outcome"] == "not run"
    assert {step.name for step in gpu_check.steps(tmp_path)} >= {
        *("build", "tests", "triton", "timing", "bandwidth", "memcheck", "racecheck")
    }
