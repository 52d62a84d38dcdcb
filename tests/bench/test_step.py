"""Measurements of the benchmarks: shapes, compositions that compute the same, fair turns."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch

from bench.step import compositions, measure, profiling, rivals, shapes, stats
from bench.step.algorithms import BACKBONES, POLICIES, Algorithm, policies
from bench.step.ceilings import null_contenders
from bench.step.compositions import AuthorsActiveAdamW, Composition
from bench.step.rivals import FAMILIES, Contender, Unavailable, contenders
from bench.step.shapes import ShapeList, parse

from ..common.cases import KERNELS, SHAPES, Gradients, parameters

CPU = torch.device("cpu")
ALGORITHMS = [a for b in BACKBONES for p in POLICIES if not (a := Algorithm(b, p)).why_not()]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)


# ---- shapes ----


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),
        ("vit-b", 152, 86_567_656),
        ("7b", 8 * 9, 8 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096)),
        ("10x5M", 10, 50_000_000),
        ("10000x64", 10_000, 640_000),
        ("1e7", 1, 10_000_000),
        ("20x1e4", 20, 200_000),
    ],
)
def test_shape_lists_match_the_published_models(name, tensors, numel):
    found = parse(name)
    assert (len(found.shapes), found.numel) == (tensors, numel)


def test_the_small_transformer_matches_torchs_module():
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256)
    built = sum(p.numel() for p in layer.parameters())
    two, one = (ShapeList("", shapes.vit_b(layers=n, width=64)).numel for n in (2, 1))
    assert two - one == built


def test_odd_sizes_fill_no_vector_and_views_are_misaligned():
    assert all(size % 4 for (size,) in parse("odd").shapes)
    made = ShapeList("", [(5, 3), (7,)], offset=1).tensors(CPU, torch.float32)
    copies = [measure.like(t) for t in made]
    assert [t.data_ptr() % 16 for t in (*made, *copies)] == [4] * 4
    assert all(torch.equal(a, b) for a, b in zip(made, copies, strict=True))
    assert not measure.like(torch.ones(5))._is_view()


def test_large_tensors_are_random_in_every_part(monkeypatch):
    monkeypatch.setattr(shapes, "REPEATS_AFTER", 100)
    (made,) = ShapeList("", [(250,)]).tensors(CPU, torch.float32)
    assert made.unique().numel() == 100
    assert made.count_nonzero() == 250


@pytest.mark.parametrize("name", ["resnet51", "1e", "0", "x5"])
def test_an_unknown_shape_list_is_named_in_the_error(name):
    with pytest.raises(ValueError, match=name):
        parse(name)


# ---- streams ----


@pytest.mark.parametrize(
    ("backbone", "policy", "single", "half", "state"),
    [
        ("SGD", "fixed", 20, 14, 4),
        ("AdamW", "fixed", 28, 22, 8),
        ("SGD", "active", 32, 26, 13),
        ("AdaBelief", "active", 40, 34, 17),
        ("AdamW", "trainable", 36, 30, 16),
        ("SGD", "displacement", 20, 14, 12),
        ("SGD", "hypergradient", 28, 20, 4),
        ("RAdam", "hypergradient", 40, 32, 8),
    ],
)
def test_bytes_of_a_step(backbone, policy, single, half, state):
    algorithm = Algorithm(backbone, policy)
    assert algorithm.streams.bytes(torch.float32) == single
    assert algorithm.streams.bytes(torch.bfloat16) == half
    assert algorithm.state_bytes == state


@every_algorithm
def test_state_bytes_match_our_state(algorithm):
    params = [torch.randn(5000).requires_grad_()]
    params[0].grad = torch.randn(5000)
    optimizer = algorithm.build(params, "reference")
    optimizer.step()
    found = measure.state_bytes(optimizer, 5000)
    assert found == pytest.approx(algorithm.state_bytes, abs=0.05)


# ---- rivals ----


def deviation(algorithm: Algorithm, other: Any, shapes: Any = SHAPES, dtype: torch.dtype = torch.float64) -> float:
    """Returns the largest difference to the reference backend's parameters in ten steps, with intervals of three."""
    params, copies = parameters(dtype, shapes), parameters(dtype, shapes)
    cls, arguments, _ = BACKBONES[algorithm.backbone]
    decay = {"weight_decay": 3.0} if algorithm.backbone in ("AdamW", "AdaBelief") else {}
    policy: Any = policies(3)[algorithm.policy]
    ours = cls(params, lr=0.1, policy=policy, backend="reference", **arguments, **decay)
    theirs = other(copies, interval=3, lr=0.1, **decay)
    worst = 0.0
    for step in range(10):
        Gradients().set(params, step)
        Gradients().set(copies, step)
        ours.step()
        theirs.step()
        worst = max(worst, *((p - q).abs().max().item() for p, q in zip(params, copies, strict=True) if p.numel()))
    return worst


