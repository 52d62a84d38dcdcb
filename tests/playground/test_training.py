"""The playground without its page: runs are those of the package's optimizers, and inputs have bounds."""

from __future__ import annotations

import base64
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.playground.problems import PROBLEMS, moons
from fused_adaptive.playground.settings import NUMBERS, OPTIMIZERS, POLICIES, Settings
from fused_adaptive.playground.training import DIVERGED, sweep, sweep_rates, train

EPOCHS = 30


def alone(settings: Settings, policy: str) -> tuple[list[float], list[float], torch.Tensor]:
    """A run as a user writes it: one parameter, one optimizer, a loop."""
    problem = PROBLEMS[settings.problem]
    p = problem.initial(*settings.start).requires_grad_()
    arguments = {
        "FixedLR": {},
        "ActiveLR": {"policy": fa.ActiveLR(interval=1, increment=10**settings.log_increment, low=settings.low)},
        "TrainableLR": {"policy": fa.TrainableLR(interval=1)},
        "Hypergradient": {"policy": fa.Hypergradient(10**settings.log_hyper_lr)},
    }[policy]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer = getattr(fa, settings.optimizer)([p], lr=10**settings.log_lr, **arguments)
    losses, rates = [], []
    for epoch in range(settings.epochs + 1):
        loss = problem.loss(p)
        losses.append(loss.item())
        rates.append(optimizer.learning_rates()[0]["mean"])
        if epoch < settings.epochs:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses, rates, p.detach()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_runs_are_those_of_an_optimizer_alone(problem, optimizer):
    settings = Settings(problem, optimizer, POLICIES, epochs=EPOCHS, log_lr=-3.5, log_increment=-5, log_hyper_lr=-8)
    runs = train(settings)
    assert [run.policy for run in runs] == list(POLICIES)
    for run in runs:
        losses, rates, last = alone(settings, run.policy)
        shown = len(run.losses)
        assert run.diverged == (shown < EPOCHS + 1)
        torch.testing.assert_close(run.losses, losses[:shown], rtol=1e-9, atol=0)
        torch.testing.assert_close(run.rates, rates[:shown], rtol=1e-9, atol=0)
        if not run.diverged:
            torch.testing.assert_close(run.points[-1], last, rtol=1e-9, atol=1e-12)
    finals = [run.losses[-1] for run in runs]
    assert len(set(finals)) == len(finals)  # policies differ, so that one taken for another would fail above


def test_a_sweep_has_the_losses_of_single_runs():
    settings = Settings("mse", "SGD", POLICIES, epochs=EPOCHS)
    losses = sweep(settings)
    rates = sweep_rates()
    assert (rates[0], rates[-1]) == (10 ** NUMBERS["log_lr"][0], 10 ** NUMBERS["log_lr"][1])
    for i in (0, 6, 14):
        for run in train(Settings("mse", "SGD", POLICIES, epochs=EPOCHS, log_lr=math.log10(rates[i]))):
            found = losses[run.policy][i]
            assert math.isnan(found) if run.diverged else found == pytest.approx(run.losses[-1], rel=1e-9)
    assert math.isnan(losses["FixedLR"][-1])  # a rate of 10 is more than a parabola forgives


def test_a_run_ends_where_it_diverges():
    (run,) = train(Settings("rosenbrock", "SGD", ("FixedLR",), log_lr=0))
    assert run.diverged
    assert 0 < len(run.losses) < 20
    assert all(abs(loss) < DIVERGED for loss in run.losses)
    assert len(run.losses) == len(run.rates) == len(run.points)


