"""The naive two-pass variant of TrainableLR, which evaluates the loss at a trial point."""

from __future__ import annotations

import pytest
import torch

import fused_adaptive as fa

from ..common.single import gain, one_parameter


def test_naive_two_pass_variant_on_a_quadratic():
    """L = ½ Σ a·p², so g = a·p and g' = a·(p − αg), and the gain is known in closed form."""
    a = torch.tensor([1.0, 4.0], dtype=torch.float64)
    p = one_parameter((2.0, -1.0))
    optimizer = fa.SGD([p], lr=0.1, policy=fa.TrainableLR(naive=True, eta=0.01))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (a * p * p).sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    expected, alpha = p.detach().clone(), 0.1
    for _ in range(4):
        g = a * expected
        trial = a * (expected - alpha * g)
        alpha = max(0.0, alpha + 0.01 * (trial * g).sum().item())
        expected = expected - alpha * g
        loss = optimizer.step(closure)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
        assert gain(optimizer) * 0.1 == pytest.approx(alpha, rel=1e-12)
        assert torch.equal(p.grad, g) or torch.allclose(p.grad, g, rtol=1e-12)
        assert loss.item() == losses[-2]  # the loss of the first evaluation
    assert len(losses) == 8


def test_the_trial_takes_the_rate_that_aslr_has_drawn():
    p = one_parameter((2.0, -1.0))
    optimizer = fa.SGD([p], lr=0.1, policy=fa.TrainableLR(naive=True, eta=1e-3))
    controller = fa.ASLR(optimizer, seed=3)
    points = []

    def closure():
        optimizer.zero_grad()
        (0.5 * p.square().sum()).backward()
        points.append(p.detach().clone())

    optimizer.step(closure)
    first, trial = points
    rate = 1 - (trial / first)[0].item()
    assert rate != pytest.approx(0.1, rel=1e-3)
    alpha = 0.1 + 1e-3 * (trial * first).sum().item() * rate / 0.1  # the slope along what γ scales
    torch.testing.assert_close(p.detach(), first * (1 - alpha * rate / 0.1), rtol=1e-9, atol=0)
    assert controller.center == 0.1


def test_naive_variant_restores_the_parameters_when_the_closure_fails():
    p = one_parameter()
    optimizer, calls = fa.SGD([p], lr=0.1, policy=fa.TrainableLR(naive=True, eta=0.1)), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        optimizer.zero_grad()
        (p**2).sum().backward()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert p.tolist() == [1.0, 1.0]
    assert p.grad.tolist() == [2.0, 2.0]
    assert gain(optimizer) == 1.0


def test_naive_variant_without_closure_only_creates_state():
    p = one_parameter()
    optimizer = fa.SGD([p], lr=0.1, policy=fa.TrainableLR(naive=True, eta=0.1))
    p.grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert optimizer.state[p]["gain"] == 1.0
    optimizer.param_groups[0]["lr"] = 0.1
    p.grad = torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == [1.0, 1.0]


def test_naive_variant_removes_gradients_that_only_the_trial_computed():
    p, sometimes = one_parameter(), one_parameter()
    optimizer, calls = fa.SGD([p, sometimes], lr=0.1, policy=fa.TrainableLR(naive=True, eta=0.1)), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        (p * (sometimes if len(calls) % 2 == 0 else 1.0)).sum().backward()

    optimizer.step(closure)
    assert len(calls) == 2
    assert sometimes.grad is None
    assert sometimes.tolist() == [1.0, 1.0]


def test_naive_variant_checks_gradients_first():
    p = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = fa.SGD([p], policy=fa.TrainableLR(naive=True, eta=0.1))
    p.grad = torch.zeros(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_naive_variant_in_a_checkpoint_applies_to_all_groups_or_none():
    groups = [{"params": [one_parameter()]}, {"params": [one_parameter()]}]
    optimizer = fa.SGD(groups)
    saved = optimizer.state_dict()
    saved["param_groups"][1] = {
        **saved["param_groups"][1],
        "policy": fa.TrainableLR(naive=True, eta=0.1).arguments(),
    }
    with pytest.raises(ValueError, match="all param groups must have that same policy"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["policy"] == {"name": "FixedLR"}
