"""Clipping in the step: ``max_grad_norm`` against ``clip_grad_norm_`` followed by ``step``, and skipped steps."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import fused_adaptive as fa
from fused_adaptive.engine import clipping
from fused_adaptive.optimizers import base as optimizer

from ..common.breaking import NoSynchronisation, broken, fails
from ..common.cases import BACKENDS, Case, Gradients, all_equal, parameters, state_of

every_backend = pytest.mark.parametrize("backend", BACKENDS)
POLICIES = ["fixed", "active", "tlr-gradient-global", "hypergradient-global", "tlr-times-active"]
#: Below and above the norms of random gradients of these parameters, which are around 14.
TIGHT, LOOSE = 1.0, 1e3


def two_groups(case: Case, params: list[Tensor], **overrides: Any) -> Any:
    return case.build([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], **overrides)


def clips_as_torch(case: Case, backend: str, dtype: torch.dtype, max_norm: float) -> bool:
    """Compares parameters, state and norms: bit for bit, in float64 but for roundings. Gradients must not change."""
    runs = []
    for ours in (True, False):
        params = parameters(dtype)
        built = two_groups(case, params, backend=backend, max_grad_norm=max_norm if ours else None)
        norms = []
        for step in range(7):
            Gradients(missing=0.2).set(params, step)
            before = [None if p.grad is None else p.grad.clone() for p in params]
            if not ours:
                norms.append(clip_grad_norm_(params, max_norm))
            built.step()
            if ours:
                norms.append(built.grad_norm)
                assert all(b is None or torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))  # type: ignore[arg-type]
        runs.append([*params, *norms, *state_of(built).values()])
    if dtype == torch.float64:  # the coefficient is the reciprocal of its reciprocal
        return all(torch.allclose(a, b, rtol=1e-13, atol=1e-14) for a, b in zip(*runs, strict=True))
    return len(runs[0]) == len(runs[1]) and all_equal(*runs)


@pytest.mark.feature("max_grad_norm= and skip_nonfinite=, inside of the step")
@pytest.mark.parametrize("max_norm", [TIGHT, LOOSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW"])
@every_backend
def test_max_grad_norm_equals_clip_grad_norm_followed_by_step(backend, name, policy, dtype, max_norm):
    assert clips_as_torch(Case(name, policy, False), backend, dtype, max_norm)


def norm_of_each_group(grads: list[Tensor], *rest: Any) -> Any:
    return clipping.clip(grads[2:], *rest)


def no_epsilon(grads: list[Tensor], max_norm: float, *rest: Any) -> Any:
    return clipping.clip(grads, max_norm * (1 + 1e-5), *rest)


@pytest.mark.parametrize("wrong", [norm_of_each_group, no_epsilon])
@every_backend
def test_another_norm_or_coefficient_is_noticed(backend, wrong):
    case = Case("SGD-momentum", "fixed", False)
    with broken(optimizer, "clip", wrong):
        assert fails(lambda: clips_as_torch(case, backend, torch.float32, TIGHT))


def exact_norm(params: list[Tensor]) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in params if p.grad is not None))


@every_backend
def test_norm_of_low_precision_gradients_is_summed_in_float32(backend):
    """The norm is within 2^-20 of the exact one. Torch's own, in bfloat16, is off by up to 2^-8."""
    params = [p for dtype in (torch.bfloat16, torch.float32, torch.float16) for p in parameters(dtype, [(1000,), (7,)])]
    built: Any = fa.SGD(params, lr=0.1, max_grad_norm=TIGHT, backend=backend)
    Gradients().set(params, 0)
    before, exact = [p.detach().double() for p in params], exact_norm(params)
    built.step()
    assert built.grad_norm.dtype == torch.float32
    assert abs(built.grad_norm.item() / exact - 1) < 2**-20
    for p, b in zip(params, before, strict=True):
        assert p.grad is not None
        expected = b - 0.1 * p.grad.double() / exact
        torch.testing.assert_close(
            p.detach(), expected.to(p.dtype), rtol=2**-7 if p.dtype.itemsize == 2 else 1e-6, atol=1e-7
        )


