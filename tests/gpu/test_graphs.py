"""CUDA graphs of a step: intervals, skipped steps, changing rates, clipping, masters, draws.

They run on a GPU, and on both emulated backends in separate processes (tests/cuda_emulation/test_backend.py,
tests/triton_backend/test_triton.py).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa

from ..common.cases import POLICIES, Case, Gradients, all_equal, parameters, state_of
from ..common.recording import backends_here, capture, device, emulate, emulated, graph

pytestmark = pytest.mark.gpu(emulated=True)

every_policy = pytest.mark.parametrize("policy", [p for p in POLICIES if "displacement" not in p])
STEPS = 12  # at least three intervals of every policy


@pytest.fixture(params=["native", "triton"], autouse=True)
def backend(request, monkeypatch):
    if request.param not in backends_here():
        pytest.skip(f"{request.param} cannot run here")
    emulate(monkeypatch)
    monkeypatch.setenv(fa.backends.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def here(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().to(device(), copy=True).requires_grad_() for p in params]


def number(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device())


class Run:
    """Steps of one optimizer, eager or as replays of one of them.

    Args:
        captured: whether a step is captured; otherwise the same steps are eager.
        in_graph: whether gradients are computed in the graph, as by a captured backward pass.
    """

    def __init__(self, optimizer: Any, captured: bool, in_graph: bool = False) -> None:
        self.optimizer, self.captured, self.in_graph = optimizer, captured, in_graph
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.of_graph, self.of_eager = ([torch.zeros_like(p, requires_grad=False) for p in self.params] for _ in "ab")
        self.graph: Any = None
        self.norms: list[Tensor] = []

    def fill(self, step: int, buffers: list[Tensor]) -> None:
        """Copies this step's gradients to the fixed addresses of such steps."""
        Gradients().set(self.params, step)
        for p, buffer in zip(self.params, buffers, strict=True):
            buffer.copy_(p.grad)  # type: ignore[arg-type]
            p.grad = buffer

    def eager(self, step: int) -> None:
        self.fill(step, self.of_eager)
        self.optimizer.step()
        self._note()

    def replay(self, step: int, before: Callable[[int], None] = lambda _: None) -> None:
        self.fill(step, self.of_graph)
        before(step)
        if not self.captured:
            self.optimizer.step()
        else:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        self._note()

    def capture(self) -> None:
        self.graph = graph()
        with capture(self.graph):
            if self.in_graph:
                for p, buffer in zip(self.params, self.of_graph, strict=True):
                    p.grad = buffer.clone()
            self.optimizer.step()

    def _note(self) -> None:
        self.norms += [] if self.optimizer.grad_norm is None else [self.optimizer.grad_norm.clone()]

    def results(self) -> list[Tensor]:
        return [*self.params, *self.norms, *state_of(self.optimizer).values()]