def test_noise_is_relative_to_the_first_gradient_and_the_same_in_every_run():
    quiet, noisy, again = (
        [run.losses for run in train(Settings("beale", "Adam", POLICIES, epochs=10, noise=noise))]
        for noise in (0, 0.5, 0.5)
    )
    assert noisy == again != quiet
    first = PROBLEMS["beale"].initial(*Settings("beale").start).requires_grad_()
    PROBLEMS["beale"].loss(first).backward()
    assert first.grad is not None
    (run,) = train(Settings("beale", "SGD", ("FixedLR",), epochs=1, log_lr=-3, noise=1))
    moved = (run.points[0] - run.points[1]) / 1e-3 - first.grad
    drawn = torch.randn(2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(moved, drawn * first.grad.square().mean().sqrt(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_have_their_minima_where_they_say(problem):
    problem = PROBLEMS[problem]
    for minimum in problem.minima:
        p = torch.tensor(minimum, dtype=torch.float64, requires_grad=True)
        loss = problem.loss(p)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-20)
        assert p.grad.abs().max().item() == pytest.approx(0, abs=1e-9)
    for start in problem.starts:
        low, high = start.bounds
        assert low <= start.default <= high


def test_the_net_learns_its_points():
    (run,) = train(Settings("net", "AdamW", ("ActiveLR",), log_lr=-2))
    assert run.losses[-1] < 0.1 < run.losses[0]
    assert moons()[0].shape == (200, 2)


# ---- settings ----


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"problem": "sphere"}, "problem: 'sphere' is none of saddle, mse"),
        ({"optimizer": "Lion"}, "optimizer: 'Lion' is none of"),
        ({"policies": ()}, "policies: choose at least one"),
        ({"policies": ("AALR",)}, "policies: 'AALR' is none of"),
        ({"epochs": 501}, "epochs: 501 is not a number from 1 to 500"),
        ({"epochs": "many"}, "epochs: 'many' is not a number"),
        ({"log_lr": float("nan")}, "log_lr: nan is not a number from -6 to 1"),
        ({"low": 0}, "low: 0 is not a number from 0.05 to 1"),
        ({"x": 2.5}, "x: 2.5 is not a number from -2 to 2"),
        ({"problem": "net", "x": 4}, "x: 4 is not a number from 0.01 to 3"),
    ],
)
def test_what_is_out_of_bounds_is_a_sentence(wrong, said):
    with pytest.raises(ValueError, match=said):
        Settings(**wrong)


def test_a_link_encodes_every_setting():
    settings = Settings("beale", "RAdam", ("ActiveLR", "Hypergradient"), -2.25, -0.5, 1.25, 120, -1.5, 0.5, -6, 0.25)
    query = settings.query()
    assert "policies=ActiveLR-Hypergradient&log_lr=-2.25" in query
    assert Settings.from_query(dict(pair.split("=") for pair in query.split("&"))) == settings
    assert Settings.from_query({"__theme": "dark"}) == Settings()
    assert Settings.from_query({"problem": "net"}).start == (0.5,)
    with pytest.raises(ValueError, match="epochs: '1e9' is not"):
        Settings.from_query({"epochs": "1e9"})


# ---- plots ----


def test_every_frame_moves_the_traces_of_the_runs():
    pytest.importorskip("plotly")
    from fused_adaptive.playground.figures import FRAMES, NET_FRAMES, path_figure, path_frames

    for problem in PROBLEMS:
        settings = Settings(problem, policies=POLICIES, epochs=100)
        runs = train(settings)
        figure: Any = path_figure(settings, runs)
        frames = path_frames(settings, runs)
        assert len(frames) == (NET_FRAMES if problem == "net" else FRAMES) + 1
        assert [frame["name"] for frame in frames] == list(figure.layout.updatemenus[0].buttons[0].args[0])
        assert frames[-1]["name"] == "100"
        for frame in json.loads(json.dumps(frames)):
            names = [figure.data[i].name for i in frame["traces"]]
            assert names == [trace["name"] for trace in frame["data"]]
            assert names == ["AdamW", "ActiveAdamW", "AdamW + TrainableLR", "AdamW + Hypergradient"]


def unpacked(array: dict[str, str]) -> list[float]:
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"]).tolist()


def test_figures_show_the_runs():
    pytest.importorskip("plotly")
    from fused_adaptive.playground.figures import history_figure, path_figure, sensitivity_figure

    settings = Settings("rosenbrock", "SGD", ("FixedLR", "ActiveLR"), log_lr=-3, epochs=20)
    runs = train(settings)
    history: Any = history_figure(runs)
    path: Any = path_figure(settings, runs)
    assert list(history.data[2].y) == runs[1].losses
    assert list(history.data[3].y) == runs[1].rates
    assert unpacked(path.data[-1].x) == pytest.approx(runs[1].points[:, 0].tolist(), rel=1e-6)
    losses = sweep(settings)
    shown: Any = sensitivity_figure(settings, losses).data
    assert list(shown[0].y) == [None if math.isnan(loss) else loss for loss in losses["FixedLR"]]
