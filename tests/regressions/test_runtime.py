"""Pitfalls of the running step: AMP, the type of lr, memory, synchronisation. See docs/pitfalls.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.backends import reference
from fused_adaptive.engine import reference_rates
from fused_adaptive.engine.participants import collect
from fused_adaptive.optimizers import base

from ..common.breaking import NoSynchronisation, PeakMemory, broken, fails
from ..common.cases import POLICIES, Case, Gradients, all_equal, parameters, state_of, train

pytestmark = pytest.mark.usefixtures("reference_backend")  # tests/backends/test_native.py tests the kernels

# ---- 11: AMP ----


def overflow_changes_nothing(case: Case, fused: bool) -> bool:
    """Compares training with an overflow in the middle and the same training without that step."""

    def run(overflow_at: int | None) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        params = parameters(torch.float32)
        optimizer = case.build(params, fused=fused)
        # A power of two, so that scaling and unscaling are exact.
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10**6, backoff_factor=1.0 - 1e-9)
        done = 0
        for call in range(9 if overflow_at is None else 10):
            Gradients().set(params, done)
            scaler.scale(torch.zeros(()))  # creates the scale
            for p in params:
                assert p.grad is not None
                p.grad *= scaler.get_scale()
            if call == overflow_at:
                params[-1].grad[5] = torch.inf  # type: ignore[index]
            else:
                done += 1
            scaler.step(optimizer)
            if call != overflow_at:
                scaler.update()
            else:
                scaler.update(1024.0)
        return params, state_of(optimizer)

    (with_overflow, state_with), (without, state_without) = run(4), run(None)
    return all_equal(with_overflow, without) and all(torch.equal(v, state_without[n]) for n, v in state_with.items())


@pytest.mark.feature("GradScaler, with and without fused=True", backend="reference")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-gradient-global", "hypergradient-global"])
@pytest.mark.parametrize("optimizer", ["SGD-momentum", "AdamW"])
def test_amp_overflow_changes_nothing_and_ends_no_interval(optimizer, policy, fused):
    case = Case(optimizer, policy, True)
    assert overflow_changes_nothing(case, fused)
    if fused:
        step = reference.step
        with broken(reference, "step", lambda participants, found_inf, *rest: step(participants, None, *rest)):
            assert fails(lambda: overflow_changes_nothing(case, fused))


def test_only_fused_uses_the_amp_contract():
    assert fa.AdamW(parameters(), fused=True)._step_supports_amp_scaling
    assert not fa.AdamW(parameters())._step_supports_amp_scaling


# ---- 12: tensor lr ----


def plateau_lowers_a_tensor_lr_as_torch_lowers_a_float() -> bool:
    """Some versions of the scheduler replace the tensor by a float, others fill it; both reach the next step."""
    runs = []
    for lr in (torch.tensor(0.1, dtype=torch.float64), 0.1):
        cls: Any = torch.optim.AdamW if lr == 0.1 and isinstance(lr, float) else fa.AdamW
        optimizer = cls(parameters(), lr=lr, foreach=False)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        for step in range(6):
            if step == 3:
                optimizer.param_groups[0]["lr"] = float(optimizer.param_groups[0]["lr"])
            train(optimizer, 1, start=step)
            scheduler.step(1.0)
        runs.append(optimizer.param_groups[0]["params"])
    return all_equal(*runs)


def test_a_tensor_lr_follows_the_scheduler_and_may_become_a_float():
    assert plateau_lowers_a_tensor_lr_as_torch_lowers_a_float()
    cached = property(lambda self: self.group.setdefault("cached", float(self.group["lr"])))
    with broken(reference.ParamView, "lr", cached):
        assert fails(plateau_lowers_a_tensor_lr_as_torch_lowers_a_float)


# ---- 14: memory ----


def extra_bytes_of_a_step(case: Case, dtype: torch.dtype) -> int:
    params = [torch.randn(1000).to(dtype).requires_grad_() for _ in range(40)]
    optimizer = case.build(params)
    train(optimizer, 5)
    Gradients().set(params, 5)  # the sixth step, in which every policy's interval ends
    with PeakMemory() as memory:
        optimizer.step()
    return memory.peak


@pytest.mark.feature("no copy of the parameters in a step", backend="reference")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [p for p in POLICIES if "displacement" not in p])
def test_a_step_does_not_allocate_a_copy_of_all_parameters(policy, dtype):
    """Temporaries are for one tensor at a time: at most 10 of 8 bytes per element; the model has 40 tensors."""
    case = Case("AdamW", policy, True)
    assert extra_bytes_of_a_step(case, dtype) <= 10 * 8 * 1000
    step = reference.step

    def step_with_copies(participants, *rest):
        copies = [view.grad() * 1 for view in participants.views]
        step(participants, *rest)
        assert copies

    with broken(reference, "step", step_with_copies):
        assert extra_bytes_of_a_step(case, dtype) > 10 * 8 * 1000


# ---- 15: hidden synchronisations ----


def base_class_never_reads_a_value(case: Case) -> bool:
    options = {"fused": True, "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = case.build(parameters(torch.float32), lr=torch.tensor(0.1), **options)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())  # type: ignore[attr-defined]
    nothing = type("Nothing", (), {"name": "nothing", "step": staticmethod(lambda *_: None)})
    optimizer._step_backend = nothing  # type: ignore[assignment]
    params = optimizer.param_groups[0]["params"]
    for step in range(4):
        Gradients(missing=0.3).set(params, step)
        # The rate is on the CPU here, and is treated as one on a device.
        with NoSynchronisation(), broken(reference_rates, "is_on_host", lambda rate: False):
            optimizer.step()
    return True


@pytest.mark.parametrize("policy", POLICIES)
def test_the_base_class_does_not_synchronise(policy):
    case = Case("SGD", policy, True)
    assert base_class_never_reads_a_value(case)

    def collect_by_value(backbone, groups, *rest):
        assert float(groups[0]["lr"]) >= 0
        return collect(backbone, groups, *rest)

    with broken(base, "collect", collect_by_value):
        assert fails(lambda: base_class_never_reads_a_value(case))
