"""``torch.compile`` around a step: no graph break, no recompilation for a changed tensor lr, eager results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.engine import torch_compile

from ..common.breaking import broken, fails
from ..common.cases import BACKENDS, POLICIES, Case, Gradients, all_equal, parameters, state_of, train

STEPS = 8
SHAPES = [(7,), (3, 5), (), (0,)]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _new_compiler():
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def run(case: Case, compiler: str | None, lr: Any, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """Returns parameters and state after eight steps, the first of them eager, with a scheduler that halves lr."""
    params = parameters(dtype, SHAPES)
    groups: Any = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3}]
    optimizer: Any = case.build(groups, lr=lr, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    norms = []

    def train_step(x: Tensor) -> Tensor:
        before = params[0].detach() * x  # reads the parameter before the step changes it
        optimizer.step()
        return before + params[0].detach()

    step: Callable[[Tensor], Tensor] = train_step
    if compiler is not None:
        step = torch.compile(train_step, fullgraph=True, backend=compiler)
    outputs = []
    for i in range(STEPS):
        Gradients().set(params, i)
        outputs.append((step if i else train_step)(torch.tensor(2.0, dtype=dtype)).detach())
        norms += [] if optimizer.grad_norm is None else [optimizer.grad_norm.clone()]
        scheduler.step()
    return [*params, *outputs, *norms, *state_of(optimizer).values()]


def as_eager(case: Case, compiler: str, backend: str, **options: Any) -> bool:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options |= {"backend": backend, "capturable": True}
    expected = run(case, None, torch.tensor(0.05), **options)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = run(case, compiler, torch.tensor(0.05), **options)
    return graphs() == 1 and len(found) == len(expected) and all_equal(found, expected)


@pytest.mark.feature("torch.compile(fullgraph=True), no recompiles with a tensor lr")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("backend", [pytest.param(b, marks=[pytest.mark.heavy] * (b != "reference")) for b in BACKENDS])
def test_every_policy_compiles_through_interval_ends(policy, backend):
    assert as_eager(Case("SGD-momentum", policy, False), "eager", backend)


@pytest.mark.feature("torch.compile(fullgraph=True), no recompiles with a tensor lr")
@pytest.mark.parametrize("name", ["SGD", "AdamW-amsgrad", "RAdam", "NAdam", "AdaBelief"])
@every_backend
def test_every_backbone_compiles(name, backend):
    assert as_eager(Case(name, "active", True), "eager", backend, maximize=True, max_grad_norm=1.0)


FUNCTIONALIZED = [Case("AdamW", "tlr-times-active", True), Case("SGD-nesterov", "hypergradient-global", False)]


@pytest.mark.feature("torch.compile(fullgraph=True), no recompiles with a tensor lr")
@pytest.mark.parametrize("case", FUNCTIONALIZED, ids=str)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
@every_backend
def test_functionalized_graphs(compiler, case, backend):
    """Functionalization passes copies to the operator, or the original tensors where it knows that this is safe."""
    assert as_eager(case, compiler, backend)


def test_inductor_does_not_copy_parameters_or_state():
    params = parameters(torch.float32)
    optimizer: Any = fa.ActiveAdamW(params, lr=torch.tensor(0.1), interval=2)
    Gradients().set(params, 0)
    optimizer.step()
    torch.compile(optimizer.step, fullgraph=True)()
    assert optimizer._bound is not None  # the operator has received the optimizer's own tensors
    assert all(view.param.grad is None for view in optimizer._bound.participants.views)
    torch._dynamo.reset()
    torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    assert optimizer._bound is None  # the operator has received copies, which are not kept


def test_a_step_on_wrong_tensors_is_noticed(monkeypatch):
    class OfCopies(torch_compile.Bound):
        def __init__(self, participants: Any, params: Any, state: Any) -> None:
            super().__init__(participants, [p.clone() for p in params], state)

    class OfTheOptimizer(torch_compile.Bound):  # right unless functionalization passes copies
        def __init__(self, participants: Any, params: Any, state: Any) -> None:
            super().__init__(
                participants, participants.params, [v for view in participants.views for v in view.state.values()]
            )

    for wrong in (OfCopies, OfTheOptimizer):
        monkeypatch.setattr(torch_compile, "Bound", wrong)
        assert fails(lambda: as_eager(Case("AdamW", "active", True), "aot_eager", "reference"))


def test_numbers_of_the_first_step_in_all_steps_are_noticed():
    first: list[Tensor] = []

    def set_the_first(self: Any, tensors: Any, floats: Any) -> None:
        first.extend(t.clone() for t in tensors)
        set_numbers(self, first, floats)

    set_numbers = torch_compile.Bound.set_numbers
    with broken(torch_compile.Bound, "set_numbers", set_the_first):
        assert fails(lambda: as_eager(Case("AdamW", "active", True), "eager", "reference"))


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.heavy)])
def test_a_training_step_compiles_to_one_graph(compiler):
    """Compiles forward, backward, step and zero_grad, with torch's options to trace backward()."""
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch cannot trace backward()")
    runs = []
    for backend in (None, compiler):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        optimizer = fa.ActiveAdamW(model.parameters(), lr=torch.tensor(0.1), interval=2, max_grad_norm=1.0)

        def train_step(x: Tensor, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step = train_step if backend is None else torch.compile(train_step, fullgraph=True, backend=backend)
        batches = [torch.randn(16, 4) for _ in range(STEPS)]
        with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True):
            losses = [(step if i else train_step)(x) for i, x in enumerate(batches)]
        runs.append([*losses, *(p.detach() for p in model.parameters())])
    torch.testing.assert_close(*runs)
    assert graphs() == 1


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.heavy)])
@every_backend
def test_a_float_lr_recompiles_and_gives_the_eager_results(compiler, backend):
    case = Case("AdamW", "active", True)
    assert all_equal(run(case, compiler, 0.05, backend=backend), run(case, None, 0.05, backend=backend))
    assert graphs() > 1


