"""Hooks of MkDocs: links of the pages that lead out of ``docs`` work on the site too.

The pages are read on GitHub as well, where ``../bench/results/demo.png`` is a file of the repository. On the site,
such a picture is copied, and every other file becomes a link to the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PICTURES = (".png", ".svg")
LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
#: A role of reStructuredText in a docstring, as in ``:class:`~module.Name```.
ROLE = re.compile(r":(?:class|meth|func|attr|data):<code>[~.]?(?:[\w.]+\.)?(\w+)</code>")


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Adds the pictures of ``bench/results`` to the site."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    for path in sorted((ROOT / "bench" / "results").rglob("*")):
        if path.suffix in PICTURES:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Rewrites links that lead out of ``docs``."""
    folder = PurePosixPath(page.file.src_uri).parent
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)  # code stays as it is
    rewrite = lambda match: rewritten(match[1], folder, config.repo_url)  # noqa: E731
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))


def rewritten(target: str, folder: PurePosixPath, repository: str) -> str:
    """Returns the target of a link on the site.

    Args:
        target: as it stands in the page.
        folder: of the page, in ``docs``.
        repository: the address of the repository.
    """
    url = urlsplit(target)
    if url.scheme or not url.path:
        return target
    path = Path(os.path.normpath(DOCS / folder / url.path))
    if path.is_relative_to(DOCS):
        return target
    name = path.relative_to(ROOT).as_posix()
    if path.suffix in PICTURES and name.startswith("bench/results/"):
        return os.path.relpath(name, folder)
    return f"{repository}/{'tree' if path.is_dir() else 'blob'}/main/{name}" + (f"#{url.fragment}" * bool(url.fragment))


def on_page_content(html: str, **_: Any) -> str:
    """Shows the roles in docstrings as code, and a colon before a block as one."""
    return ROLE.sub(r"<code>\1</code>", html).replace("::</p>", ":</p>")