@every_algorithm
def test_the_composition_agrees_with_the_reference(algorithm):
    assert deviation(algorithm, lambda p, **k: Composition(p, algorithm, **k)) < 1e-12


def test_another_algorithm_does_not_agree_with_the_reference():
    active, fixed = Algorithm("AdamW", "active"), Algorithm("AdamW")
    assert deviation(active, lambda p, **k: Composition(p, fixed, **k)) > 1e-3


def test_the_authors_active_adamw_agrees_with_the_reference():
    assert deviation(Algorithm("AdamW", "active"), AuthorsActiveAdamW) < 1e-12


def test_the_authors_active_adamw_with_another_low_does_not_agree(monkeypatch):
    monkeypatch.setattr(compositions, "LOW", 0.91)
    assert deviation(Algorithm("AdamW", "active"), AuthorsActiveAdamW) > 1e-4


def test_the_authors_active_adamw_has_twenty_operations_per_tensor():
    params = [torch.randn(4).requires_grad_() for _ in range(3)]
    for p in params:
        p.grad = torch.randn(4)
    optimizer = AuthorsActiveAdamW(params)
    assert measure.count_launches(optimizer.step, CPU) == 20 * 3


@pytest.mark.heavy
def test_a_compiled_composition_gives_the_same_results():
    algorithm = Algorithm("AdamW", "active")
    # No 0-dimensional tensors: torch.compile does not copy them at an interval's end (torch 2.13).
    found = deviation(algorithm, lambda p, **k: Composition(p, algorithm, compiled=True, **k), [(7,), (3, 5)])
    assert found < 1e-12


def by_name(families: Any = FAMILIES, backbone: str = "AdamW", tensors: int = 2) -> dict[str, Contender]:
    found = contenders(backbone, ("fixed", "active"), ("native",), families, torch.float32, CPU, tensors)
    return {f"{c.name} ({c.algorithm})": c for c in found}


def test_all_contenders_are_in_the_list():
    names = " ".join(by_name())
    for name in ("ours, native", "torch fused", "torch foreach", "torch for-loop", "torch.compile of torch's"):
        assert f"{name} (AdamW)" in names
    for name in ("ours, native", "foreach composition", "torch.compile of it", "as the authors wrote it"):
        assert f"{name} (AdamW + active)" in names
    for name in ("torch-optimi", "pytorch_optimizer StableAdamW", "flashoptim", "bitsandbytes, 32 bit"):
        assert name in names
    assert {c.family for c in by_name(("ours", "torch")).values()} == {"ours", "torch"}
    assert "foreach composition (AdaBelief)" in by_name(backbone="AdaBelief")


def test_a_contender_that_cannot_run_gives_the_reason(monkeypatch):
    def why(name: str, **arguments: Any) -> str:
        entry = measure.Entry(by_name(**arguments)[name], 8, torch.float32, CPU)
        entry.set_up([torch.randn(8)], 1, [[torch.randn(8)]])
        return entry.why_not

    def missing(package: str) -> None:
        raise Unavailable(f"not installed: pip install {package}")

    monkeypatch.setattr(rivals, "_need", missing)
    assert why("torch-optimi (AdamW)") == "not installed: pip install torch-optimi"
    assert why("bitsandbytes, 32 bit (AdamW)") == "runs on GPUs only"
    assert why("torch fused (RAdam)", backbone="RAdam") == "torch.optim.RAdam has no fused form"
    assert "5000 tensors" in why("torch.compile of it (AdamW + active)", tensors=5000)
    assert why("torch fused (AdamW)") == ""


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("family", ["optimi", "pytorch_optimizer"])
def test_rival_packages_can_be_called(backbone, family):
    pytest.importorskip(family)
    for contender in by_name((family,), backbone).values():
        p = torch.randn(8).requires_grad_()
        p.grad = torch.randn(8)
        before = p.detach().clone()
        optimizer = contender.build([p])
        for _ in range(8):  # RAdam may not move while its variance is unknown
            optimizer.step()
        assert not torch.equal(p, before)