def run(
    case: Case,
    captured: bool,
    before_step: Callable[[Any, list[Tensor], int], None] = lambda *_: None,
    dtype: torch.dtype = torch.float32,
    in_graph: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Returns parameters, state and norms after eager steps, or after replays of the third step."""
    own = Run(case.build(here(parameters(dtype)), **{"capturable": True, **options}), captured, in_graph)
    for step in range(STEPS):
        before = lambda step: before_step(own.optimizer, own.of_graph, step)  # noqa: E731
        if step < 2:
            own.fill(step, own.of_graph)
            before(step)
            own.optimizer.step()
            own._note()
        else:
            own.replay(step, before)
    return own.results()


@pytest.mark.thinned
@pytest.mark.feature("a captured CUDA graph, through interval ends")
@every_policy
@pytest.mark.parametrize("in_graph", [False, True], ids=["same gradients", "gradients of the graph"])
def test_a_captured_graph_goes_through_interval_ends(policy, in_graph):
    assert all_equal(*(run(Case("AdamW", policy, True), captured, in_graph=in_graph) for captured in (False, True)))


@pytest.mark.thinned
@every_policy
@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW"])
def test_replays_and_eager_steps_in_turn(name, policy):
    """Both use recurring addresses. The host does not know what a replay has uploaded."""
    results = []
    for captured in (False, True):
        own = Run(Case(name, policy, False).build(here(parameters(torch.float32)), capturable=True), captured)
        for step, kind in enumerate("eerereerreee"):
            own.eager(step) if kind == "e" else own.replay(step)
        own.optimizer.end_interval()
        for step, kind in enumerate("rere", STEPS):
            own.eager(step) if kind == "e" else own.replay(step)
        results.append(own.results())
    assert all_equal(*results)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["numbers", "tensor lr"])
def test_eager_steps_use_their_own_numbers(tensor_lr):
    """There are more groups than kernel arguments can hold. Replays use the numbers of the capture."""
    results = []
    for captured in (False, True):
        params = here(parameters(torch.float32, [(5,)] * 40))
        rates = [[number(0.01 * (i + 1)) if tensor_lr else 0.01 * (i + 1) for i in range(40)] for _ in "ab"]
        optimizer: Any = fa.AdamW([{"params": [p], "lr": lr} for p, lr in zip(params, rates[0], strict=True)])
        for group in optimizer.param_groups:
            group["capturable"] = True
        own = Run(optimizer, captured)
        for step, kind in enumerate("eererer"):
            for group, eager, lr in zip(optimizer.param_groups, rates[1], rates[0], strict=True):
                group["weight_decay"] = 0.2 if kind == "e" else 0.1
                group["lr"] = eager if kind == "e" else lr
            own.eager(step) if kind == "e" else own.replay(step)
        results.append(own.params)
    assert all_equal(*results)


@pytest.mark.thinned
@pytest.mark.feature("GradScaler, with and without fused=True")
@every_policy
@pytest.mark.parametrize("name", ["SGD-momentum", "AdamW"])
def test_replays_skip_steps_with_an_amp_overflow(name, policy):
    case = Case(name, policy, True)
    scale, found_inf = number(4.0), number(0.0)

    def overflow(optimizer: Any, buffers: list[Tensor], step: int) -> None:
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        found_inf.fill_(float(step % 5 == 4))
        if step % 5 == 4:
            buffers[0].fill_(torch.inf)

    assert all_equal(*(run(case, captured, overflow, fused=True) for captured in (False, True)))


@every_policy
def test_replays_skip_steps_with_a_norm_that_is_not_finite(policy):
    def poison(optimizer: Any, buffers: list[Tensor], step: int) -> None:
        if step % 5 == 4:
            buffers[1][0, 0] = torch.nan

    case = Case("AdamW", policy, True)
    results = [run(case, captured, poison, max_grad_norm=1.0, skip_nonfinite=True) for captured in (False, True)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert all(v.isfinite().all() for v in results[1][:6])


@pytest.mark.thinned
@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replays_follow_a_tensor_lr(policy, dtype):
    case = Case("SGD-momentum", policy, True)
    results = []
    for captured in (False, True):
        lr = number(0.05, dtype)
        scheduled = lambda optimizer, buffers, step, lr=lr: lr.mul_(0.75)  # noqa: E731
        results.append(run(case, captured, scheduled, lr=lr))
    assert all_equal(*results)


@pytest.mark.parametrize("policy", ["fixed", "tlr-gradient-global", "tlr-times-active"])
@pytest.mark.parametrize("fused", [False, True])
def test_replays_draw_the_rates_of_their_steps(policy, fused):
    """Draws also use the width that ASLR has set since the capture."""
    results = []
    for captured in (False, True):
        lr, found_inf = number(0.05), number(0.0)
        optimizer: Any = Case("AdamW", policy, True).build(
            here(parameters(torch.float32)), lr=lr, capturable=True, fused=fused
        )
        search, own = fa.ASLR(optimizer, seed=5), Run(optimizer, captured)
        for step, kind in enumerate("eerrererrr"):
            if fused:
                optimizer.found_inf = found_inf
                found_inf.fill_(float(step in (4, 7)))
            own.eager(step) if kind == "e" else own.replay(step)
            if step in (3, 6):
                search.step(float(step))  # from the second step on the metric is worse, so the center changes
        assert search.state_dict()["n"] == (8 if fused else 10)
        results.append(own.results())
    assert all_equal(*results)


def test_draws_can_begin_before_a_capture():
    optimizer = fa.AdamW(here(parameters(torch.float32)), capturable=True)
    own = Run(optimizer, True)
    own.eager(0)
    fa.ASLR(optimizer)
    if device() == "cpu":
        pytest.skip("what is drawn from is there already")
    with pytest.raises(RuntimeError, match="one step before the capture"):
        own.capture()


@pytest.mark.parametrize("master", ["split", "stochastic"])
@pytest.mark.parametrize("policy", ["active", "tlr-preconditioned-tensor"])
def test_replays_keep_masters(policy, master, backend):
    if backend == "triton":
        pytest.skip("it knows no masters")
    case = Case("SGD-momentum", policy, True)
    assert all_equal(*(run(case, captured, dtype=torch.bfloat16, master=master) for captured in (False, True)))


def test_what_cannot_be_captured_says_so():
    own = Run(fa.AdamW(here(parameters(torch.float32))), True)
    own.eager(0)
    with pytest.raises(RuntimeError, match="capturable=True"):
        own.capture()
    own = Run(fa.AdamW(here(parameters(torch.float32)), capturable=True), True)
    own.fill(0, own.of_graph)
    with pytest.raises(RuntimeError, match="take one step before the capture"):
        own.capture()


def newcomer(optimizer: Any) -> None:
    optimizer.add_param_group({"params": here(parameters(torch.float32, [(4,)]))})
    for p in optimizer.param_groups[-1]["params"]:
        p.grad = torch.ones_like(p)


def changed_policy(optimizer: Any) -> None:
    optimizer.param_groups[0]["policy"] = fa.FixedLR()


def loaded(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].clone()


@pytest.mark.parametrize("change", [newcomer, changed_policy, loaded])
def test_memory_that_a_graph_points_to_lives_as_long_as_the_optimizer(change):
    """After the change, state and tables are new ones, and the graph may still run with the old ones."""
    own = Run(Case("AdamW", "active", True).build(here(parameters(torch.float32)), capturable=True), True)
    own.eager(0)
    own.replay(1)
    optimizer, params = own.optimizer, own.params
    plan = optimizer._participants.plans[0]
    pointed_to = [plan, getattr(plan, "_tables", plan), *optimizer.state[params[0]].values()]
    kept = [weakref.ref(value) for value in pointed_to]
    del plan, pointed_to
    change(optimizer)
    own.eager(2)
    gc.collect()
    assert optimizer._participants.plans[0] is not kept[0]()
    assert all(reference() is not None for reference in kept)
    before = [p.detach().clone() for p in params]
    own.fill(3, own.of_graph)
    own.graph.replay()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True) if p.numel())
    assert all(p.isfinite().all() for p in params)
    own.optimizer, own.graph = None, None
    del optimizer
    gc.collect()
    assert not any(reference() is not None for reference in kept[:2])


def test_tables_of_a_graph_are_kept_after_a_change_of_decay():
    results = []
    for captured in (False, True):
        optimizer: Any = Case("AdamW", "active", False).build(
            here(parameters(torch.float32)), weight_decay=0.0, capturable=True
        )
        own = Run(optimizer, captured)
        for step, kind in enumerate("erErerE"):
            optimizer.param_groups[0]["weight_decay"] = 0.1 if kind == "E" else 0.0
            own.replay(step) if kind == "r" else own.eager(step)
            gc.collect()
        results.append(own.results())
    assert all_equal(*results)


def test_a_gpu_without_kernel_code_is_named_in_the_error(backend):
    if backend != "native" or device() != "cpu":
        pytest.skip("of the emulated GPU")
    library, ask = emulated["native"], torch.ops.fused_adaptive.why_not_on_gpu
    assert ask(0) == ""
    library.emulation_has_code(0)
    try:
        assert ask(0) == "emulated error"
    finally:
        library.emulation_has_code(1)


def test_copies_of_an_optimizer_do_not_keep_memory_of_graphs():
    own = Run(fa.AdamW(here(parameters(torch.float32)), capturable=True), True)
    own.eager(0)
    own.capture()
    assert own.optimizer._captured
    assert not deepcopy(own.optimizer)._captured
