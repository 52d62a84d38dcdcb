"""Gradient release: equal to the usual loop bit for bit, with gradients of about one layer alive; misuse is refused."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

import fused_adaptive as fa
from fused_adaptive.training.release import GradientRelease

from ..common.breaking import PeakMemory, broken, fails
from ..common.cases import BACKENDS, CASES, Case, Gradients, all_equal, parameters, state_of

every_backend = pytest.mark.parametrize("backend", BACKENDS)
feature = pytest.mark.feature("gradient release: step in backward")


def is_per_tensor(policy: str) -> bool:
    return policy == "fixed" or policy.startswith("active") or policy.endswith("-tensor")


class Model(nn.Module):
    """Parameters of various shapes, with gradients that a test sets."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(p.detach()) for p in parameters(dtype))

    def backward(self, step: int, missing: float = 0.3) -> None:
        params = list(self.weights)
        kept = [p.grad for p in params]
        Gradients(missing=missing).set(params, step)
        grads = [p.grad for p in params]
        for p, grad in zip(params, kept, strict=True):
            p.grad = grad
        terms = [(p * g).sum() for p, g in zip(params, grads, strict=True) if g is not None]
        if terms:
            torch.stack(terms).sum().backward()


def run(case: Case, backend: str, release: bool, dtype: torch.dtype = torch.float32, steps: int = 10, **extra):
    """Trains for at least three intervals, with a scheduler, an end by hand, and a tensor that joins late."""
    model = Model(dtype)
    optimizer = case.build(model.parameters(), backend=backend, **extra)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    late = model.weights[1]
    late.requires_grad_(False)
    if release:
        fa.release_gradients(model, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        model.backward(step) if step > 1 else None  # the first calls have no gradients
        if step == 4:
            late.requires_grad_(True)
        optimizer.step()
        scheduler.step()
        if step == 6:
            optimizer.end_interval()
    return list(model.parameters()), state_of(optimizer)


def releasing_changes_no_bit(case: Case, backend: str, dtype: torch.dtype = torch.float32) -> bool:
    (params, state), (expected, expected_state) = (run(case, backend, release, dtype) for release in (True, False))
    same_state = all(torch.equal(value, expected_state[name]) for name, value in state.items())
    return all_equal(params, expected) and state.keys() == expected_state.keys() and same_state


@pytest.mark.thinned
@feature
@every_backend
@pytest.mark.parametrize("case", [c for c in CASES if is_per_tensor(c.policy)], ids=str)
def test_gradient_release_equals_the_usual_loop_bit_for_bit(case, backend):
    assert releasing_changes_no_bit(case, backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-gradient-tensor"])
def test_gradient_release_equals_the_usual_loop_in_other_dtypes(policy, dtype, backend):
    assert releasing_changes_no_bit(Case("AdamW", policy, True), backend, dtype)


@every_backend
def test_missing_counts_of_new_tensors_are_noticed(backend, monkeypatch):
    case = Case("AdamW", "active", True)
    assert releasing_changes_no_bit(case, backend)
    begin = GradientRelease._begin

    def begin_without_counts(self):
        begin(self)
        self._calls = {
            policy: torch.zeros((), dtype=torch.int64)
            for policy in fa.policies.from_plain(self._optimizer.param_groups[0]["policy"])
        }

    with broken(GradientRelease, "_begin", begin_without_counts):
        assert fails(lambda: releasing_changes_no_bit(case, backend))


@every_backend
def test_missing_counts_of_tensors_without_a_gradient_are_noticed(backend):
    case = Case("AdamW", "active", True)

    def step_without_the_rest(self, closure=None):
        self._stepped.clear()
        self._running = False

    with broken(GradientRelease, "step", step_without_the_rest):
        assert fails(lambda: releasing_changes_no_bit(case, backend))


# ---- a model of layers ----

WIDTH, DEPTH = 128, 10


class Deep(nn.Module):
    """Linear layers; optionally, the first and the last share their weight."""

    def __init__(self, shares: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        if shares:
            self.layers[-1].weight = self.layers[0].weight

    def forward(self, x: torch.Tensor, checkpoint: bool = False) -> torch.Tensor:
        for layer in self.layers:
            run = recomputed(layer, x, use_reentrant=False) if checkpoint else layer(x)
            x = run.tanh()
        return x.square().mean()


def train_deep(backend: str, release: bool, steps: int = 7, checkpoint: bool = False, closure: bool = False):
    torch.manual_seed(0)
    model = Deep(shares=True)
    optimizer = fa.AdamW(model.named_parameters(), lr=1e-2, policy=fa.ActiveLR(interval=2), backend=backend)
    if release:
        fa.release_gradients(model, optimizer)
    for _ in range(steps):
        x = torch.randn(4, WIDTH)

        def loss(x=x):
            optimizer.zero_grad()
            loss = model(x, checkpoint)
            loss.backward()
            return loss

        if closure:
            assert optimizer.step(loss).item() > 0
        else:
            loss()
            optimizer.step()
    return list(model.parameters())


@every_backend
@pytest.mark.parametrize("how", ["plain", "checkpoint", "closure"])
def test_shared_weights_activation_checkpoints_and_closures(how, backend):
    arguments = {how: True} if how != "plain" else {}
    assert all_equal(*(train_deep(backend, release, **arguments) for release in (True, False)))


def peak_of_gradients(backend: str, release: bool) -> int:
    """Returns the peak of the bytes allocated by a backward pass, in the first two steps of a training."""
    model, peaks = Deep(), []
    optimizer = fa.SGD(model.parameters(), lr=0.1, backend=backend)
    if release:
        fa.release_gradients(model, optimizer)
    for _ in range(2):
        loss = model(torch.randn(1, WIDTH))
        with PeakMemory() as memory:
            loss.backward()
        peaks.append(memory.peak)
        optimizer.step()
        optimizer.zero_grad()
    return max(peaks)


@feature
@every_backend
def test_at_most_the_gradients_of_the_largest_layer_are_alive(backend):
    layer, activations = 4 * (WIDTH * WIDTH + WIDTH), 4 * 8 * WIDTH
    everything = 4 * sum(p.numel() for p in Deep().parameters())
    assert peak_of_gradients(backend, release=False) >= everything
    allowed = layer + activations
    assert peak_of_gradients(backend, release=True) <= allowed < everything / 5
    move = GradientRelease._move

    def move_and_keep(self, param):
        grad = param.grad
        move(self, param)
        self.kept = [*getattr(self, "kept", []), grad]

    with broken(GradientRelease, "_move", move_and_keep):
        assert peak_of_gradients(backend, release=True) > allowed


# ---- several backward passes ----


@every_backend
def test_gradients_accumulate_if_requested(backend):
    runs = []
    for release in (True, False):
        model = Model()
        optimizer = Case("AdamW", "active", True).build(model.parameters(), backend=backend)
        handle = fa.release_gradients(model, optimizer) if release else None
        for step in range(7):
            optimizer.zero_grad()
            for micro in range(2):
                if handle is None:
                    model.backward(2 * step + micro)
                    continue
                with handle.accumulate():
                    model.backward(2 * step + micro)
            model.backward(100 + step)
            optimizer.step()
        runs.append([*model.parameters()])
    assert all_equal(*runs)


def test_a_second_backward_is_refused_before_anything_changes():
    model = Model()
    optimizer = fa.AdamW(model.named_parameters())
    handle = fa.release_gradients(model, optimizer)
    model.backward(0, missing=0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"\(weights\.\d\) of shape .* second gradient .*accumulate"):
        model.backward(1, missing=0)
    assert all_equal(before, list(model.parameters()))
    with pytest.raises(RuntimeError, match="before remove"):
        handle.remove()
    with pytest.raises(RuntimeError, match="second gradient"):
        optimizer.step()  # the refused gradient still exists
    optimizer.zero_grad()
    optimizer.step()
    model.backward(1, missing=0)


def test_a_step_can_be_ended_after_an_exception_in_the_backward():
    model, other = Model(), Model()
    optimizer, plain = (fa.ActiveAdamW(m.parameters(), lr=0.1, interval=2) for m in (model, other))
    fa.release_gradients(model, optimizer)
    calls = []

    def out_of_memory(grad):
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError

    for p in model.weights:
        p.register_hook(out_of_memory)
    with pytest.raises(MemoryError):
        model.backward(0, missing=0)
    optimizer.zero_grad()
    optimizer.step()
    assert all_equal(list(model.parameters()), list(other.parameters()))
    plain.step()  # as a call without gradients
    for step in range(1, 5):
        model.backward(step, missing=0)
        optimizer.step()
        plain.zero_grad()
        other.backward(step, missing=0)
        plain.step()
    assert all_equal(list(model.parameters()), list(other.parameters()))


# ---- changes between two steps ----


def test_options_can_change_between_two_steps_and_release_can_be_removed():
    runs = []
    for release in (True, False):
        model = Model()
        weights = list(model.weights)
        optimizer = fa.AdamW(weights[:3], lr=0.01, policy=fa.ActiveLR(interval=2))
        handle = fa.release_gradients(model, optimizer) if release else None
        for step in range(12):
            model.backward(step)
            optimizer.step()
            optimizer.zero_grad()
            for p in weights[len(weights) if step >= 2 else 3 :]:
                p.grad = None
            if step == 2:
                optimizer.add_param_group({"params": weights[3:], "lr": 0.1})
            if step == 4:
                saved = copy.deepcopy(optimizer.state_dict())
            if step == 6:
                optimizer.load_state_dict(saved)
            if step == 8:
                optimizer.param_groups[0]["policy"] = fa.TrainableLR(interval=2, granularity="tensor")
            if step == 10 and handle is not None:
                handle.remove()
                handle.remove()
        assert optimizer._release is None
        runs.append([p.detach() for p in weights])
    assert all_equal(*runs)


def test_a_global_policy_that_is_set_later_is_refused_in_the_backward():
    model = Model()
    optimizer = fa.AdamW(model.parameters())
    fa.release_gradients(model, optimizer)
    optimizer.param_groups[0]["policy"] = fa.TrainableLR(interval=2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="granularity='tensor'"):
        model.backward(0, missing=0)
    assert all_equal(before, list(model.parameters()))


def test_copies_do_not_release_and_no_memory_leaks():
    model = Model()
    optimizer = fa.AdamW(model.parameters())
    handle = fa.release_gradients(model, optimizer)
    model.backward(0)
    optimizer.step()
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert twin._release is None
    twin_model.backward(1, missing=0)
    assert all(p.grad is not None for p in twin_model.weights)
    weak = weakref.ref(optimizer), weakref.ref(handle)
    del optimizer, handle
    assert [w() for w in weak] == [None, None]
    before = [p.detach().clone() for p in model.parameters()]
    model.backward(1, missing=0)
    assert all_equal(before, list(model.parameters()))
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_are_released_again_after_a_module_is_converted_by_swapping():
    model = nn.Linear(3, 2)
    optimizer = fa.AdamW(model.parameters())
    fa.release_gradients(model, optimizer)
    released = []
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for step in range(3):
            model(torch.ones(1, 3)).sum().backward()
            released.append(model.weight.grad is None)
            optimizer.step()
            if step == 0:
                model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert released == [True, False, True]  # torch takes the hooks away; the step restores them
    assert optimizer.state[model.weight]["step"] == 3
