"""Which code a run was made with, as far as it decides the result.

Runs take hours and outlive refactorings. So a run is kept by the source of its own training code and by the golden
trajectories, which all optimizers have to follow: not by every file of the package. It tells the commit, too.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from functools import cache
from pathlib import Path

import torch

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def of(things: tuple[object, ...]) -> str:
    """A digest of functions and classes by their source, of other values by their repr."""
    digest = hashlib.sha256(f"{torch.__version__} {golden(GOLDEN)}".encode())
    for thing in things:
        digest.update(source(thing).encode())
    return digest.hexdigest()[:16]


def source(thing: object) -> str:
    """Without comments, docstrings and layout."""
    plain = inspect.unwrap(thing) if callable(thing) else thing  # of a cache's wrapper, too
    if inspect.isfunction(plain) or inspect.isclass(plain):
        tree = ast.parse(textwrap.dedent(inspect.getsource(plain)))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        return ast.unparse(tree)
    if " at 0x" in repr(thing):
        raise TypeError(f"{thing!r} is another text in each process")
    return repr(thing)


@cache
def golden(folder: Path) -> str:
    """A digest of the golden trajectories."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
