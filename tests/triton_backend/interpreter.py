"""Runs tests on Triton's interpreter in a separate process: ``run_tests``, and the plugin that it loads.

``TRITON_INTERPRET=1 python -m pytest -p tests.triton_backend.interpreter …`` includes the Triton backend in all tests
with a backend. Triton reads the variable at import, so a process either interprets or compiles.
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

#: Why Triton is missing; "" if it is installed.
MISSING = "" if find_spec("triton") else "Triton is not installed"


def run_tests(*arguments: str) -> None:
    """Runs pytest with these arguments in a process that interprets, and fails if it fails or runs no test."""
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
    patch_masks()


def patch_once() -> None:
    """Patches Triton's language once. The interpreter patches it before each call, which takes half of the time."""
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


def patch_masks() -> None:
    """Converts masks to bool: Triton 3.9's interpreter takes no other, but gives a comparison its operands' dtype."""
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def as_bool(mask: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return mask

    builder.create_masked_load = lambda self, at, mask, *rest: load(self, at, as_bool(mask), *rest)
    builder.create_masked_store = lambda self, at, values, mask, *rest: store(self, at, values, as_bool(mask), *rest)
