"""Known pitfalls of fused optimizers: one check each, which must fail on a broken variant.

The numbers are those of the list in docs/pitfalls.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive import backends
from fused_adaptive.backends import reference
from fused_adaptive.core import state
from fused_adaptive.core.view import ParamView
from fused_adaptive.policies.base import ScalarPolicy

from ..common.breaking import broken, fails
from ..common.cases import CASES, Case, Gradients, all_equal, every_case, parameters, state_of, train

pytestmark = pytest.mark.usefixtures("reference_backend")

ADAMW = {"lr": 0.01, "weight_decay": 0.1}


# ---- 4: state dicts that do not load into or from torch ----


def loads_into_and_from_torch() -> bool:
    params = parameters(torch.float32)
    ours = fa.AdamW(params, **ADAMW)
    train(ours, 3)
    copies = [p.detach().clone().requires_grad_() for p in params]
    theirs = torch.optim.AdamW(copies, foreach=False)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(theirs, 3, start=3)
    again = fa.AdamW([p.detach().clone().requires_grad_() for p in params])
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    return all_equal(train(again, 3, start=3), copies)


def test_state_dict_loads_into_and_from_torch():
    assert loads_into_and_from_torch()

    class Renamed(type(fa.AdamW.backbone)):
        def state_spec(self, group):
            return {f"fused_{k}" if k == "exp_avg" else k: v for k, v in super().state_spec(group).items()}

    with broken(fa.Adam, "backbone", Renamed()):
        assert fails(loads_into_and_from_torch, KeyError)  # torch's step does not find its state


# ---- 5: one step counter for all tensors ----


def intermittent_gradients_have_their_own_bias_correction() -> bool:
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    pairs = [(fa.AdamW(ours, **ADAMW), ours), (torch.optim.AdamW(theirs, foreach=False, **ADAMW), theirs)]
    for optimizer, params in pairs:
        train(optimizer, 8, gradients=Gradients(missing=0.5))
        assert params
    return all_equal(ours, theirs)


def test_every_tensor_counts_its_own_steps():
    assert intermittent_gradients_have_their_own_bias_correction()
    shared = torch.zeros(())
    create = state.StateSpec.create

    def create_shared(self, *given):
        return shared if self == state.step_spec() else create(self, *given)

    with broken(state.StateSpec, "create", create_shared):
        assert fails(intermittent_gradients_have_their_own_bias_correction)


# ---- 8: empty tensors ----


def empty_tensors_change_nothing_for_others(case: Case) -> bool:
    shapes = [(3,), (0, 4), (5,)]
    with_empty, without = parameters(shapes=shapes), parameters(shapes=shapes)
    train(case.build(with_empty), 7)
    optimizer = case.build([without[0], without[2]])
    for step in range(7):
        Gradients().set(without, step)
        optimizer.step()
    return all(torch.equal(with_empty[i], without[i]) for i in (0, 2)) and with_empty[1].shape == (0, 4)


@pytest.mark.thinned
@pytest.mark.feature("empty tensors", backend="reference")
@every_case
def test_empty_tensors_are_fine(case):
    assert empty_tensors_change_nothing_for_others(case)
    update = reference.update
    seen_empty = []

    def stop_at_the_first_empty_one(view):
        seen_empty.extend([1] * (view.param.numel() == 0))
        if not seen_empty:
            update(view)

    with broken(reference, "update", stop_at_the_first_empty_one):
        assert fails(lambda: empty_tensors_change_nothing_for_others(case), KeyError)


# ---- 9: strides ----

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "every other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "negative view": lambda t: torch.complex(t, -t).conj().imag,  # memory has the negated values
}


def strides_do_not_matter(case: Case, of_param: str, of_grad: str) -> bool:
    values = torch.randn(2, 3, 4, 5)
    plain = values.clone().requires_grad_()
    strided = LAYOUTS[of_param](values.clone()).requires_grad_()
    one, two = case.build([plain]), case.build([strided])
    for _ in range(7):
        grad = torch.randn(2, 3, 4, 5)
        plain.grad, strided.grad = grad.clone(), LAYOUTS[of_grad](grad)
        one.step()
        two.step()
    assert strided.stride() == LAYOUTS[of_param](values).stride()
    # Not bit for bit: torch's vectorized loops round differently with other strides.
    return torch.allclose(plain, strided, rtol=1e-5, atol=1e-6)


@pytest.mark.thinned
@pytest.mark.feature("channels_last, strided and misaligned tensors", backend="reference")
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-preconditioned-tensor", "hypergradient-global"])
def test_strides_of_parameters_and_gradients_may_differ(policy, of_param, of_grad):
    case = Case("AdamW", policy, True)
    assert strides_do_not_matter(case, of_param, of_grad)
    if of_grad != of_param:
        grad = ParamView.grad

        def as_flat_storage(self):  # walks over storage without strides
            g = grad(self)
            return torch.as_strided(g, g.shape, torch.empty(g.shape).stride()).clone()

        with broken(ParamView, "grad", as_flat_storage):
            assert of_grad == "misaligned" or fails(lambda: strides_do_not_matter(case, of_param, of_grad))


# ---- 10: mixed dtypes ----


def every_dtype_moves_and_keeps_its_state(case: Case) -> bool:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    params = [parameters(dtype)[0] for dtype in dtypes]
    before = [p.detach().clone() for p in params]
    optimizer = case.build(params)
    train(optimizer, 5)
    other = case.build([p.detach().clone().requires_grad_() for p in params])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    same = all(torch.equal(a, b) for a, b in zip(state_of(optimizer).values(), state_of(other).values(), strict=True))
    kept = all(v.dtype != p.dtype or v.dtype.itemsize >= 4 for p in params for v in other.state[p].values())
    moved = all(not torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(params, before, strict=True))
    return same and kept and moved


@pytest.mark.feature("mixed dtypes; state that loading does not cast", backend="reference")
@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-gradient-global", "hypergradient-tensor"])
def test_mixed_dtypes_move_and_state_is_not_cast(policy):
    check = lambda: every_dtype_moves_and_keeps_its_state(Case("AdamW", policy, True))  # noqa: E731
    assert check()
    with broken(fa.AdaptiveOptimizer, "load_state_dict", torch.optim.Optimizer.load_state_dict):
        assert fails(check)


# ---- 16: elements that a vector path skips ----


def large_odd_tensor_is_the_same_as_its_chunks(case: Case) -> bool:
    """Compares a large tensor with its chunks under element policies."""
    values, sizes = torch.randn(100_003, dtype=torch.float64), (1, 3, 127, 4095, 4097, 91_680)
    whole, chunks = values.clone().requires_grad_(), [v.clone().requires_grad_() for v in values.split(sizes)]
    one, many = case.build([whole]), case.build(chunks)
    for _ in range(7):
        grad = torch.randn(100_003, dtype=torch.float64)
        whole.grad = grad
        for p, g in zip(chunks, grad.split(sizes), strict=True):
            p.grad = g.clone()
        one.step()
        many.step()
    return torch.allclose(whole, torch.cat(chunks), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", [c for c in CASES if c.policy in ("fixed", "active") and c.decoupled], ids=str)
def test_no_element_of_a_large_odd_tensor_is_skipped(case):
    assert large_odd_tensor_is_the_same_as_its_chunks(case)
    update = reference.update

    def update_without_tail(view):
        tail = view.param.detach()[-(view.param.numel() % 4) :].clone() if view.param.numel() > 4096 else None
        update(view)
        if tail is not None:
            view.param[-tail.numel() :] = tail

    with broken(reference, "update", update_without_tail):
        assert fails(lambda: large_odd_tensor_is_the_same_as_its_chunks(case))


# ---- 17: hypergradient ----


def hypergradient_rate_is_never_negative() -> bool:
    optimizer = fa.SGD(parameters(), lr=0.1, policy=fa.Hypergradient(1.0))
    for step in range(8):
        Gradients(seed=step).set(optimizer.param_groups[0]["params"], step)
        for p in optimizer.param_groups[0]["params"]:
            p.grad *= (-1) ** step
        optimizer.step()
        if optimizer.learning_rates()[0]["min"] < 0:
            return False
    return True


def hypergradient_rate_is_one_for_all_tensors_of_a_step() -> bool:
    p, q = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = fa.SGD([p, q], lr=0.1, policy=fa.Hypergradient(0.01))
    for _ in range(2):
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
    return torch.equal(before[0] - p, before[1] - q)


def test_hypergradient_rate_is_never_negative_nor_changed_midway():
    assert hypergradient_rate_is_never_negative()

    def ascend_without_clamp(self, unit, step_size, slope):
        for view in unit:
            view.state["gain"].add_(step_size * slope / view.lr_scale**2)

    with broken(ScalarPolicy, "ascend", ascend_without_clamp):
        assert fails(hypergradient_rate_is_never_negative)

    assert hypergradient_rate_is_one_for_all_tensors_of_a_step()
    with broken(ScalarPolicy, "units", lambda self, views: [views[: i + 1] for i in range(len(views))]):
        assert fails(hypergradient_rate_is_one_for_all_tensors_of_a_step)


# ---- 18: who writes group["lr"] ----


def lr_is_the_users(case: Case) -> bool:
    optimizer = case.build(parameters(), lr=0.07)
    train(optimizer, 7)
    optimizer.end_interval()
    optimizer.restart_interval()
    return optimizer.param_groups[0]["lr"] == 0.07 and {"state", "param_groups"} <= optimizer.state_dict().keys()


@pytest.mark.thinned
@every_case
def test_no_policy_writes_the_groups_lr(case):
    assert lr_is_the_users(case)
    if case.policy.startswith("hypergradient"):

        def ascend_in_the_group(self, unit, step_size, slope):
            for view in unit:
                view.group["lr"] += 1e-3

        with broken(ScalarPolicy, "ascend", ascend_in_the_group):
            assert fails(lambda: lr_is_the_users(case))
    update = reference.update

    def update_in_the_group(view):
        update(view)
        view.group["lr"] *= 0.99

    with broken(reference, "update", update_in_the_group):
        assert fails(lambda: lr_is_the_users(case))


# ---- 19: the kind of decay ----


def decay_is_of_the_right_kind(name: str) -> bool:
    """With gradients of 0, coupled decay changes the moments, and decoupled decay scales the parameter."""
    cls = getattr(fa, name)
    for policy in (None, fa.ActiveLR(interval=2), fa.Hypergradient(0.0)):
        p = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
        optimizer = cls([p], lr=0.1, weight_decay=0.5, decoupled_weight_decay=True, policy=policy)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        if not torch.allclose(p, torch.full_like(p, 2.0 * 0.95), rtol=1e-12):
            return False
        q = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
        optimizer = cls([q], lr=0.1, weight_decay=0.5, decoupled_weight_decay=False, policy=policy)
        q.grad = torch.zeros_like(q)
        optimizer.step()
        if not torch.allclose(q, torch.full_like(q, 2.0 - 0.1), rtol=1e-6):  # ĝ = 0.5 · 2 = 1, and u = 1
            return False
    return True


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RAdam", "AdaBelief"])
def test_decay_is_coupled_or_decoupled_as_asked(name):
    assert decay_is_of_the_right_kind(name)
    with broken(reference.ParamView, "coupled_grad", lambda self, param=None: self.grad()):
        assert fails(lambda: decay_is_of_the_right_kind(name))


def test_broken_functions_are_those_that_a_step_calls():
    """The broken variants replace functions of the reference: a step must call these."""
    assert backends.select("reference", ()) is reference
