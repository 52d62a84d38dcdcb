"""bfloat16 parameters with exact float32 masters, and stochastic rounding: bit for bit in every backend."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive import backends
from fused_adaptive.backends import reference
from fused_adaptive.core import masters
from fused_adaptive.core.philox import philox4x32

from ..common.breaking import broken, fails
from ..common.cases import BACKENDS, CASES, Case, Gradients, all_equal, parameters, state_of, train
from ..parity.test_parity import many_layouts

every_backend = pytest.mark.parametrize("backend", BACKENDS)
SOME_CASES = [c for c in CASES if c.optimizer in ("SGD-momentum", "AdamW", "AdaBelief-plain")]


def to_bfloat16(params: list[Tensor]) -> list[Tensor]:
    """Returns copies in the same layout, with values that float32 training starts from too."""
    return [p.detach().to(torch.bfloat16).requires_grad_() for p in params]


def same_gradients(params: list[Tensor], others: list[Tensor], step: int) -> None:
    """Sets equal gradients: bfloat16 for bfloat16 parameters, the same values in float32 for the others."""
    Gradients(missing=0.15).set(params, step)
    for p, q in zip(params, others, strict=True):
        q.grad = None if p.grad is None else p.grad.to(q.dtype)


def masters_are_those_of_float32_training(case: Case, backend: str) -> bool:
    """Returns whether masters and all other state are those of float32 training, bit for bit."""
    halves = to_bfloat16(many_layouts(torch.float32))
    whole = [p.detach().float().requires_grad_() for p in halves]
    assert all(p.stride() == q.stride() for p, q in zip(halves, whole, strict=True))
    ours, theirs = case.build(halves, backend=backend, master="split"), case.build(whole, backend=backend)
    for step in range(8):
        same_gradients(halves, whole, step)
        ours.step()
        theirs.step()
    found = [masters.join(p.detach(), ours.state[p]["master_low"]) for p in halves]
    state = {n: v for n, v in state_of(ours).items() if "master" not in n}
    expected = state_of(theirs)
    equal = all_equal(found, whole) and all(map(torch.equal, state.values(), [expected[n] for n in state]))
    # The distance to the parameter is that of rounding to nearest even.
    off = [((p.float() - w).abs(), (w.bfloat16().float() - w).abs()) for p, w in zip(halves, whole, strict=True)]
    near = all((ours <= theirs).all() for ours, theirs in off)
    return equal and near and len(state) == len(expected)


@pytest.mark.thinned
@pytest.mark.feature("exact float32 masters of bfloat16 parameters")
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
@every_backend
def test_the_master_equals_the_weight_of_float32_training(backend, case):
    assert masters_are_those_of_float32_training(case, backend)


def to_nearest_even(weight: Tensor) -> tuple[Tensor, Tensor]:
    high = weight.to(torch.bfloat16)
    rest = weight.view(torch.int32) - (high.view(torch.int16).to(torch.int32) << 16)
    return high, rest.clamp(-(2**15), 2**15 - 1).to(torch.int16)


def truncated(weight: Tensor) -> tuple[Tensor, Tensor]:
    bits = weight.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


@pytest.mark.parametrize("wrong", [to_nearest_even, truncated])
def test_halves_that_lose_a_bit_are_noticed(wrong):
    """Nearest even loses the remainder of 1 in 131 072 elements; truncation loses that of half of them."""
    with broken(masters, "split", wrong):
        assert fails(lambda: every_bit_is_kept() and masters_are_those_of_float32_training(SOME_CASES[0], "reference"))


def every_bit_is_kept() -> bool:
    bits = torch.cat([torch.arange(-(2**16), 2**16) + s for s in (0, 0x3F800000, 0x7F7F0000, -(2**31) + 2**16)])
    weight = bits.to(torch.int32).view(torch.float32)
    weight = weight[~weight.isnan()]
    high, low = masters.split(weight)
    as_int = (high.view(torch.int16).to(torch.int64) << 16) + low
    wrapped = (as_int + 2**31) % 2**32 - 2**31
    return torch.equal(masters.join(high, low).view(torch.int32), weight.view(torch.int32)) and torch.equal(
        wrapped, weight.view(torch.int32).to(torch.int64)
    )


def test_splitting_a_weight_keeps_every_bit():
    assert every_bit_is_kept()
    high, low = masters.split(torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.00390625]))
    assert high[0].isnan()
    assert high[1:3].tolist() == [math.inf, -math.inf]
    assert masters.join(high, low)[0].isnan()
    assert high[4] == 1.0078125  # halfway, rounded away from zero; nearest even is 1
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001]).to(torch.int32).view(torch.float32)
    assert masters.split(odd)[0].isnan().all()  # not a zero of the other sign


@every_backend
def test_extreme_and_nonfinite_weights_are_kept(backend):
    """Weights near the largest and smallest number, NaN and infinity, through steps with and without movement."""
    weights = torch.tensor([3.4028234e38, -3.4e38, 1e-42, -1e-45, 0.0, -0.0, 1.0, math.nan])
    model = torch.nn.ParameterList([torch.zeros(8, dtype=torch.bfloat16)])
    optimizer = fa.SGD(model.parameters(), lr=1.0, master="split", backend=backend)
    fa.import_fp32(model, optimizer, {"0": weights})
    model[0].grad = torch.zeros(8, dtype=torch.bfloat16)
    optimizer.step()
    exported = fa.export_fp32(model, optimizer)["0"]
    assert torch.equal(exported[:-1], weights[:-1])
    assert exported[-1].isnan()
    model[0].grad.fill_(1.0)
    optimizer.step()
    assert torch.equal(fa.export_fp32(model, optimizer)["0"][:-1], weights[:-1] - 1)


@every_backend
def test_a_master_takes_two_more_bytes_per_parameter(backend):
    p = torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True)
    optimizer = fa.AdamW([p], master="split", backend=backend)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    extra = optimizer.state[p]["master_low"]
    assert (extra.dtype, extra.shape) == (torch.int16, p.shape)
    assert {name for name, v in optimizer.state[p].items() if v.dim()} == {"exp_avg", "exp_avg_sq", "master_low"}


@every_backend
def test_small_updates_are_not_lost(backend):
    """Takes a thousand steps of a thousandth: a plain bfloat16 parameter does not move."""
    ends = {}
    for master in masters.CHOICES:
        p = torch.full((4096,), 256.0, dtype=torch.bfloat16, requires_grad=True)
        optimizer = fa.SGD([p], lr=1e-3, master=master, backend=backend)
        p.grad = torch.ones_like(p)
        for _ in range(1000):
            optimizer.step()
        ends[master] = p.detach().float().mean().item()
    assert ends["none"] == 256.0
    assert ends["split"] == pytest.approx(255.0)
    assert ends["stochastic"] == pytest.approx(255.0, abs=0.06)  # 4096 walks, each with a deviation of 1: 4 sigma


def mixed() -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"first": torch.nn.Linear(5, 3).bfloat16(), "second": torch.nn.Linear(3, 2)})


@every_backend
@pytest.mark.parametrize("master", ["split", "stochastic"])
def test_parameters_of_other_dtypes_have_no_master(backend, master):
    model = mixed()
    twin = copy.deepcopy(model)
    ours = fa.AdamW(model.parameters(), lr=0.1, master=master, backend=backend)
    plain = fa.AdamW(twin.parameters(), lr=0.1, backend=backend)
    for step in range(3):
        Gradients().set(list(model.parameters()), step)
        Gradients().set(list(twin.parameters()), step)
        ours.step()
        plain.step()
    assert all_equal(list(model["second"].parameters()), list(twin["second"].parameters()))
    names = {name for values in ours.state.values() for name in values}
    assert names - {"step", "exp_avg", "exp_avg_sq"} == {"master_low" if master == "split" else "rounding_step"}
    assert "master_low" not in ours.state[model["second"].weight]


@every_backend
@pytest.mark.parametrize("after", [0, 3])
def test_export_and_import_are_inverse(backend, after):
    """Also before the first step, and into another run, which continues with the same bits."""
    torch.manual_seed(1)
    runs = []
    policy = fa.TrainableLR(interval=2, source="displacement")
    for _ in range(2):
        model = mixed()
        runs.append((model, fa.SGD(model.parameters(), lr=0.1, policy=policy, master="split", backend=backend)))
    (model, ours), (other, theirs) = runs
    for optimizer in (ours, theirs):
        train(optimizer, after)
    weights = {name: torch.randn_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for m, optimizer in runs:
        fa.import_fp32(m, optimizer, weights)
        optimizer.restart_interval()
        exported = fa.export_fp32(m, optimizer)
        assert all(torch.equal(exported[name], weight) for name, weight in weights.items())
        assert all(v.dtype == torch.float32 and not v.requires_grad for v in exported.values())
    train(ours, 5)
    train(theirs, 5)
    assert all_equal(list(fa.export_fp32(model, ours).values()), list(fa.export_fp32(other, theirs).values()))
    starts = [ours.state[p]["interval_start"] for p in model.parameters()]
    assert all(s.dtype == torch.float32 for s in starts)


def test_sharded_parameters_are_exported_as_local_parts(tmp_path):
    """One rank shows whether parts are taken for the whole."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        weight = distribute_tensor(torch.randn(6, 3), mesh, [Shard(0)])
        model = torch.nn.ParameterList([torch.nn.Parameter(weight.bfloat16())])
        optimizer = fa.AdamW(model.parameters(), master="split")
        fa.import_fp32(model, optimizer, {"0": weight})
        found = fa.export_fp32(model, optimizer)["0"]
        assert isinstance(found, DTensor)
        assert found.placements == (Shard(0),)
        assert torch.equal(found.to_local(), weight.to_local())
    finally:
        dist.destroy_process_group()


