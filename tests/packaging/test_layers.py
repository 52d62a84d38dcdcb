"""Layers of the package: imports point downwards, also those for type checkers."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Folders that each folder may import; "" is the package itself.
LAYERS: dict[str, set[str]] = {
    "core": set(),
    "policies": {"core"},
    "engine": {"core", "policies"},
    "backends": {"core", "policies", "engine"},
    "optimizers": {"core", "policies", "engine", "backends"},
    "training": {"core", "policies", "engine", "optimizers"},
    "schedules": {"core", "engine", "optimizers"},
    "integrations": {"engine", "optimizers", "schedules"},
    "playground": {""},
}


def sources(folder: Path) -> dict[str, str]:
    """Returns the modules of a package by dotted name. A package's own name ends in ``.__init__``."""
    return {".".join(p.relative_to(folder.parent).with_suffix("").parts): p.read_text() for p in folder.rglob("*.py")}


def imports(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns the modules of the package that each module imports, anywhere in it."""
    return {name: set(_imported(name, ast.parse(text), texts)) for name, text in texts.items()}


def _imported(name: str, tree: ast.AST, texts: Mapping[str, str]):
    top = name.partition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in (m for m in found if m.partition(".")[0] == top):
            candidates = (
                module,
                f"{module}.__init__",
                module.rpartition(".")[0],
                f"{module.rpartition('.')[0]}.__init__",
            )
            yield next(c for c in candidates if c in texts)


def folder_of(module: str) -> str:
    """Returns the layer of a module; "" for modules outside of the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else ""


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns imports that LAYERS does not allow."""
    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if (own := folder_of(module)) and folder_of(other) not in {own, *LAYERS[own]}
    )


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Returns modules that import each other in a circle; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_point_downwards():
    graph = imports(sources(ROOT / "fused_adaptive"))
    assert {folder_of(module) for module in graph} - {""} == set(LAYERS)
    assert upward(graph) == []
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("module", "text", "problem"),
    [
        ("fused_adaptive.core.plain", "from ..policies import base", "fused_adaptive.core.plain imports"),
        ("fused_adaptive.core.plain", "def f():\n    from .. import __version__", "fused_adaptive.core.plain imports"),
        (
            "fused_adaptive.policies.base",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..engine.participants import Views",
            "fused_adaptive.policies.base imports",
        ),
    ],
)
def test_an_import_upward_is_noticed(module, text, problem):
    found = upward(imports({**sources(ROOT / "fused_adaptive"), module: text}))
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_a_circle_within_a_layer_is_noticed():
    texts = sources(ROOT / "fused_adaptive")
    texts["fused_adaptive.core.plain"] = "from . import state"
    texts["fused_adaptive.core.state"] = "from . import plain"
    assert {"fused_adaptive.core.plain", "fused_adaptive.core.state"} <= set(circle(imports(texts)))
