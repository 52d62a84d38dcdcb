"""The playground in a real browser: a slider moves, the curves change, and their values are those of the package."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from fused_adaptive.playground.settings import Settings
from fused_adaptive.playground.training import sweep, train

pytestmark = pytest.mark.heavy
for package in ("gradio", "plotly", "playwright"):
    pytest.importorskip(package)

#: A server that takes longer to start, or a page that takes longer to answer, is broken.
PATIENCE = 180
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fused_adaptive.playground", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | {"GRADIO_ANALYTICS_ENABLED": "False"})
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(PATIENCE):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, "the server has ended"
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import Error, sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        except Error as error:
            pytest.skip(f"no Chromium: {str(error).partition(chr(10))[0]}")
        yield browser
        browser.close()


class Page:
    """The page of one test, and what a reader sees on it."""

    def __init__(self, browser: Any, address: str, query: str = "", width: int = 1280) -> None:
        self.errors: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address + query)
        self.page.wait_for_selector("#status td")
        self.page.wait_for_selector("#path .js-plotly-plot")
        self.page.wait_for_selector("#history .js-plotly-plot")

    def settings(self) -> Settings:
        """Those of the link."""
        self.page.wait_for_function("document.querySelector('#link textarea, #link input').value.startsWith('http')")
        link = self.page.input_value("#link textarea, #link input")
        query = re.sub(r"^.*\?", "", link)
        return Settings.from_query(dict(pair.split("=") for pair in query.split("&")))

    def wait_for(self, settings: Settings) -> None:
        self.page.wait_for_function(
            "query => document.querySelector('#link textarea, #link input').value.endsWith(query)",
            arg="?" + settings.query(),
        )

    def curves(self, plot: str) -> list[list[float]]:
        """What a plot draws, as Plotly has it."""
        script = "plot => document.querySelector(`#${plot} .js-plotly-plot`)._fullData.map(t => Array.from(t.y))"
        return self.page.evaluate(script, plot)

    def slide(self, name: str, keys: str, times: int = 1) -> None:
        slider = self.page.locator(f"#{name} input[type=range]")
        slider.focus()
        for _ in range(times):
            slider.press(keys)


def shows(page: Page, settings: Settings) -> None:
    """Curves and table are those of the package's optimizers."""
    runs = train(settings)
    curves = page.curves("history")
    assert curves[::2] == [run.losses for run in runs]
    assert curves[1::2] == [run.rates for run in runs]
    table = page.page.inner_text("#status")
    for run in runs:
        assert (f"diverged after {len(run.losses)} epochs" if run.diverged else f"{run.losses[-1]:.6g}") in table
        assert f"{run.rates[-1]:.6g}" in table


def test_a_slider_moves_and_the_curves_are_those_of_the_package(browser, address):
    page = Page(browser, address)
    page.wait_for(Settings())
    shows(page, Settings())
    before = page.curves("history")
    page.slide("log_lr", "ArrowRight", 2)
    moved = replace(Settings(), log_lr=-2.5)
    page.wait_for(moved)
    shows(page, moved)
    assert page.curves("history") != before
    page.page.get_by_label("TrainableLR").check()
    moved = replace(moved, policies=("FixedLR", "ActiveLR", "TrainableLR"))
    page.wait_for(moved)
    shows(page, moved)
    assert page.errors == []


def test_the_animation_plays(browser, address):
    page = Page(browser, address)
    plot = "document.querySelector('#path .js-plotly-plot')"
    whole = page.page.evaluate(f"{plot}._fullData.at(-1).x.length")
    assert whole == Settings().epochs + 1
    page.page.locator("#path .updatemenu-button").first.click()
    page.page.wait_for_function(f"{plot}._fullData.at(-1).x.length < {whole}")
    page.page.wait_for_function(f"{plot}._fullData.at(-1).x.length == {whole}")
    assert page.errors == []


def test_a_link_opens_what_it_encodes(browser, address):
    settings = Settings("rosenbrock", "SGD", ("ActiveLR", "Hypergradient"), -3.5, -0.5, 2, 50, -3, 0.5, -7, 0.1)
    page = Page(browser, address, "?" + settings.query())
    page.wait_for(settings)
    shows(page, settings)
    assert page.settings() == settings
    assert page.page.input_value("#epochs input[type=number]") == "50"
    assert page.errors == []


def test_a_link_out_of_bounds_says_so_and_opens_the_defaults(browser, address):
    page = Page(browser, address, "?epochs=100000")
    page.page.wait_for_selector("text=/epochs: '100000' is not a number from 1 to 500/")
    page.wait_for(Settings())
    shows(page, Settings())


def test_another_problem_has_other_bounds(browser, address):
    page = Page(browser, address, "?problem=net")
    assert page.page.input_value("#x input[type=number]") == "0.5"
    assert not page.page.locator("#y").is_visible()
    page.page.get_by_label("Problem").click()
    page.page.get_by_role("option", name="Beale").click()
    page.wait_for(Settings("beale"))
    shows(page, Settings("beale"))
    assert page.page.locator("#y").is_visible()
    assert page.errors == []


def test_nothing_to_draw_is_a_sentence(browser, address):
    page = Page(browser, address)
    for name in ("FixedLR", "ActiveLR"):
        page.page.get_by_label(name).uncheck()
    page.page.wait_for_selector("text=policies: choose at least one")
    assert page.errors == []


def test_the_sweep(browser, address):
    page = Page(browser, address, "?epochs=40")
    page.page.get_by_role("tab", name="Sensitivity").click()
    page.page.wait_for_selector("#sensitivity .js-plotly-plot")
    assert page.curves("sensitivity") == list(sweep(Settings(epochs=40)).values())
    assert page.errors == []


def test_it_is_readable_on_a_telephone(browser, address):
    page = Page(browser, address, width=400)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 400
    plot, slider = (page.page.locator(s).first.bounding_box() for s in ("#path .js-plotly-plot", "#log_lr"))
    assert plot["y"] < slider["y"]
    assert plot["width"] > 300
    assert page.errors == []