def test_imports_that_do_not_fit_change_nothing():
    model = mixed()
    optimizer = fa.SGD(model.parameters(), master="split")
    weights = fa.export_fp32(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
    for bad, message in (
        ({**zeros, "more": torch.zeros(1)}, "no parameter more"),
        ({name: w for name, w in zeros.items() if name != "first.bias"}, "lack first.bias"),
        ({**zeros, "second.bias": torch.zeros(7)}, r"second.bias has shape \(7,\) instead of \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fa.import_fp32(model, optimizer, bad)
    assert all_equal(before, list(model.parameters()))


@every_backend
@pytest.mark.parametrize("master", ["split", "stochastic"])
@pytest.mark.parametrize("policy", ["active", "tlr-preconditioned-tensor"])
def test_training_continues_bit_for_bit_after_a_checkpoint(backend, master, policy, tmp_path):
    case = Case("SGD-momentum", policy, True)
    params = parameters(torch.bfloat16)
    optimizer = case.build(params, master=master, rounding_seed=7, backend=backend)
    train(optimizer, 4)
    torch.save({"state": optimizer.state_dict(), "params": [p.detach() for p in params]}, tmp_path / "checkpoint")
    train(optimizer, 5, start=4)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    others = [p.requires_grad_() for p in saved["params"]]
    resumed = case.build(others, master="none", rounding_seed=1, backend=backend)
    resumed.load_state_dict(saved["state"])  # hyperparameters of the checkpoint are used
    assert resumed.param_groups[0]["master"] == master
    train(resumed, 5, start=4)
    assert all_equal(params, others)
    assert all(torch.equal(v, state_of(resumed)[name]) for name, v in state_of(optimizer).items())


def test_displacements_are_measured_on_the_master():
    """At a rate below bfloat16's resolution a plain parameter does not move, so its displacement is 0."""
    gains = {}
    for master in ("none", "split"):
        p = torch.full((64,), 256.0, dtype=torch.bfloat16, requires_grad=True)
        policy = fa.TrainableLR(interval=2, source="displacement")
        optimizer = fa.SGD([p], lr=1e-4, policy=policy, master=master)
        for _ in range(6):
            p.grad = torch.ones_like(p)
            optimizer.step()
        gains[master] = optimizer.state[p]["gain"].item()
    assert gains["none"] == 1.0
    assert gains["split"] == pytest.approx(1.25**2)


def test_masters_can_be_turned_on_between_steps():
    params = parameters(torch.bfloat16)
    optimizer = fa.AdamW(params, lr=0.01)
    train(optimizer, 2)
    optimizer.param_groups[0]["master"] = "split"
    train(optimizer, 2, start=2)
    assert all("master_low" in optimizer.state[p] for p in params)
    assert any(optimizer.state[p]["master_low"].any() for p in params)


# ---- stochastic rounding ----


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Another implementation of Philox4x32-10, for scalars."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_random_bits_match_the_definition():
    seed, step, index = 2**40 + 5, 3, 6
    bits = masters.random_bits(21, seed, torch.tensor(step), index)
    for e in (0, 1, 7, 8, 20):
        words = philox_in_python([e // 8, step, index, 2**31], [seed % 2**32, seed >> 32])
        assert bits[e] == words[e % 8 // 2] >> 16 * (e % 2) & 0xFFFF
    known = philox4x32(tuple(torch.tensor(0) for _ in range(4)), (0, 0))  # type: ignore[arg-type]
    assert [int(w) for w in known] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # from the authors' tests


@pytest.mark.skipif(len(BACKENDS) < 2, reason="the reference alone")
@pytest.mark.parametrize("case", [Case("SGD", "fixed", True), Case("SGD-momentum", "active", False)], ids=str)
def test_every_backend_rounds_the_same(case):
    """Float32 results are equal: steps by powers of two are exact in every backend."""
    runs = []
    for backend in BACKENDS:
        params = to_bfloat16(many_layouts(torch.float32))
        optimizer = fa.SGD(params, lr=2**-10, master="stochastic", rounding_seed=2**35 + 9, backend=backend)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = None if (i + step) % 5 == 0 else torch.full_like(p, 2.0**-step)
            optimizer.step()
        runs.append(params)
    for other in runs[1:]:
        assert all_equal(runs[0], other)


@pytest.mark.feature("stochastic rounding of bfloat16 parameters")
@every_backend
def test_stochastic_rounding_is_unbiased_and_depends_on_seed_step_and_tensor(backend):
    def once(seed: int, steps: int = 1, index: int = 0) -> Tensor:
        params = [torch.ones(8192, dtype=torch.bfloat16, requires_grad=True) for _ in range(index + 1)]
        optimizer = fa.SGD(params, lr=2**-10, master="stochastic", rounding_seed=seed, backend=backend)
        for _ in range(steps):
            params[index].data.fill_(1.0)
            params[index].grad = torch.ones_like(params[index])
            optimizer.step()
        return params[index].detach().float()

    first = once(0)
    assert set(first.tolist()) == {1.0, 1.0 - 2**-8}
    assert first.mean().item() == pytest.approx(1 - 2**-10, abs=4 * 2**-8 * 0.44 / math.sqrt(8192))
    assert torch.equal(first, once(0))
    for other in (once(1), once(2**32), once(0, steps=2), once(0, index=1)):
        assert 0.2 < (other != first).float().mean() < 0.55  # independent: 2 · ¼ · ¾


def test_steps_without_a_gradient_draw_no_random_bits():
    p = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
    optimizer = fa.SGD([p], lr=2**-10, momentum=0.5, master="stochastic")
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    optimizer.step()
    assert optimizer.state[p]["rounding_step"] == 1


def test_a_biased_rounding_is_noticed():
    with broken(masters, "random_bits", lambda count, *_: torch.zeros(count, dtype=torch.int64)):
        assert fails(
            lambda: test_stochastic_rounding_is_unbiased_and_depends_on_seed_step_and_tensor("reference") is None
        )


# ---- errors ----


@pytest.mark.parametrize("master", ["split", "stochastic"])
def test_float16_is_refused(master):
    params = parameters(torch.float16)
    with pytest.raises(ValueError, match=r"is for bfloat16 parameters, and one of shape \(7,\) is float16"):
        fa.AdamW(params, master=master)
    fa.AdamW(params)
    optimizer = fa.AdamW(parameters(torch.bfloat16), master=master)
    with pytest.raises(ValueError, match="float16"):
        optimizer.add_param_group({"params": params})
    assert len(optimizer.param_groups) == 1
    plain = fa.AdamW(params)
    with pytest.raises(ValueError, match="float16"):
        plain.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("master", ["Split", None, True])
def test_unknown_masters_are_refused(master):
    with pytest.raises(ValueError, match="master must be one of 'none', 'split', 'stochastic'"):
        fa.SGD(parameters(), master=master)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="rounding_seed must be an int"):
        fa.SGD(parameters(), rounding_seed=seed)


def test_a_backend_without_masters_raises_an_error(monkeypatch):
    monkeypatch.delattr(reference, "supports_masters")
    with pytest.raises(RuntimeError, match="backend 'reference' does not support master='split'"):
        fa.SGD(parameters(torch.bfloat16), master="split", backend="reference")
    optimizer: Any = fa.SGD(parameters(torch.bfloat16), backend="reference")
    optimizer.param_groups[0]["master"] = "stochastic"
    with pytest.raises(RuntimeError, match="does not support master='stochastic'"):
        train(optimizer, 1)
    backends.check_masters(reference, [{"master": "none"}, {}])
