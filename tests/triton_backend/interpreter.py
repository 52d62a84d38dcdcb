"""Tests on Triton's interpreter, in a process of their own: ``run_tests``, and the plugin that they load.

``TRITON_INTERPRET=1 python -m pytest -p tests.triton_interpreter …`` lets every test that takes a backend meet the
Triton one too. The variable decides when Triton is imported, so a process interprets or compiles, never both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[2]

#: Why there are none here; "" if there are.
MISSING = "" if find_spec("triton") else "Triton is not installed"


def run_tests(*arguments: str) -> None:
    """Runs pytest with these arguments there, and fails as it does, or if nothing was run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "tests.triton_backend.interpreter",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-W", "ignore:Conversion of an array:DeprecationWarning"]  # Triton 3.6's; numpy 2.4 refuses it
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def pytest_configure() -> None:
    from fused_adaptive.backends import triton

    from ..common import recording

    assert triton.is_interpreted()
    recording.emulated["triton"] = True
    patch_once()


def patch_once() -> None:
    """Triton's interpreter patches its language before each call of a function, for good: half of all the time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, languages, functions, nothing = interpreter._patch_lang, set(), set(), SimpleNamespace(restore=lambda: None)

    def patch_if_new(function: Any) -> SimpleNamespace:
        if function not in functions:
            functions.add(function)
            seen = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
            if seen not in languages:
                languages.add(seen)
                patch(function)
        return nothing

    interpreter._patch_lang = patch_if_new
