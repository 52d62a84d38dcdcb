"""``python -m fused_adaptive``: one screen to paste into a bug report, and the same as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive import __main__ as report


def output(*arguments: str) -> str:
    command = [sys.executable, "-m", "fused_adaptive", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_json_has_what_the_screen_says():
    found = json.loads(output("--json"))
    assert found["fused_adaptive"] == fa.__version__
    assert found["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert list(found["backends"]) == list(fa.backends.NAMES)
    assert found["backends"]["reference"] == ""
    assert found["auto"]["cpu"] in report.report()
    assert bool(found["cuda"]["devices"]) != bool(found["cuda"]["why_not"])
    if not found["library"]["why_not"]:
        assert found["cpu"]["kernels"] in ("baseline", "v3", "v4")
        assert f", kernels for {found['cpu']['kernels']}" in report.report()


def test_it_is_one_screen():
    lines = output().splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= report.WIDTH


def test_environment_variables_that_matter_are_shown_and_no_others(monkeypatch):
    monkeypatch.setenv("FUSED_ADAPTIVE_CPU", "v3")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MY_TOKEN", "secret")
    shown = report.information()["environment"]
    assert (shown["FUSED_ADAPTIVE_CPU"], shown["OMP_NUM_THREADS"]) == ("v3", "7")
    assert "MY_TOKEN" not in shown
    assert "  OMP_NUM_THREADS 7\n" in report.report() + "\n"
    assert "secret" not in report.report()


def test_long_reasons_go_on_in_the_column_of_the_first_line(monkeypatch):
    reason = "because " * 30
    monkeypatch.setattr(fa.backends, "available", lambda: {"native": reason.strip()})
    lines = report.report().splitlines()
    (first,) = (i for i, line in enumerate(lines) if line.startswith("  native "))
    assert lines[first].startswith("  native        cannot run: because because")
    assert lines[first + 1].startswith(" " * 16 + "because")


@pytest.mark.parametrize(("built", "said"), [(None, "is a CPU build"), ("13.0", "torch finds no GPU")])
def test_why_there_is_no_gpu(monkeypatch, built, said):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert said in report.information()["cuda"]["why_not"]
    assert f"cuda            none: {report.information()['cuda']['why_not']}" in report.report()


def test_gpus_are_named(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "A GPU", 9, 0, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(fa.backends, "available", dict)
    monkeypatch.setattr(report, "_chosen", lambda device: "native")
    assert "cuda:0          A GPU, compute capability 9.0, 80 GiB\n" in report.report()


WITHOUT_KERNELS = """
import runpy
from fused_adaptive.core import library
library.why_not = lambda: "it was not built, says …"
runpy.run_module("fused_adaptive", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_missing_kernels_are_reported_without_a_warning_and_in_any_encoding(arguments):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "CC": "/naïve/gcc"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", WITHOUT_KERNELS, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "it was not built, says" in run.stdout


def test_the_report_is_ascii_where_the_machine_is():
    command = [sys.executable, "-m", "fused_adaptive"]
    environment = {name: value for name, value in os.environ.items() if value.isascii()}
    run = subprocess.run(command, capture_output=True, env={**environment, "PYTHONIOENCODING": "ascii"}, check=True)
    assert b"backend=..., or the environment variable" in run.stdout
