"""With a fixed rate, results are ``torch.equal`` to torch's single-tensor path, for any shapes, groups and schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fused_adaptive as fa

pytestmark = pytest.mark.usefixtures("reference_backend")

NAMESAKES: dict[str, tuple[Any, Any]] = {
    name: (getattr(fa, name), getattr(torch.optim, name)) for name in ("SGD", "Adam", "AdamW", "RAdam", "NAdam")
}
FLOATS = st.sampled_from([torch.float64, torch.float32])
LOW = st.sampled_from([torch.bfloat16, torch.float16])
SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=5)
LRS = st.lists(st.sampled_from([0.0, 1e-4, 0.01, 0.3]), min_size=4, max_size=12)


@st.composite
def hyperparameters(draw: Any, name: str) -> dict[str, Any]:
    common = {"weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])), "maximize": draw(st.booleans())}
    if name == "SGD":
        momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
        nesterov = momentum > 0 and draw(st.booleans())
        dampening = 0.0 if nesterov else draw(st.sampled_from([0.0, 0.3]))
        return {**common, "momentum": momentum, "nesterov": nesterov, "dampening": dampening}
    common["betas"] = draw(st.sampled_from([(0.9, 0.999), (0.8, 0.95), (0.0, 0.5), (0.9, 0.0)]))
    common["eps"] = draw(st.sampled_from([1e-8, 1e-3]))
    if name == "NAdam":
        common["momentum_decay"] = draw(st.sampled_from([0.004, 0.0, 0.5]))
    if name in ("RAdam", "NAdam"):
        return {**common, "decoupled_weight_decay": draw(st.booleans())}
    return {**common, "amsgrad": draw(st.booleans())}


class Run:
    """The same random training for different optimizers."""

    def __init__(self, shapes: list[tuple[int, ...]], lrs: list[float], seed: int, split: int) -> None:
        self.shapes, self.lrs, self.seed, self.split = shapes, lrs, seed, split

    def parameters(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return [
            torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in self.shapes
        ]

    def groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        split = self.split % (len(params) + 1)
        return [{"params": params[:split], "weight_decay": 0.2}, {"params": params[split:]}]

    def gradients(self, step: int, dtype: torch.dtype) -> list[Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed + 1 + step)
        grads = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in self.shapes]
        missing = torch.rand(len(grads), generator=generator) < 0.25
        return [None if gone else grad for grad, gone in zip(grads, missing, strict=True)]

    def step(self, optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[Tensor | None], i: int) -> None:
        for group, factor in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = self.lrs[i] * factor
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()
        optimizer.step()


RUNS = st.builds(Run, SHAPES, LRS, st.integers(0, 10**6), st.integers(0, 5))


def first_difference(run: Run, dtype: torch.dtype, name: str, arguments: dict[str, Any], theirs: Any = None) -> str:
    """Returns where parameters or state first differ from torch's; "" if they do not."""
    ours_cls, torch_cls = NAMESAKES[name]
    ours, expected = run.parameters(dtype), run.parameters(dtype)
    optimizer = ours_cls(run.groups(ours), lr=0.1, backend="reference", **arguments)
    reference = (theirs or torch_cls)(run.groups(expected), lr=0.1, foreach=False, **arguments)
    for i in range(len(run.lrs)):
        grads = run.gradients(i, dtype)
        run.step(optimizer, ours, grads, i)
        run.step(reference, expected, grads, i)
        for j, (p, q) in enumerate(zip(ours, expected, strict=True)):
            if not torch.equal(p, q):
                return f"parameter {j} at step {i}"
            for key, value in reference.state.get(q, {}).items():
                if not torch.equal(optimizer.state[p][key], value):
                    return f"{key} of parameter {j} at step {i}"
    return ""


@pytest.mark.parametrize("name", NAMESAKES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bit_equal_to_torch(name, data):
    arguments = data.draw(hyperparameters(name))
    assert first_difference(data.draw(RUNS), data.draw(FLOATS), name, arguments) == ""


@pytest.mark.parametrize("name", NAMESAKES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_low_precision_equals_float32_state_rounded_once(name, data):
    """The expected result is torch's on float32 parameters that are rounded to the low precision after every step."""
    run, dtype, arguments = data.draw(RUNS), data.draw(LOW), data.draw(hyperparameters(name))
    ours_cls, torch_cls = NAMESAKES[name]
    ours, oracle = run.parameters(dtype), [p.detach().float().requires_grad_() for p in run.parameters(dtype)]
    optimizer = ours_cls(run.groups(ours), lr=0.1, backend="reference", **arguments)
    reference = torch_cls(run.groups(oracle), lr=0.1, foreach=False, **arguments)
    for i in range(len(run.lrs)):
        grads = run.gradients(i, dtype)
        run.step(optimizer, ours, grads, i)
        run.step(reference, oracle, [None if g is None else g.float() for g in grads], i)
        for p, q in zip(ours, oracle, strict=True):
            q.data.copy_(q.data.to(dtype))
            torch.testing.assert_close(p.float(), q.float(), rtol=0, atol=0, equal_nan=True)
            assert all(v.dtype == torch.float32 for v in optimizer.state.get(p, {}).values())


FIXED_RUN = Run([(5,), (2, 3), ()], [0.1] * 10, seed=3, split=1)


@pytest.mark.parametrize(
    ("name", "wrong"), [("SGD", "ASGD"), ("Adam", "NAdam"), ("AdamW", "Adam"), ("RAdam", "Adam"), ("NAdam", "Adam")]
)
def test_another_optimizer_is_not_bit_equal_to_torch(name, wrong):
    arguments = {"weight_decay": 0.1}
    assert first_difference(FIXED_RUN, torch.float32, name, arguments) == ""
    assert first_difference(FIXED_RUN, torch.float32, name, arguments, getattr(torch.optim, wrong)) != ""


@pytest.mark.parametrize("name", NAMESAKES)
def test_an_adapting_policy_with_gains_of_one_agrees_within_rounding(name):
    """Before the first interval ends all gains of ActiveLR are 1: equal steps in another order of operations."""
    cls = NAMESAKES[name][0]
    fixed, adapting = FIXED_RUN.parameters(torch.float32), FIXED_RUN.parameters(torch.float32)
    one = cls(FIXED_RUN.groups(fixed), lr=0.1)
    two = cls(FIXED_RUN.groups(adapting), lr=0.1, policy=fa.ActiveLR(interval=100))
    for i in range(10):
        grads = FIXED_RUN.gradients(i, torch.float32)
        FIXED_RUN.step(one, fixed, grads, i)
        FIXED_RUN.step(two, adapting, grads, i)
    for p, q in zip(fixed, adapting, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMESAKES)
@pytest.mark.parametrize("lr_dtype", [torch.float64, torch.float32])
def test_a_tensor_lr_is_read_as_a_double(name, lr_dtype):
    """Compares with torch with a float lr. torch itself rounds ``1 − lr·wd`` to a float32 lr's precision."""
    ours_cls, torch_cls = NAMESAKES[name]
    lr = torch.tensor(0.1, dtype=lr_dtype)
    ours, expected = FIXED_RUN.parameters(torch.float32), FIXED_RUN.parameters(torch.float32)
    optimizer = ours_cls(ours, lr=lr, weight_decay=0.1)
    reference = torch_cls(expected, lr=lr.item(), weight_decay=0.1, foreach=False)
    for i in range(5):
        for p, q, g in zip(ours, expected, FIXED_RUN.gradients(i, torch.float32), strict=True):
            p.grad, q.grad = (None, None) if g is None else (g.clone(), g.clone())
        optimizer.step()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, expected, strict=True))