@every_backend
def test_skipped_steps_and_scaled_gradients_compile(backend):
    runs = []
    for compiler in (None, "aot_eager"):
        params = parameters(torch.float32, SHAPES)
        optimizer: Any = Case("AdamW", "active", True).build(params, backend=backend, fused=True, lr=torch.tensor(0.1))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        step = optimizer.step if compiler is None else torch.compile(optimizer.step, fullgraph=True, backend=compiler)
        for i in range(STEPS):
            Gradients().set(params, i)
            optimizer.found_inf.fill_(float(i in (2, 5)))
            (step if i else optimizer.step)()
        assert optimizer.state[params[0]]["step"] == STEPS - 2
        runs.append([*params, *state_of(optimizer).values()])
    assert all_equal(*runs)


@every_backend
def test_draws_of_aslr_compile(backend):
    runs = []
    for compiler in (None, "aot_eager"):
        params = parameters(torch.float32, SHAPES)
        optimizer: Any = Case("SGD", "fixed", True).build(params, backend=backend, lr=torch.tensor(0.3))
        controller = fa.ASLR(optimizer, seed=3)
        step = optimizer.step if compiler is None else torch.compile(optimizer.step, fullgraph=True, backend=compiler)
        for i in range(STEPS):
            Gradients().set(params, i)
            (step if i else optimizer.step)()
            if i == 4:
                controller.step(1.0)
                controller.step(2.0)
        assert optimizer._random_rates.step == STEPS
        runs.append(params)
    assert all_equal(*runs)


def test_a_compiled_step_follows_changes_from_outside():
    """Changes groups, policies, interval ends and loaded state between compiled steps."""
    runs = []
    for compiler in (None, "eager"):
        params = parameters(torch.float32, SHAPES)
        optimizer: Any = fa.AdamW(params, lr=torch.tensor(0.1), policy=fa.ActiveLR(interval=None))
        step = optimizer.step if compiler is None else torch.compile(optimizer.step, fullgraph=True, backend=compiler)
        for i in range(12):
            Gradients().set(params, i)
            if i == 3:
                params[1].grad = None
            if i == 6:
                optimizer.param_groups[0]["policy"] = fa.ActiveLR(interval=2, high=0.3)
            if i == 9:
                optimizer.load_state_dict(optimizer.state_dict())
            (optimizer.step if i in (0, 6, 9) else step)()
            if i == 4:
                optimizer.end_interval()
        runs.append([*params, *state_of(optimizer).values()])
    assert all_equal(*runs)


