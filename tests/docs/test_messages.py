"""The messages that docs/troubleshooting.md quotes stand in the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUOTED = re.compile(r"^> (.+)$", re.MULTILINE)


def text_of(node: ast.AST) -> str | None:
    """Returns a string of the source, with "…" for the values of an f-string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    return None


def strings() -> Iterator[str]:
    for path in sorted((ROOT / "fused_adaptive").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (text := text_of(node)) is not None:
                yield text


def missing(document: str) -> list[str]:
    """Returns the messages that a text quotes and that are no part of any string of the package."""
    known = set(strings())
    return [quoted for quoted in QUOTED.findall(document) if not any(quoted in text for text in known)]


def test_quoted_messages_stand_in_the_sources():
    document = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(QUOTED.findall(document)) > 40
    assert missing(document) == []


def test_a_message_that_has_changed_is_noticed():
    assert missing("> ASLR: the lr of param group 0, …, turns into …: the search") == [
        "ASLR: the lr of param group 0, …, turns into …: the search"
    ]
