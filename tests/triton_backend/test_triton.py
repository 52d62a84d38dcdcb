"""The Triton backend without a GPU: selection and reasons in this process, interpreted kernels in others."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive import __main__, backends
from fused_adaptive.backends import triton

from ..common.cases import needs_native, parameters
from .interpreter import MISSING, ROOT, run_tests

needs_triton = pytest.mark.skipif(MISSING != "", reason=MISSING)

# ---- selection ----


def test_auto_never_interprets(monkeypatch):
    monkeypatch.setattr(triton, "version", lambda _: "3.7.1")
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert backends.select("auto", [torch.device("cpu")]).name != "triton"
        assert (fa.backends.available(["cpu"])["triton"] == "") == (value == "1")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="not for the CPU; with TRITON_INTERPRET=1 in the environment"):
        fa.AdamW(parameters(), backend="triton")
    assert "triton        cannot run: there are Triton kernels for GPUs" in __main__.report()


def test_auto_selects_triton_on_a_gpu_without_a_native_library(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "version", lambda _: "3.6.0")
    monkeypatch.setattr(triton.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    native = SimpleNamespace(name="native", why_not=lambda _: "not built")
    load = backends._load
    monkeypatch.setattr(backends, "_load", lambda name: native if name == "native" else load(name))
    cuda = [torch.device("cuda", 0)]
    assert backends.select("auto", cuda).name == "triton"
    native.why_not = lambda _: ""
    assert backends.select("auto", cuda).name == "native"


def test_reasons_why_triton_cannot_run(monkeypatch):
    def missing(_):
        raise triton.PackageNotFoundError

    cuda = [torch.device("cuda", 0)]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(triton, "version", missing)
    assert "not installed: pip install" in triton.why_not(cuda)
    monkeypatch.setattr(triton, "version", lambda _: "3.5.1")
    assert "3.6 or later is needed, and 3.5.1 is installed" in triton.why_not(cuda)
    monkeypatch.setattr(triton, "version", lambda _: "3.10.0")
    monkeypatch.setattr(triton.shutil, "which", lambda _: None)
    monkeypatch.delenv("CC", raising=False)
    assert "C compiler" in triton.why_not(cuda)
    monkeypatch.setenv("CC", "cc")
    assert "compute capability 8.0" in triton.why_not(cuda)
    assert "not for xpu" in triton.why_not([torch.device("xpu")])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in triton.why_not(cuda)


LAZY = """
import sys
import fused_adaptive as fa, torch

def loaded(name):
    return [module for module in sys.modules if module == name or module.startswith(name + ".")]

fa.backends.available()
assert not loaded("triton")
p = torch.ones(3, requires_grad=True)
p.grad = torch.ones(3)
fa.AdamW([p]).step()  # torch's own compiler, which this imports, may import Triton
assert not loaded("fused_adaptive.backends.triton.launch")
"""


def test_triton_is_imported_only_when_it_is_used():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", LAZY], cwd=ROOT, check=True, env=environment)


# ---- kernels, interpreted ----

CASES = "tests/triton_backend/kernel_cases.py"


@needs_triton
def test_a_part_of_the_matrix_and_broken_variants():
    run_tests(CASES, "-m", "not heavy", "-k", "matrix or broken or noticed")


@pytest.mark.feature("channels_last, strided and misaligned tensors", backend="triton")
@pytest.mark.feature("end_interval() by hand", backend="triton")
@pytest.mark.feature("GradScaler, with and without fused=True", backend="triton")
@pytest.mark.feature("bad gradients are refused before anything changes", backend="triton")
@needs_triton
def test_counts_plans_and_errors():
    run_tests(CASES, "-m", "not heavy", "-k", "not matrix and not broken and not noticed")


@needs_triton
def test_counters_draws_and_tensors_of_two_threads():
    run_tests("tests/triton_backend/order.py", "-k", "two_threads or counters or drawing")


@needs_triton
@pytest.mark.heavy
def test_kernels_have_no_races():
    chosen = "fixed or active-increment or tlr-times-active or hypergradient-tensor or other_dtypes"
    run_tests("tests/triton_backend/order.py", "-k", f"{chosen} or noticed or hypergradient_reads")


@needs_triton
@pytest.mark.heavy
def test_the_first_momentum():
    run_tests("tests/engine/test_first_momentum.py", "-k", "triton and not inductor")


GRAPHS = "tests/gpu/test_graphs.py"


@needs_triton
def test_captured_steps():
    in_turn = "in_turn and AdamW and (fixed or tlr-times-active)"
    run_tests(GRAPHS, "-k", f"triton and (({in_turn}) or points_to or tables_of or says_so or (draw and fixed))")


@pytest.mark.feature("a captured CUDA graph, through interval ends", backend="triton", emulated=True)
@needs_triton
@pytest.mark.heavy
def test_captured_steps_of_every_policy():
    run_tests(GRAPHS, "-m", "not heavy", "-k", "triton and (interval_ends or masters or memory)")


@needs_triton
@needs_native
@pytest.mark.heavy
def test_large_tensors():
    """The rest of the matrix runs as PTX, with native's bits (tests/ptx/test_triton.py), and on a GPU."""
    run_tests(CASES, "-m", "heavy", "-k", "large")


@pytest.mark.feature("golden trajectories in float64", backend="triton")
@needs_triton
@pytest.mark.heavy
def test_golden_trajectories():
    """Trajectories with missing and nonfinite gradients, and with an lr of 0: float64, to 1e-12."""
    chosen = "missing or nonfinite or warmup"
    run_tests("tests/golden/test_golden.py", "-k", f"trajectory and triton and ({chosen})")
