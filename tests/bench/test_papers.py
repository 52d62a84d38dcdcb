"""The papers' experiments: what their verdicts are made of, the surfaces, the parts of trainings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import fused_adaptive as fa
from bench.papers import (
    batches,
    catalogue,
    controllers,
    gradients,
    language,
    rates,
    rivals,
    rivals_shown,
    rules,
    surfaces,
    timing,
    together,
    trainable,
    trainable_shown,
    training,
)
from bench.papers.experiment import Criterion, Experiment, Floor, finite, mean, mean_and_std, verdict
from bench.papers.nets import WideResNet

from .papers_common import held, made_up, trained

EXPERIMENTS = catalogue.EXPERIMENTS


# ---- verdicts ----


def experiment_with(*outcomes: bool, floor: bool = True) -> Experiment:
    criteria = tuple(Criterion(f"claim {i}", lambda runs, held=held: held) for i, held in enumerate(outcomes))
    return replace(rules.EXPERIMENT, criteria=criteria, floor=Floor("something", lambda runs: floor))


@pytest.mark.parametrize(
    ("outcomes", "word"), [((True, True), "confirmed"), ((True, False), "partly"), ((False, False), "not")]
)
def test_a_verdict_counts_the_criteria_that_hold(outcomes, word):
    found = verdict(experiment_with(*outcomes), [{}], 1)
    assert found.word == word
    assert len(found.holds) == sum(outcomes)
    assert found.holds + found.fails == ("claim 0", "claim 1") if word != "not" else found.fails


def test_below_the_floor_nothing_is_confirmed():
    assert verdict(experiment_with(True, floor=False), [{}], 1).word == "not at this scale"


def test_there_is_no_verdict_before_all_runs_are_there():
    assert verdict(experiment_with(True), [], 3).word == "not run yet"
    assert verdict(experiment_with(True), [{}, {}], 3).word == "incomplete"
    assert verdict(experiment_with(True), [{}, {}, {}], 3).word == "confirmed"


def test_a_divergence_is_told_and_is_no_number():
    assert mean_and_std([1.0, 3.0]) == "2.0 ± 1.4"
    assert mean_and_std([1.0, None]) == "1.0, 1 diverged"
    assert mean_and_std([None]) == "1 diverged"
    assert mean_and_std([]) == "–"
    assert mean([1.0, None]) is None
    assert mean([1.0, 2.0]) == 1.5
    assert finite(math.nan) is None
    assert finite(-math.inf) is None
    assert finite(1.23456789, 3) == 1.23


# ---- criteria, with runs on both sides of each ----


def sensitivity(plain: dict[float, float], active: dict[float, float], gains: dict[float, float]) -> list[dict]:
    of = {"plain": plain, "active": active, "authors' gains": gains}
    return made_up(rates.EXPERIMENT, lambda job: trained(of[job.policy][job.rate]))


LOW_TO_HIGH = (5e-6, 5e-5, 5e-4, 5e-3)


def test_sensitivity_is_confirmed_where_areas_halve_and_nothing_is_lost():
    plain = dict(zip(LOW_TO_HIGH, (50.0, 80.0, 86.0, 86.0), strict=True))  # an area of 36
    flat = dict.fromkeys(LOW_TO_HIGH, 86.0)
    good = dict(zip(LOW_TO_HIGH, (70.0, 80.0, 86.0, 85.5), strict=True))  # 16
    runs = sensitivity(plain, good, good)
    assert rates.area(runs, "AdamW", "plain") == 36
    assert held(rates.EXPERIMENT, runs) == [True] * 4
    assert held(rates.EXPERIMENT, sensitivity(plain, plain, plain)) == [False, False, False, True]
    worse = {rate: accuracy - 1 for rate, accuracy in flat.items()}
    assert held(rates.EXPERIMENT, sensitivity(plain, worse, flat)) == [True, True, True, False]
    assert rates.EXPERIMENT.floor.is_reached(runs)
    assert not rates.EXPERIMENT.floor.is_reached(sensitivity(dict.fromkeys(LOW_TO_HIGH, 84.9), flat, flat))


def test_a_run_that_diverges_counts_as_chance_from_there_on():
    flat = dict.fromkeys(LOW_TO_HIGH, 80.0)
    runs = sensitivity(flat, flat, flat)
    for run in runs:
        if (run["policy"], run["rate"]) == ("plain", 5e-3):
            run["test"] = [80.0] * 5 + [None]
    assert rates.area(runs, "SGD", "plain") == pytest.approx(70 * 10 / 15)
    assert rates.area(runs, "SGD", "active") == 0


def test_batch_sizes_are_judged_by_what_the_largest_loses():
    def results(loses: dict[tuple[str, float], float]):
        return lambda job: trained(86 - (job.batch == 4096) * loses[job.policy, job.lr], epochs=10)

    paper = {("plain", 1e-4): 60.0, ("active", 1e-4): 19.0, ("plain", 0.05): 5.0, ("active", 0.05): 5.0}
    assert held(batches.EXPERIMENT, made_up(batches.EXPERIMENT, results(paper))) == [True] * 3
    other = {("plain", 1e-4): 9.0, ("active", 1e-4): 4.0, ("plain", 0.05): 5.0, ("active", 0.05): 6.0}
    assert held(batches.EXPERIMENT, made_up(batches.EXPERIMENT, results(other))) == [False] * 3


def test_gradient_norms_are_taken_relative_to_each_layers_largest():
    norms = [[1.0, 100.0, 7.0], [2.0, 100.0, 9.0], [1.0, 50.0, 1.0]]  # two convolutions and the dense layer
    assert gradients.course({"watched": norms}) == [0.75, 1.0, 0.5]

    def results(left: dict[str, float], loss: dict[str, float]):
        return lambda job: trained(86.0, loss[job.case], 2, watched=[[1.0, 1.0], [left[job.case], 1.0]])

    paper = made_up(gradients.EXPERIMENT, results({"a": 1, "b": 0.6, "c": 0.3}, {"a": 0.5, "b": 0.2, "c": 0.1}))
    assert held(gradients.EXPERIMENT, paper) == [True] * 4
    other = made_up(gradients.EXPERIMENT, results({"a": 0.9, "b": 0.3, "c": 0.6}, {"a": 0.3, "b": 0.2, "c": 0.3}))
    assert held(gradients.EXPERIMENT, other) == [False] * 4


def test_languages_floor_is_half_of_the_unigram_perplexity():
    def runs(loss: float, active: float):
        of = {"plain": loss, "active": active}
        return made_up(
            language.EXPERIMENT,
            lambda job: {**trained(of[job.policy] + (job.policy == "plain") * (job.rate == 1e-5)), "unigram": 100.0},
        )

    reached = runs(math.log(49), math.log(48))
    assert language.EXPERIMENT.floor.is_reached(reached)
    assert held(language.EXPERIMENT, reached) == [True] * 3
    missed = runs(math.log(51), math.log(52))
    assert not language.EXPERIMENT.floor.is_reached(missed)
    assert held(language.EXPERIMENT, missed) == [True, False, False]


def tlr_runs(**changes: Any) -> list[dict]:
    """As the paper has it, but for what is changed: functions of a job."""

    def results(job: Any) -> dict:
        if not hasattr(job, "method"):
            return {"timing": {"ratio": {"sgd": 1.0, "sgd_tlr": changes.get("ratio", 1.01), "adam": 1.1}}}
        is_ours = job.method.startswith("sgd_tlr")
        accuracy = 86.0 if is_ours else 70.0 + 10 * (job.lr == 0.1)
        if job.method == "sgd_tlr" and job.bound >= 5:
            accuracy = 10.0
        rate = {"learning_rate": [0.1, 0.2, 0.1]}
        watched = {"watched": [[0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.4, 0.4]]} if job.method == "sgd_tlr_pl" else {}
        run = {**trained(accuracy, 0.1 if is_ours else 0.2), **rate, **watched}
        for change in changes.get("also", ()):
            run.update(change(job))
        return run

    return made_up(trainable.EXPERIMENT, results)


def test_trainable_is_confirmed_by_runs_as_the_paper_has_them():
    assert held(trainable.EXPERIMENT, tlr_runs()) == [True] * 8


@pytest.mark.parametrize(
    ("fails", "changes"),
    [
        (0, {"also": [lambda job: {"test": [80.0]} if job.method == "sgd_tlr" and job.batch == 64 else {}]}),
        (1, {"also": [lambda job: {"train_loss": [0.05]} if job.method == "sgd_exp" else {}]}),
        (2, {"also": [lambda job: {"test": [86.0]} if job.method.startswith("hyper") else {}]}),
        (3, {"also": [lambda job: {"learning_rate": [0.1, 0.2, 0.3]} if job.method == "sgd_tlr" else {}]}),
        (4, {"also": [lambda job: {"test": [86.0]} if job.bound == 5 else {}]}),
        (5, {"also": [lambda job: {"test": [80.0]} if job.method == "sgd_tlr_pl" else {}]}),
        (6, {"also": [lambda job: {"watched": [[0.2, 0.1, 0.1, 0.1]]} if job.method == "sgd_tlr_pl" else {}]}),
        (7, {"ratio": 1.06}),
    ],
)
def test_each_criterion_of_trainable_can_fail(fails, changes):
    assert not held(trainable.EXPERIMENT, tlr_runs(**changes))[fails]


def test_variations_of_trainable_are_compared_at_their_own_rates_and_batch():
    runs = tlr_runs()
    assert trainable_shown.values_of(runs, "bound") == [0.1, 0.25, 1.0, 5.0, 10.0]
    of = trainable_shown.varied(runs, "bound", 0.25)
    assert {(run["lr"], run["batch"]) for run in of} == {(0.001, 256), (0.1, 256)}
    assert len(of) == 2 * 3


def rival_runs(results: dict[str, tuple[float, float, float]]) -> list[dict]:
    """Digits alone; accuracies with the number too small, as recommended, too large."""
    runs = made_up(
        rivals.EXPERIMENT,
        lambda job: (
            trained(results.get(job.method, (90.0,) * 3)[[1e-3, 1.0, 1e3].index(job.factor)])
            if hasattr(job, "factor")
            else {}
        ),
    )
    return [run for run in runs if run.get("task") == "digits"]


def test_rivals_are_compared_in_units_of_half_a_point_against_adamw_with_a_cosine():
    runs = rival_runs({"AdamW, cosine": (40.0, 94.0, 10.0), "ActiveAdamW": (93.5, 93.5, 60.0), "Prodigy": (92.0,) * 3})
    assert rivals_shown.deficits(runs, "digits", "ActiveAdamW") == {1e-3: 1.0, 1.0: 1.0, 1e3: 68.0}
    assert rivals_shown.FLOOR.is_reached(runs)
    good, adamw, prodigy, *_ = held(rivals.EXPERIMENT, runs)
    assert (good, adamw, prodigy) == (True, True, False)
    runs = rival_runs({"AdamW, cosine": (40.0, 91.0, 10.0), "ActiveAdamW": (93.5, 90.0, 5.0), "Prodigy": (4.0,) * 3})
    assert not rivals_shown.FLOOR.is_reached(runs)
    good, adamw, prodigy, *_ = held(rivals.EXPERIMENT, runs)
    assert (good, adamw, prodigy) == (False, False, True)


def test_a_rival_that_diverges_is_the_worst_there_is():
    runs = rival_runs({"AdamW, cosine": (94.0,) * 3})
    for run in runs:
        if (run["method"], run["factor"], run["seed"]) == ("Prodigy", 1e3, 1):
            run["test"][-1] = None
    assert rivals_shown.worst(runs, "digits", "Prodigy") == math.inf
    assert "diverged" in rivals.EXPERIMENT.table(runs)


def test_two_policies_together_are_compared_with_each_alone():
    def runs(together_loses: float):
        alone = {"plain": 40.0, "ActiveLR": 4.0, "TrainableLR": 3.0, "AALR": 2.0}
        return made_up(
            together.EXPERIMENT,
            lambda job: trained(86.0 - (job.rate == 5e-6) * alone.get(job.method, together_loses)),
        )

    assert held(together.EXPERIMENT, runs(1.0)) == [True, True, True]
    assert held(together.EXPERIMENT, runs(2.5)) == [True, False, True]


# ---- surfaces and rules ----


def test_the_printed_start_of_the_bivariate_surface_is_a_saddle_where_nothing_moves():
    multimodal = surfaces.multimodal
    for place, kinds in (((-4.0, 6.0), (-1, 1)), ((0.0, -2.0), (1, 1)), ((1.0, -1.5), (-1, 1))):
        p = torch.tensor(place, dtype=torch.float64)
        assert torch.autograd.functional.jacobian(multimodal, p).abs().max() == 0
        curvatures = torch.linalg.eigvalsh(torch.autograd.functional.hessian(multimodal, p))
        assert tuple(curvatures.sign().int().tolist()) == kinds
    run = surfaces.train(surfaces.Job("at the start", surfaces.PAPERS, 0.01, 5))
    assert run["points"] == [[-4.0, 6.0]] * 6


def test_active_adam_leaves_the_saddle_in_twelve_steps_and_adam_does_not():
    found = [surfaces.train(surfaces.Job("saddle", method, 0.01, 12)) for method in ("Adam", surfaces.PAPERS)]
    assert surfaces.reaches_minimum(found[0]) is None
    step = surfaces.reaches_minimum(found[1])
    assert step is not None
    assert step <= 12
    assert found[0]["points"][1] == pytest.approx([0.49, 0.02])  # Adam's first step is the rate, along each axis


def test_each_rule_does_what_it_is_called():
    down = [rules.changed(1.0, rule, agreement=False) for rule in rules.RULES]
    up = [rules.changed(1.0, rule, agreement=True) for rule in rules.RULES]
    assert down == pytest.approx([0.9, 0.9, 0.9, 0.9])
    assert up == pytest.approx([1.1, 1.1, 1.1, 1.1])
    assert [rules.changed(2.0, rule, agreement=False) for rule in rules.RULES] == pytest.approx([1.8, 1.8, 1.9, 1.9])
    assert [rules.changed(2.0, rule, agreement=True) for rule in rules.RULES] == pytest.approx([2.1, 2.2, 2.1, 2.2])


def test_our_active_sgd_takes_the_papers_rule():
    run = rules.train(rules.Job(rules.OURS, 400, 0))
    steps = [b / a if b < a else b - a for a, b in zip(run["rates"][1:], run["rates"][2:], strict=False)]
    assert all(min(abs(step - 0.9), abs(step - 0.1)) < 2e-3 for step in steps)  # rates are kept with four digits
    assert {round(step, 1) for step in steps} == {0.1, 0.9}


# ---- parts of trainings ----


def test_a_cosine_begins_with_a_warm_up_and_ends_at_0():
    factors = [training.warm_up_and_cosine(step, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert training.warm_up_and_cosine(0, 100, warm_up=0.0) == 1.0


@pytest.mark.parametrize("cls", [torch.optim.SGD, fa.SGD])
def test_a_schedule_sets_the_rate_of_each_step(cls):
    p = torch.zeros(1, requires_grad=True)
    optimizer = training.scheduled(cls([p], lr=1.0), lambda step: 0.5**step)
    moves = []
    for _ in range(3):
        before = p.item()
        p.grad = torch.ones(1)
        optimizer.step()
        moves.append(before - p.item())
    assert moves == [1.0, 0.5, 0.25]


def test_an_optimizer_with_weights_to_evaluate_at_is_judged_there():
    class Averaging(torch.optim.SGD):
        calls: list[str] = []  # noqa: RUF012

        def eval(self) -> None:
            self.calls.append("eval")

        def train(self) -> None:
            self.calls.append("train")

    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    norm, optimizer = model[1], Averaging(model.parameters(), lr=0.1)
    with training.ready_to_be_judged(model, optimizer, torch.randn(130, 1, 5, 5), 64):
        assert optimizer.calls == ["eval"]
        assert norm.num_batches_tracked == 3
    assert optimizer.calls == ["eval", "train"]


def test_times_are_ratios_to_the_first_of_the_same_round(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    order = []

    def takes(name: str, seconds: float):
        def step() -> None:
            order.append(name)
            clock[0] += seconds * (1 + len(order) // 3)  # the machine gets slower and slower

        return step

    found = timing.by_turns({"a": takes("a", 1.0), "b": takes("b", 2.0), "c": takes("c", 1.0)}, rounds=30)
    assert found["ratio"]["a"] == 1
    assert found["ratio"]["b"] == pytest.approx(2, rel=0.05)
    assert found["ratio"]["c"] == pytest.approx(1, rel=0.05)
    assert order[3:9] == ["a", "b", "c", "b", "c", "a"]


@pytest.mark.parametrize(("policy", "bytes_"), [(None, 8), (fa.ActiveLR(interval=5), 17)])
def test_state_is_counted_in_bytes_a_parameter(policy, bytes_):
    p = torch.zeros(100, requires_grad=True)
    p.grad = torch.ones(100)
    optimizer = fa.AdamW([p], lr=1e-3, policy=policy)
    optimizer.step()
    assert rivals.state_bytes(optimizer) == bytes_ * 100


def test_an_attack_raises_the_loss_within_the_pixels_range():
    torch.manual_seed(0)
    images, labels = torch.rand(20, 1, 8, 8), torch.randint(10, (20,))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    attacked = controllers._attack(images)(model, images, labels)
    loss = torch.nn.functional.cross_entropy
    assert loss(model(attacked), labels) > loss(model(images), labels)
    assert (attacked - images).abs().max() <= controllers.EPSILON * 1.0001
    assert attacked.min() >= images.min()
    assert attacked.max() <= images.max()


def test_the_wide_network_is_wrn_16_4():
    model = WideResNet(16, 4)
    # 2 748 890 with three input channels (Zagoruyko and Komodakis: 2.7 M); a grey image has two fewer.
    assert sum(p.numel() for p in model.parameters()) == 2_748_890 - 2 * 16 * 9
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