@pytest.mark.parametrize("fused", [False, True])
@every_backend
def test_amp_norm_is_that_of_unscaled_gradients(backend, fused):
    """Compares ``max_grad_norm`` with ``unscale_``, ``clip_grad_norm_`` and ``step``, with an overflow between."""
    runs = []
    for ours in (True, False):
        params = parameters(torch.float32)
        case = Case("AdamW", "active", True)
        built: Any = two_groups(case, params, fused=fused, backend=backend, max_grad_norm=TIGHT if ours else None)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        norms = []
        for step in range(9):
            Gradients().set(params, step)
            scaler.scale(torch.zeros(()))  # creates the scale
            for p in params:
                p.grad *= scaler.get_scale()  # type: ignore[operator]
            if step == 4:
                params[0].grad[0] = torch.inf  # type: ignore[index]
            if not ours:
                scaler.unscale_(built)
                norms.append(clip_grad_norm_(params, TIGHT))
            scaler.step(built)
            scaler.update()
            if ours:
                norms.append(built.grad_norm)
        finite = [n for n in norms if n.isfinite()]
        assert len(finite) >= 8
        runs.append([*params, *finite[:4], *state_of(built).values()])
    assert all_equal(*runs)


def skipped_steps_change_nothing(case: Case, backend: str, **options: Any) -> bool:
    """Compares training with steps whose norm is not finite, and the same training without them."""
    runs = []
    for bad in ({2: math.inf, 5: math.nan, 6: -math.inf}, {}):
        params = parameters(torch.float32)
        # On a GPU capturable is needed: only the device knows whether a step counts.
        built = two_groups(case, params, backend=backend, capturable=True, **options)
        done = 0
        for call in range(11 if bad else 8):
            Gradients().set(params, done)
            if call in bad:
                params[-1].grad[3] = bad[call]  # type: ignore[index]
            else:
                done += 1
            built.step()
            assert bool(built.grad_norm.isfinite()) == (call not in bad)
        runs.append([*params, *state_of(built).values()])
    return all_equal(*runs)


@pytest.mark.feature("max_grad_norm= and skip_nonfinite=, inside of the step")
@pytest.mark.parametrize("max_norm", [None, TIGHT])
@pytest.mark.parametrize("policy", [*POLICIES, "tlr-preconditioned-tensor"])
@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW"])
@every_backend
def test_skip_nonfinite_changes_nothing_and_ends_no_interval(backend, name, policy, max_norm):
    case = Case(name, policy, True)
    assert skipped_steps_change_nothing(case, backend, skip_nonfinite=True, max_grad_norm=max_norm)
    if policy == "active":
        assert fails(lambda: skipped_steps_change_nothing(case, backend, max_grad_norm=TIGHT))
        assert fails(lambda: skipped_steps_change_nothing(case, backend, max_grad_norm=math.inf))


def test_the_first_step_is_skipped_and_the_second_is_not():
    params = parameters(torch.float32)
    built: Any = fa.SGD(params, lr=0.1, momentum=0.9, skip_nonfinite=True, backend="reference")
    theirs = [p.detach().clone().requires_grad_() for p in params]
    expected = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    Gradients().set(params, 0)
    params[0].grad.fill_(math.nan)  # type: ignore[union-attr]
    built.step()
    for step in range(3):
        Gradients().set(params, step)
        Gradients().set(theirs, step)
        built.step()
        expected.step()
    torch.testing.assert_close(params, theirs)


@every_backend
def test_the_host_does_not_read_norm_scale_or_skipped(backend):
    del backend
    params = parameters(torch.float32)
    Gradients().set(params, 0)
    grads = [p.grad for p in params if p.grad is not None]
    with NoSynchronisation():
        norm, scale, skipped = clipping.clip(grads, TIGHT, True, torch.tensor(2.0), torch.zeros(1))
    assert norm.shape == scale.shape == skipped.shape == ()  # type: ignore[union-attr]
    assert scale.item() * TIGHT / (norm.item() + 1e-6) == pytest.approx(2.0)  # type: ignore[union-attr]


def test_no_norm_before_the_first_step_or_without_gradients():
    built: Any = fa.AdamW(parameters(), max_grad_norm=1.0)
    assert built.grad_norm is None
    built.step()
    assert built.grad_norm == 0


