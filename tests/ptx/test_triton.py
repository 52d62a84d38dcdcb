"""Triton's compiled kernels: their PTX, run on the CPU, gives the bits of the native CPU kernels.

Launches, specialisations and the compiler are those of a GPU; the driver is replaced. Tests run in separate processes.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ..common.cases import needs_native
from ..cuda_emulation import build
from ..triton_backend.interpreter import MISSING, ROOT
from .compile import CACHE

COMPILER = "" if build.compiler() else "no C++ compiler"
pytestmark = [needs_native, *(pytest.mark.skipif(reason != "", reason=reason) for reason in (MISSING, COMPILER))]


def run_tests(*arguments: str) -> None:
    """Runs pytest with these arguments, with Triton's kernels as PTX on the CPU, and fails if it fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.ptx.triton_driver", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(CACHE / "triton_cache")
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


CASES = "tests/ptx/triton_cases.py"


def test_some_kernels():
    run_tests(CASES, "-k", "test_some")


@pytest.mark.heavy
def test_mistakes_are_noticed():
    run_tests(CASES, "-k", "noticed or is_of_a_part")


@pytest.mark.feature("every optimizer, policy, decay and dtype within rounding of float64", backend="triton", ptx=True)
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("part", "optimizers"), [("momentum", "SGD"), ("moments", "Ada and not AdaBelief"), ("variances", "AdaBelief")]
)
def test_every_kernel_equals_the_native_kernels_bit_for_bit(part, optimizers):
    run_tests(CASES, "-k", f"test_matrix and ({optimizers}) or by_hand or test_every_variant_of and {part}")


@pytest.mark.feature("channels_last, strided and misaligned tensors", backend="triton", ptx=True)
@pytest.mark.feature("end_interval() by hand", backend="triton", ptx=True)
@pytest.mark.feature("GradScaler, with and without fused=True", backend="triton", ptx=True)
@pytest.mark.heavy
def test_kernel_cases_of_the_interpreter():
    """Runs the interpreter's tests, except those that break Triton's functions or call them directly."""
    others = ("matrix", "broken", "noticed", "powers", "nothing_is_launched", "end_interval", "large_odd")
    run_tests("tests/triton_backend/kernel_cases.py", "-k", " and ".join(f"not {name}" for name in others))
