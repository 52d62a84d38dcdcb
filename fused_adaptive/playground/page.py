"""The web page, with Gradio: inputs, what happens when one moves, and the layout."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import torch

from .figures import history_figure, path_figure, path_frames, sensitivity_figure
from .problems import PROBLEMS
from .settings import NUMBERS, OPTIMIZERS, POLICIES, Settings
from .training import Run, sweep, train

HEAD = """# fused_adaptive playground
What a learning rate does that adapts, next to one that does not: this package's optimizers, one step an epoch."""

#: What is written at the sliders.
TEXTS = {
    "log_lr": ("Initial learning rate, log₁₀", ""),
    "epochs": ("Epochs", ""),
    "log_increment": ("increment, log₁₀", "ActiveLR: what a rate grows by while gradients keep their sign"),
    "low": ("low", "ActiveLR: what a rate is multiplied by when a gradient changes its sign"),
    "log_hyper_lr": ("hyper_lr, log₁₀", "Hypergradient: the step size of the learning rate itself"),
    "noise": ("Noise", "added to gradients, relative to the first one"),
}
#: Sliders of policies, which are there where their policy is.
ARGUMENTS = {"log_increment": "ActiveLR", "low": "ActiveLR", "log_hyper_lr": "Hypergradient"}

#: Inputs beside plots and results; on narrow pages between them, so that what a slider does is seen.
CSS = """
.gradio-container { max-width: 1280px !important; margin: auto; }
#main { display: grid; grid-template: "inputs plots" auto "inputs results" 1fr / minmax(280px, 1fr) minmax(0, 2fr); }
#inputs { grid-area: inputs; }
#plots { grid-area: plots; }
#results { grid-area: results; }
#status table { width: 100%; font-variant-numeric: tabular-nums; }
#status :is(th, td) { border-color: var(--border-color-primary); padding: 6px 8px; }
#status td:not(:first-child) { white-space: nowrap; }
@media (max-width: 760px) {
  .gradio-container, .gradio-container > main { padding: 8px !important; }
  #main { grid-template: "plots" "inputs" "results" / minmax(0, 1fr); }
}
"""

#: Puts the query of the present settings into the address, and the whole address into the box.
LINK = """(query) => {
  const url = new URL(window.location.href);
  url.search = query;
  window.history.replaceState(null, "", url);
  return url.href;
}"""


#: Hands the frames of the animation to the plot, which may still be on its way to the page.
FRAMES = """async (frames) => {
  let plot;
  while (!(plot = document.querySelector("#path .js-plotly-plot"))) await new Promise((done) => setTimeout(done, 50));
  await window.Plotly.addFrames(plot, JSON.parse(frames));
}"""


def build() -> gr.Blocks:
    """The page, not yet served."""
    with gr.Blocks(title="fused_adaptive playground", analytics_enabled=False) as page:
        gr.Markdown(HEAD)
        with gr.Row(elem_id="main"):
            with gr.Column(min_width=0, elem_id="inputs"):
                inputs = make_inputs()
            with gr.Column(min_width=0, elem_id="plots"):
                tab = gr.State("paths")
                with gr.Tabs():
                    with gr.Tab("Paths") as paths_tab:
                        path = gr.Plot(show_label=False, elem_id="path")
                        frames = gr.Textbox("[]", visible=False)
                    with gr.Tab("Sensitivity to the initial rate") as sweep_tab:
                        sensitivity = gr.Plot(show_label=False, elem_id="sensitivity")
            with gr.Column(min_width=0, elem_id="results"):
                history = gr.Plot(show_label=False, elem_id="history")
                status = gr.Markdown(elem_id="status")
                link = gr.Textbox(label="Link to these settings", buttons=["copy"], interactive=False, elem_id="link")

        answer: dict[str, Any] = {
            "inputs": [tab, *inputs.values()],
            "outputs": [path, frames, sensitivity, history, status, link],
        }
        live: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}

        def finish(drawn: Any) -> None:
            drawn.then(None, link, link, js=LINK).then(None, frames, None, js=FRAMES)

        def draw_after(event: Any) -> None:
            finish(event.then(draw, **answer, **live))

        starts = [inputs["x"], inputs["y"]]
        moved = [component.input for name, component in inputs.items() if name != "problem"]
        finish(gr.on(moved, draw, **answer, **live))
        inputs["policies"].input(argument_sliders, inputs["policies"], [inputs[name] for name in ARGUMENTS], **live)
        draw_after(inputs["problem"].input(start_sliders, inputs["problem"], starts, **live))
        draw_after(paths_tab.select(lambda: "paths", None, tab, **live))
        draw_after(sweep_tab.select(lambda: "sweep", None, tab, **live))
        draw_after(page.load(open_link, None, list(inputs.values()), show_progress="hidden"))
    return page


