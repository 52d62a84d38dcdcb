"""The native library, ``_C.abi3.so``: loaded when it is first asked for, and why it is not there if it is not.

What ``setup.py`` built and left out stands in ``_build.json``. The library uses torch's stable ABI only, so that one
build serves torch 2.10 and later. Whatever is wrong with it is a sentence with a remedy, never an error on import.
"""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path
from typing import Any

import torch

from . import declarations, version

#: Where the library and the record of its build are.
FOLDER = Path(__file__).parents[1]

#: Python without the interpreter's lock, and without the stable ABI that one library for all versions needs.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX') if FREE_THREADED else '.abi3.so'}"

REBUILD = (
    "rebuild it where the sources are, with `make build` or "
    "`pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .`"
)

_reason: str | None = None  # None: not tried yet


def load() -> None:
    """Loads the library, once; its operators are then in ``torch.ops.fused_adaptive``.

    Raises:
        RuntimeError: with :func:`why_not`, if it cannot be loaded.
    """
    if reason := why_not():
        raise RuntimeError(reason)


def why_not() -> str:
    """ "" if the library is loaded, which the first call tries; else the reason and the remedy."""
    global _reason
    if _reason is None:
        _reason = _try_to_load()
    return _reason


def has_cuda() -> bool:
    """Whether the library is loaded and has CUDA kernels."""
    return not why_not() and bool(built().get("cuda"))


def built() -> dict[str, Any]:
    """What the build wrote down; empty if nothing was built, as in a checkout that was never installed.

    ``cpu``: whether there is a library; ``cuda``: the architectures of its CUDA kernels, or None; ``left_out``: what is
    not in it, with the reasons; ``version``, ``torch``, ``platform``: what it was built from, with and on.
    """
    try:
        record = json.loads((FOLDER / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _try_to_load() -> str:
    library, record = FOLDER / LIBRARY, built()
    if not library.exists():
        why = record.get("left_out", {}).get("cpu", "no build has run")
        return f"the native library was not built: {why}; then {REBUILD}"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        return f"the native library needs torch 2.10 or later, and this is torch {torch.__version__}"
    own = version.__version__
    built_from = record.get("version", own)
    if built_from == own:
        try:
            if not hasattr(torch.ops.fused_adaptive, "build_version"):  # else another copy of it is loaded already
                torch.ops.load_library(str(library))
            built_from = torch.ops.fused_adaptive.build_version()
        except Exception as error:
            # torch wraps the loader's message, which says more than torch's own.
            why, here = str(error.__cause__ or error).partition("\n")[0], sysconfig.get_platform()
            if (there := record.get("platform", here)) != here:
                why += f"; it was built on {there}, and this is {here}"
            return f"the library at {library} cannot be loaded with torch {torch.__version__}: {why}; {REBUILD}"
    if built_from != own:
        return f"the library at {library} is that of fused_adaptive {built_from}, and this is {own}; {REBUILD}"
    tell = getattr(torch.ops.fused_adaptive, "declarations", str)  # a library without it declares nothing
    if differs := declarations.difference(tell()):
        return f"the library at {library} is that of other sources: {differs}; {REBUILD}"
    return ""