# ---- turns ----


class Recorder:
    """A step that takes a given time, on a clock that only steps advance."""

    def __init__(self, name: str, cost: float, log: list[str], clock: list[float]) -> None:
        self.name, self.cost, self.log, self.clock = name, cost, log, clock

    def step(self) -> None:
        self.log.append(self.name)
        self.clock[0] += self.cost


def turns_of(costs: dict[str, float], monkeypatch) -> tuple[list[str], list[measure.Entry]]:
    """Returns the order of the steps of contenders with these costs in seconds."""
    log: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    entries = []
    for name, cost in costs.items():
        contender = Contender(name, "torch", Algorithm("AdamW"), lambda _, n=name, c=cost: Recorder(n, c, log, clock))
        entry = measure.Entry(contender, 8, torch.float32, CPU)
        entry.set_up([torch.randn(8)], 1, [[torch.randn(8)]])
        entries.append(entry)
    log.clear()
    measure._take_turns(entries, [[torch.randn(8)]], measure.Sampling(samples=40, least=4, seconds=2.0), False)
    return log[len(entries) :], entries  # without the first step of each, which measures its speed


def test_contenders_alternate_and_slow_ones_have_fewer_turns(monkeypatch):
    log, entries = turns_of({"fast": 0.01, "slow": 1.0}, monkeypatch)
    assert log.count("fast") == 40
    assert log.count("slow") == 4
    places = [i for i, name in enumerate(log) if name == "slow"]
    assert all(b - a in (10, 11, 12) for a, b in pairwise(places))
    assert entries[1].seconds == pytest.approx([1.0] * 4)


def test_every_contender_follows_every_other(monkeypatch):
    log, _ = turns_of({"a": 0.01, "b": 0.01, "c": 0.01}, monkeypatch)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 40
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    follows = Counter(pairwise(log))
    assert min(follows[a, b] for a, b in permutations("abc", 2)) >= 8


def test_device_host_and_waiting_are_timed_separately_on_a_gpu(monkeypatch):
    """Records the order of calls, with CUDA's replaced since there is no GPU here."""
    calls: list[str] = []

    class Event:
        def __init__(self, **_: bool) -> None: ...

        def record(self) -> None:
            calls.append("event")

        def elapsed_time(self, _: Event) -> float:
            return 2.5

    class Step:
        def step(self) -> None:
            calls.append("step")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: calls.append("keep busy"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: calls.append("wait"))
    contender = Contender("", "torch", Algorithm("AdamW"), lambda _: Step())
    entry = measure.Entry(contender, 4, torch.float32, torch.device("cuda"))
    entry.set_up([torch.randn(4)], 1, [[torch.randn(4)]])
    entry.turn([[torch.randn(4)]], keep_warm=False)
    assert calls == ["keep busy", "event", "step", "event", "wait", "wait", "step", "wait"]
    assert entry.seconds == [0.0025]
    assert len(entry.wall) == len(entry.host) == 1
    assert entry.wall[0] >= entry.host[0]


def test_every_step_has_gradients_at_new_addresses():
    seen = []

    class Look:
        def step(self) -> None:
            seen.append(params[0].grad.data_ptr())

    entry = measure.Entry(Contender("", "torch", Algorithm("AdamW"), lambda _: Look()), 4, torch.float32, CPU)
    grads = [[torch.randn(4)], [torch.randn(4)]]
    entry.set_up([torch.randn(4)], 1, grads)
    params = entry.params[0]
    for _ in range(4):
        entry.turn(grads, keep_warm=False)
    assert seen[0] != seen[1]
    assert seen == [seen[0], seen[1]] * 2


