"""Loads the native library, ``_C.abi3.so``, on first use, and explains why it cannot be loaded.

``setup.py`` records in ``_build.json`` what it built and what it left out. The library uses only torch's stable ABI, so
one build works with torch 2.10 and later. Importing this module never fails: problems of the library are reported as a
message with a remedy.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from . import declarations, version

#: Folder of the library and of its build record.
FOLDER = Path(__file__).parents[1]

#: Whether Python has no interpreter lock. It then has no stable ABI either, which one library for all versions needs.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX') if FREE_THREADED else '.abi3.so'}"

REBUILD = (
    "rebuild it where the sources are, with `make build` or "
    "`pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .`"
)

_reason: str | None = None  # None: loading has not been tried


def load() -> None:
    """Loads the library once, which registers its operators in ``torch.ops.fused_adaptive``.

    Raises:
        RuntimeError: with the message of :func:`why_not`, if it cannot be loaded.
    """
    if reason := why_not():
        raise RuntimeError(reason)


def why_not() -> str:
    """Returns "" if the library is loaded, else the reason and the remedy. The first call tries to load it."""
    global _reason
    if _reason is None:
        _reason = _try_to_load()
    return _reason


def has_cuda() -> bool:
    """Returns whether the library is loaded and has CUDA kernels."""
    return not why_not() and bool(built().get("cuda"))


def built() -> dict[str, Any]:
    """Returns the record of the build; empty if nothing was built, as in a checkout that was never installed.

    ``cpu``: whether there is a library; ``cuda``: architectures of its CUDA kernels, or None; ``left_out``: parts that
    were not built, with the reasons; ``version``, ``torch``, ``platform``: the package version, torch version and
    platform of the build.
    """
    try:
        record = json.loads((FOLDER / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _installed() -> Path | None:
    """Returns the folder of another copy of the package on ``sys.path``, with kernels."""
    copies = (Path(folder, FOLDER.name) for folder in sys.path)
    return next((c for c in copies if (c / LIBRARY).exists() and c.resolve() != FOLDER.resolve()), None)


def _try_to_load() -> str:
    library, record = FOLDER / LIBRARY, built()
    if not library.exists():
        if not record and (installed := _installed()):
            return (
                f"these are the sources in {FOLDER.parent}, which hide the installed package in {installed}: run "
                "Python in another folder, or run 'make build' here"
            )
        why = record.get("left_out", {}).get("cpu", "no build has run")
        return f"the native library was not built: {why}; then {REBUILD}"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        return f"the native library needs torch 2.10 or later, and this is torch {torch.__version__}"
    expected = version.__version__
    built_from = record.get("version", expected)
    if built_from == expected:
        try:
            if not hasattr(torch.ops.fused_adaptive, "build_version"):  # else another copy is already loaded
                torch.ops.load_library(str(library))
            built_from = torch.ops.fused_adaptive.build_version()
        except Exception as error:
            # torch wraps the loader's error, whose message is more precise.
            why, here = str(error.__cause__ or error).partition("\n")[0], sysconfig.get_platform()
            if (there := record.get("platform", here)) != here:
                why += f"; it was built on {there}, and this is {here}"
            return f"the library at {library} cannot be loaded with torch {torch.__version__}: {why}; {REBUILD}"
    if built_from != expected:
        return f"the library at {library} is that of fused_adaptive {built_from}, and this is {expected}; {REBUILD}"
    tables = getattr(torch.ops.fused_adaptive, "declarations", str)  # a library without declarations gives ""
    if differs := declarations.difference(tables()):
        return f"the library at {library} is that of other sources: {differs}; {REBUILD}"
    return ""