def test_a_sparse_gradient_is_named():
    params = parameters(torch.float32)
    built = fa.AdamW(params, max_grad_norm=1.0)
    Gradients().set(params, 0)
    built.step()
    params[1].grad = params[1].grad.to_sparse()  # type: ignore[union-attr]
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"parameter 1 of shape \(3, 5\) is sparse"):
        built.step()
    assert all_equal(before, params)


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_bad_norms_are_refused(value):
    with pytest.raises(ValueError, match="max_grad_norm must be > 0"):
        fa.SGD(parameters(), max_grad_norm=value)


@pytest.mark.parametrize("value", ["1", True, torch.tensor(1.0)])
def test_norms_that_are_not_numbers_are_refused(value):
    with pytest.raises(TypeError, match="max_grad_norm must be a number or None"):
        fa.AdamW(parameters(), max_grad_norm=value)


def test_copies_of_an_optimizer_clip_too():
    built = fa.ActiveAdamW(parameters(), interval=2, max_grad_norm=2.0, skip_nonfinite=True)
    for copied in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert (copied.max_grad_norm, copied.skip_nonfinite) == (2.0, True)


def test_the_naive_trial_uses_clipped_gradients():
    """Algorithm 1 with ``g`` clipped: at the trial point ``p − α·g``, both gradients have the step's coefficient."""
    results = []
    for max_norm in (None, 0.1):
        p = torch.tensor([3.0, -4.0], dtype=torch.float64, requires_grad=True)
        built: Any = fa.SGD([p], lr=0.1, policy=fa.TrainableLR(naive=True, eta=0.5), max_grad_norm=max_norm)

        def closure(p: Tensor = p, built: Any = built) -> Tensor:
            built.zero_grad()
            loss = p.square().sum() / 2
            loss.backward()
            return loss

        built.step(closure)
        results.append((p.detach(), built.state[p]["gain"].item()))
    (free, free_gain), (clipped, gain) = results
    c = 0.1 / (5 + 1e-6)  # of g = p; g' = (1 − 0.1·c)·p
    torch.testing.assert_close(free_gain, 1 + 0.5 * 0.9 * 25 / 0.1)
    torch.testing.assert_close(gain, 1 + 0.5 * c * c * (1 - 0.1 * c) * 25 / 0.1)
    torch.testing.assert_close(clipped, (1 - 0.1 * c * gain) * torch.tensor([3.0, -4.0], dtype=torch.float64))
    assert not torch.equal(free, clipped)


def _norms_of_shards(rank: int, directory: str, results: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        whole = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate([(5, 3), (7,), (1,)])]
        shared = [
            distribute_tensor(g, mesh, [kind]) for g, kind in zip(whole, (Shard(0), Replicate(), Shard(0)), strict=True)
        ]
        results[rank] = clipping.total_norm([*shared, torch.ones(4)])
    finally:
        dist.destroy_process_group()


@pytest.mark.heavy
def test_the_norm_is_over_all_shards(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(  # type: ignore[reportPrivateImportUsage]
            _norms_of_shards, (str(tmp_path), results), nprocs=2
        )
        norms = [results[rank] for rank in range(2)]
    whole = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate([(5, 3), (7,), (1,)])]
    expected = torch.cat([*(g.flatten() for g in whole), torch.ones(4)]).norm()
    for norm in norms:
        assert type(norm) is Tensor
        torch.testing.assert_close(norm, expected)


@every_backend
def test_a_refused_step_keeps_the_norm(backend):
    params = parameters(torch.float32)
    optimizer = fa.AdamW(params, max_grad_norm=1.0, backend=backend)
    Gradients().set(params, 0)
    optimizer.step()
    norm = optimizer.grad_norm
    assert norm is not None
    before = norm.clone()
    optimizer.state[params[1]]["exp_avg"].untyped_storage().resize_(0)
    Gradients().set(params, 1)
    with pytest.raises(RuntimeError, match="has been freed"):
        optimizer.step()
    assert optimizer.grad_norm is norm
    assert torch.equal(norm, before)
