"""The site builds without warnings and without a network, and its links and anchors resolve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import pytest

from bench.site.hooks import on_page_content, rewritten

ROOT = Path(__file__).parents[2]
PLOTS = ROOT / "docs" / "assets" / "plots"


class Page(HTMLParser):
    """Collects the links of a page, what it loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])


def problems(site: Path) -> list[str]:
    """Returns the links of a built site that lead nowhere, and what it loads from other hosts."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute: nobody knows from where it is shown
            continue
        for target in page.links + page.loaded:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                if target in page.loaded and url.scheme != "data":
                    found.append(f"{path.relative_to(site)} loads {target}")
                continue
            there = (path.parent / unquote(url.path)).resolve() if url.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.exists():
                found.append(f"{path.relative_to(site)} links to {target}")
            elif url.fragment and there in pages and unquote(url.fragment) not in pages[there].anchors:
                found.append(f"{path.relative_to(site)} links to {target}, which has no such anchor")
    for style in site.rglob("*.css"):
        for target in re.findall(r"url\(['\"]?([^'\")]+)", style.read_text(encoding="utf-8")):
            local = not urlsplit(target).scheme and (style.parent / unquote(urlsplit(target).path)).exists()
            if not local and not target.startswith(("data:", "#")):
                found.append(f"{style.relative_to(site)} loads {target}")
    return found


def test_broken_links_are_noticed(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="a">a</h1><a href="#a"></a><a href="#b"></a><a href="other/"></a><img src="https://a.host/x.png">'
    )
    (tmp_path / "x.css").write_text("a { background: url(missing.png), url('data:x') }")
    assert problems(tmp_path) == [
        "index.html links to #b, which has no such anchor",
        "index.html links to other/",
        "index.html loads https://a.host/x.png",
        "x.css loads missing.png",
    ]


@pytest.mark.heavy
def test_the_site_builds_and_its_links_resolve(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs installs it")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: make docs installs it")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert len(list((tmp_path / "site").rglob("index.html"))) > 35
    assert problems(tmp_path / "site") == []


def test_links_out_of_the_pages_are_rewritten():
    def of(target: str, folder: str = ".") -> str:
        return rewritten(target, PurePosixPath(folder), "repo")

    assert of("../bench/results/demo.png") == "bench/results/demo.png"
    assert of("../../bench/results/demo.png", "policies") == "../bench/results/demo.png"
    assert of("../CONTRIBUTING.md#tests") == "repo/blob/main/CONTRIBUTING.md#tests"
    assert of("../examples") == "repo/tree/main/examples"
    assert of("../api/policies.md", "policies") == "../api/policies.md"
    assert of("https://a.host/b") == "https://a.host/b"
    assert of("#here") == "#here"
    assert on_page_content("<p>see :class:<code>~a.b.Name</code></p>") == "<p>see <code>Name</code></p>"


def test_every_page_and_every_plot_is_used():
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(entries: list) -> list[str]:
        named = [value for entry in entries for value in ([entry] if isinstance(entry, str) else entry.values())]
        return [e for value in named for e in ([value] if isinstance(value, str) else files(value))]

    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(files(config["nav"])) == sorted(pages)
    plots = pytest.importorskip("bench.site.plots")
    text = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in pages)
    assert {path.stem for path in PLOTS.glob("*.svg")} == set(plots.PLOTS)
    assert {name for name in plots.PLOTS if f"assets/plots/{name}.svg" in text} == set(plots.PLOTS)


@pytest.mark.parametrize("name", ["range_test", "hypergradient"])
def test_plots_are_those_of_the_package(name, tmp_path):
    """Draws a plot again: its curves are within a fifth of a point of those that are committed."""
    plots = pytest.importorskip("bench.site.plots")
    import matplotlib
    import numpy

    pinned = re.search(r"^matplotlib==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if pinned is None or matplotlib.__version__ != pinned[1]:
        pytest.skip("the plots are drawn with the matplotlib that is pinned")

    def curves(path: Path) -> list[float]:
        lines = re.findall(r'<path d="(M [^"]*)" clip-path', path.read_text(encoding="utf-8"))
        return [float(x) for line in lines for x in re.findall(r"-?\d+\.?\d*", line)]

    again, committed = curves(plots.draw(name, tmp_path)), curves(PLOTS / f"{name}.svg")
    assert len(committed) > 200
    assert numpy.abs(numpy.subtract(again, committed)).max() < 0.2