def make_inputs() -> dict[str, Any]:
    """A component for each of the settings, by name and in their order."""
    default = Settings()
    found: dict[str, Any] = {
        "problem": gr.Dropdown(
            [(p.title, name) for name, p in PROBLEMS.items()], value=default.problem, label="Problem"
        ),
        "optimizer": gr.Dropdown(OPTIMIZERS, value=default.optimizer, label="Optimizer"),
        "policies": gr.CheckboxGroup(POLICIES, value=list(default.policies), label="What drives its learning rate"),
    }
    for name in (field.name for field in fields(Settings)):
        if name in ("x", "y"):
            index = "xy".index(name)
            start = PROBLEMS[default.problem].starts[index]
            low, high = start.bounds
            found[name] = gr.Slider(low, high, start.default, step=0.01, label=start.label, elem_id=name)
        elif name in NUMBERS:
            low, high, step = NUMBERS[name]
            text, info = TEXTS[name]
            value = getattr(default, name)
            visible = name not in ARGUMENTS or ARGUMENTS[name] in default.policies
            found[name] = gr.Slider(
                low, high, value, step=step, label=text, info=info or None, elem_id=name, visible=visible
            )
    return found


def start_sliders(problem: str, *values: float | None) -> list[Any]:
    """The sliders of where a problem starts, with its bounds: at these values or its defaults."""
    starts, sliders = PROBLEMS[problem].starts, []
    for i in range(2):
        if i >= len(starts):
            sliders.append(gr.Slider(visible=False))
            continue
        start = starts[i]
        value = values[i] if values else start.default
        low, high = start.bounds
        sliders.append(gr.Slider(low, high, value, label=start.label, visible=True))
    return sliders


def argument_sliders(policies: list[str]) -> list[Any]:
    """The sliders of policies' arguments, for those that are chosen."""
    return [gr.Slider(visible=policy in policies) for policy in ARGUMENTS.values()]


def open_link(request: gr.Request) -> list[Any]:
    """The inputs as the address says, or the defaults where it says something else."""
    try:
        settings = Settings.from_query(dict(request.query_params))
    except ValueError as error:
        gr.Warning(f"The link does not work, so here are the defaults. {error}", duration=30)
        settings = Settings()
    values: dict[str, Any] = {field.name: getattr(settings, field.name) for field in fields(settings)}
    values["policies"] = list(settings.policies)
    values["x"], values["y"] = start_sliders(settings.problem, settings.x, settings.y)
    for name, policy in ARGUMENTS.items():
        values[name] = gr.Slider(value=values[name], visible=policy in settings.policies)
    return list(values.values())


def draw(tab: str, *values: Any) -> list[Any]:
    """Paths or the sweep, whichever is seen; loss and rate over time; a status; and the link's query."""
    given = dict(zip((field.name for field in fields(Settings)), values, strict=True))
    given["policies"] = tuple(given["policies"])
    try:
        settings = Settings(**given)
    except ValueError as error:
        return [gr.skip()] * 4 + [f"⚠️ {error}", gr.skip()]
    began = time.perf_counter()
    runs = train(settings)
    took = time.perf_counter() - began
    path, frames, sensitivity = gr.skip(), gr.skip(), gr.skip()
    if tab == "paths":
        path, frames = path_figure(settings, runs), json.dumps(path_frames(settings, runs))
    else:
        sensitivity = sensitivity_figure(settings, sweep(settings))
    return [path, frames, sensitivity, history_figure(runs), table(settings, runs, took), settings.query()]


def table(settings: Settings, runs: list[Run], seconds: float) -> str:
    """Where each run ended, as Markdown."""
    lines = ["| | loss at the end | mean rate |", "|---|---:|---:|"]
    for run in runs:
        ended = f"diverged after {len(run.losses)} epochs" if run.diverged else f"{run.losses[-1]:.6g}"
        lines.append(f"| {run.label} | {ended} | {run.rates[-1]:.6g} |")
    took = f"{settings.epochs} epochs from rate {settings.lr:.3g}, computed in {1000 * seconds:.0f} ms."
    return "\n".join([*lines, "", PROBLEMS[settings.problem].formula, "", took])


def launch(**options: Any) -> Any:
    """Serves the page, with the options of Gradio's ``launch``."""
    torch.set_num_threads(1)  # tensors are so small that a second thread only costs time
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # pyright: ignore[reportPrivateImportUsage]
    return build().launch(theme=theme, css=CSS, footer_links=[], **options)