@pytest.mark.parametrize(
    ("seconds", "placement"),
    [
        ([9e-8], "near"),
        ([4e-7], "apart"),
        ([7e-6, 9e-8], "near"),  # threads that were just woken
        ([7e-6] * 5, "on one core"),
    ],
)
def test_the_time_of_a_round_trip_tells_where_threads_are(monkeypatch, seconds, placement):
    left = iter(seconds)
    monkeypatch.setattr(profiling.library, "why_not", lambda: "")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.ops.fused_adaptive, "round_trip", lambda: next(left), raising=False)
    assert profiling.placement_of_threads() == placement
    assert not list(left)


@pytest.mark.skipif("native" not in KERNELS, reason="the native library is not built")
def test_a_round_trip_needs_two_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert 1e-8 < torch.ops.fused_adaptive.round_trip() < 1e-2
        assert profiling.placement_of_threads() in ("near", "apart", "on one core")
        torch.set_num_threads(1)
        assert torch.ops.fused_adaptive.round_trip() == math.inf
        assert profiling.placement_of_threads() == ""
    finally:
        torch.set_num_threads(threads)


def test_samples_are_split_by_the_placement_of_the_threads(monkeypatch):
    class Nothing:
        def step(self) -> None: ...

    placements = iter(["near", "apart", "near", "apart", "near", "apart", "near", "on one core"])
    monkeypatch.setattr(measure, "placement_of_threads", lambda: next(placements))
    entry = measure.Entry(Contender("", "torch", Algorithm("AdamW"), lambda _: Nothing()), 4, torch.float32, CPU)
    assert [(row["threads"], row["seconds"]) for row in entry.rows()] == [("", [])]
    grads = [[torch.randn(4)]]
    entry.set_up(grads[0], 1, grads)
    for _ in range(8):
        entry.turn(grads, keep_warm=False)
    rows = {row["threads"]: row["seconds"] for row in entry.rows()}
    assert {threads: len(seconds) for threads, seconds in rows.items()} == {"near": 4, "apart": 3}
    assert rows["apart"] == [measure.rounded(entry.seconds[i]) for i in (1, 3, 5)]


@pytest.mark.skipif("native" not in KERNELS, reason="the native library is not built")
def test_sizes_depend_on_caches_and_memory(monkeypatch):
    monkeypatch.setattr(measure, "cache_bytes", lambda _: 50_000)
    taking_part = [*by_name(("ours",)).values(), *null_contenders([Algorithm("AdamW")], CPU)]
    sampling = measure.Sampling(2, 1, 1, 0.01)
    small = measure.run_case(taking_part, parse("1e3"), torch.float32, CPU, sampling)
    assert [row["cache"] for row in small] == ["cold"] * 3 + ["warm"] * 3
    large = measure.run_case(taking_part, parse("2x1e5"), torch.float32, CPU, sampling)
    assert [row["cache"] for row in large] == ["large"] * 3
    ours = next(row for row in large if row["policy"] == "active" and row["family"] == "ours")
    assert (ours["bytes"], ours["launches"]) == (40 * 200_000, 1)
    monkeypatch.setattr(measure, "available_memory", lambda _: 2e5 * 4 * 2 / 0.9 + 2e5 * 13 / 0.9)
    rows = measure.run_case(taking_part, parse("2x1e5"), torch.float32, CPU, sampling)
    assert rows[0]["why_not"] == ""  # AdamW needs 12 bytes per parameter
    assert rows[1]["why_not"].startswith("not enough memory: needs 0.0 GB")
    assert rows[1]["seconds"] == []


# ---- statistics ----


def test_summaries_lines_and_intervals():
    found = stats.summarize([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (found.median, found.p20, found.p80) == (3.5, 2.0, 5.0)
    assert found.is_noisy
    assert not stats.summarize([1.0, 1.01, 1.02]).is_noisy
    intercept, slope = stats.fit_line([10, 100, 1000], [0.5 + 2 * n for n in (10, 100, 1000)])
    assert (intercept, slope) == (pytest.approx(0.5), pytest.approx(2.0))
    low, ratio, high = stats.ratio_interval([2.0, 2.1, 1.9] * 10, [1.0, 1.05, 0.95] * 10)
    assert low < ratio < high
    assert math.isclose(ratio, 2.0)