def test_a_compiled_step_that_would_create_state_raises_an_error_with_a_remedy():
    params = parameters(torch.float32, SHAPES)
    optimizer = fa.SGD(params, lr=torch.tensor(0.1), momentum=0.9)
    Gradients().set(params, 0)
    with pytest.raises(Exception, match=r"\Athis step would create state.*take one step outside of torch"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert not optimizer.state


def test_a_step_that_creates_state_runs_without_fullgraph():
    params = parameters(torch.float32, SHAPES)
    optimizer = fa.AdamW(params, lr=torch.tensor(0.1))
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        Gradients().set(params, i)
        step()
        assert optimizer.state[params[0]]["step"] == i + 1


def test_a_new_parameter_in_a_compiled_step_raises_an_error_with_a_remedy():
    params = parameters(torch.float32, SHAPES)
    optimizer = fa.AdamW(params, lr=torch.tensor(0.1))
    Gradients().set(params, 0)
    params[1].grad = None
    optimizer.step()
    torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    Gradients().set(params, 1)
    with pytest.raises(Exception, match=r"\Athis step would create state"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()


@pytest.mark.parametrize("policy", [fa.ActiveLR(interval=2), {"name": "ActiveLR", "interval": 2}, None, "no policy"])
def test_a_compiled_step_with_changed_groups_raises_an_error(policy):
    """Guards that Dynamo cannot evaluate would end the process, on Python 3.12 and later."""
    params = parameters(torch.float32, SHAPES)
    optimizer = fa.AdamW(params, lr=torch.tensor(0.1))
    Gradients().set(params, 0)
    optimizer.step()
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    step()
    optimizer.param_groups[0]["policy"] = policy
    # An exception in a compiled graph leaves gradients disabled in torch; the context enables them again.
    with torch.enable_grad(), pytest.raises(RuntimeError, match="have changed since this step was compiled"):
        step()
    optimizer.param_groups[0]["policy"] = fa.ActiveLR(interval=2)
    optimizer.step()
    step()
    assert optimizer.state[params[0]]["step"] == 4
    # Schedulers and zero_grad() read the groups too.
    torch.compile(optimizer.zero_grad, fullgraph=True, backend="eager")()
    optimizer.param_groups[0]["policy"] = fa.ActiveLR(interval=3)
    torch.compile(optimizer.zero_grad, fullgraph=True, backend="eager")()
    assert all(p.grad is None for p in params)


def test_schedulers_see_that_a_compiled_step_was_taken():
    params = parameters(torch.float32, SHAPES)
    optimizer: Any = fa.AdamW(params, lr=torch.tensor(0.1))
    Gradients().set(params, 0)
    optimizer.step()
    del optimizer._opt_called
    torch.compile(optimizer.step, fullgraph=True, backend="eager")()
    assert optimizer._opt_called


def test_a_compiled_step_counts_calls_without_gradients():
    """A group that has no state yet counts the calls of its policy."""
    runs = []
    for compiler in (None, "aot_eager"):
        params = parameters(torch.float32, SHAPES)
        optimizer: Any = fa.SGD(
            [{"params": params[:2], "policy": None}, {"params": params[2:]}],
            lr=torch.tensor(0.1),
            policy=fa.ActiveLR(interval=5),
        )
        step = optimizer.step if compiler is None else torch.compile(optimizer.step, fullgraph=True, backend=compiler)
        for i in range(3):
            Gradients().set(params, i)
            params[2].grad = params[3].grad = None
            (step if i else optimizer.step)()
        optimizer.param_groups[1]["policy"] = fa.ActiveLR(interval=5)
        if compiler is not None:
            with torch.enable_grad(), pytest.raises(RuntimeError, match="have changed since"):
                step()
        Gradients().set(params, 3)
        optimizer.step()
        assert optimizer.state[params[2]]["active_step"] == 4
        runs.append([*params, *state_of(optimizer).values()])
    assert all_equal(*runs)


def test_the_naive_variant_raises_an_error_under_compile():
    p = torch.zeros(3, requires_grad=True)
    optimizer = fa.SGD([p], lr=torch.tensor(0.1), policy=fa.TrainableLR(naive=True, eta=0.1))
    p.grad = torch.zeros(3)
    optimizer.step()
    with pytest.raises(Exception, match=r"\ATrainableLR.naive=True. evaluates the loss twice, which"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()


def test_the_operator_passes_opcheck():
    params = parameters(torch.float32, SHAPES)
    optimizer: Any = fa.AdamW(params, lr=0.1)
    Gradients().set(params, 0)
    optimizer.step()
    (views, state) = optimizer._participants.views, []
    for view in views:
        state += view.state.values()
    own = [p.detach() for p in params], [p.grad for p in params], state, [True] * len(params)
    numbers = [0.1, 0.01, 0.9, 0.999, 1e-8]
    arguments = (optimizer._participants.key, *own, [], numbers, [], None, None)
    torch.library.opcheck(torch.ops.fused_adaptive.compiled_step.default, arguments)


def test_a_compiled_step_updates_the_reference_rate():
    policy = fa.ActiveLR(interval=2, increment=0.01)
    optimizer = fa.SGD(parameters(), lr=torch.tensor(0.1), policy=policy)
    train(optimizer, 1)
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    for lr, expected in ((0.05, 0.1), (0.4, 0.4), (0.2, 0.4)):
        optimizer.param_groups[0]["lr"].fill_(lr)
        step()
        assert optimizer.param_groups[0]["lr_ref"] == pytest.approx(expected)
    assert graphs() == 1
