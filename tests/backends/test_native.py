"""Native backend: operators, plans, and results that do not depend on the number of threads or the processor."""

from __future__ import annotations

import copy
import gc
import os
import resource
import subprocess
import sys

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive import backends
from fused_adaptive.backends import native
from fused_adaptive.policies import TrainableLR

from ..common.breaking import broken, fails
from ..common.cases import CASES, POLICIES, Case, Gradients, all_equal, parameters, state_of, train
from ..regressions import test_runtime as runtime
from ..regressions import test_steps as pitfalls

if reason := native.why_not([torch.device("cpu")]):
    pytest.skip(reason, allow_module_level=True)

SHAPES = [(70_001,), (3, 5), (), (0,), (4097,), (16_384,), (16_385,)]
SOME_CASES = [case for case in CASES if case.optimizer in ("SGD-nesterov", "AdamW-amsgrad", "AdaBelief")]


def run(case: Case, steps: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    params = parameters(dtype, SHAPES)
    optimizer = case.build(params, backend="native")
    train(optimizer, steps, gradients=Gradients(missing=0.2))
    return {f"param {i}": p.detach() for i, p in enumerate(params)} | state_of(optimizer)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.thinned
@pytest.mark.feature("the same bits with any number of threads, any grid", backend="native")
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_threads_change_no_bit(case):
    one = run(case)
    torch.set_num_threads(2)
    assert equal(one, run(case))


BITS = """
import itertools, sys, torch
from tests.backends.test_native import SOME_CASES, run
assert torch.ops.fused_adaptive.cpu_capability() == sys.argv[1], "this processor has less"
dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))  # conversions do not depend on the case
torch.save([run(case, dtype=dtype) for case, dtype in zip(SOME_CASES[::3], dtypes)], sys.argv[2])
"""


@pytest.mark.feature("the same bits on AVX-512, AVX2 and neither", backend="native")
def test_instruction_sets_change_no_bit(tmp_path):
    best = torch.ops.fused_adaptive.cpu_capability()
    levels = ["baseline", "v3", "v4"][: ["baseline", "v3", "v4"].index(best) + 1]
    results = []
    for level in levels:
        environment = {**os.environ, "FUSED_ADAPTIVE_CPU": level}
        file = tmp_path / level
        subprocess.run([sys.executable, "-c", BITS, level, str(file)], env=environment, check=True)
        results.append(torch.load(file, weights_only=True))
    for other in results[1:]:
        assert all(equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_converted_and_rounded_as_in_torch(dtype):
    """Covers all numbers of the format, and a million float32 numbers of all sizes, with ties, infinities and NaN."""

    def descend(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        hypers = [1.0] + [0.0] * 9  # p ← p − g
        backbone = native.STRUCTURE_NUMBERS["SgdPlain"]
        torch.ops.fused_adaptive.step([param], [grad], [], [], backbone, False, False, hypers, [], [])
        return param

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))

    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[~every.isinf()]  # infinity minus its decay of 0 is NaN
    assert same(descend(every.clone(), torch.zeros(len(every))), every)
    ties = every.float() * (1 + torch.finfo(dtype).eps / 2)
    bits = torch.randint(-(2**31), 2**31, (10**6,)).to(torch.int32).view(torch.float32)
    near = torch.randn(10**6) * torch.logspace(-9, 5, 10**6)
    for values in (ties, bits, near):
        assert same(descend(torch.zeros(len(values), dtype=dtype), values), (-values).to(dtype))


# ---- operators ----


def functional_arguments(capacity: int = 300) -> tuple:
    params = [torch.randn(capacity), torch.randn(3, 5)]
    grads = [torch.randn_like(p) for p in params]
    state = [torch.zeros_like(p) for _ in range(2) for p in params] + [torch.zeros(()) for _ in params]
    hypers = [0.01, 0.1, 0.9, 0.999, 1e-8] + [0.0] * 5
    roles = [native.ROLE_NUMBERS[name] for name in ("state0", "state1", "step")]
    return params, grads, state, roles, native.STRUCTURE_NUMBERS["AdamWPlain"], False, False, hypers, [], []


def test_the_functional_step_passes_opcheck():
    native.register_fakes()
    torch.library.opcheck(torch.ops.fused_adaptive.step.default, functional_arguments())


def test_the_functional_step_equals_the_plans_step():
    params, grads, *rest = functional_arguments()
    copies = [p.clone().requires_grad_() for p in params]
    optimizer = fa.AdamW(copies, lr=0.01, weight_decay=0.1, backend="native")
    for _ in range(3):
        torch.ops.fused_adaptive.step(params, grads, *rest)
        for p, grad in zip(copies, grads, strict=True):
            p.grad = grad
        optimizer.step()
    assert all_equal(params, [p.detach() for p in copies])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[0].__setitem__(0, a[0][0].to(torch.int32)), "not float64, float32"),
        (lambda a: a[1].__setitem__(0, a[1][0].to_sparse()), "must be dense"),
        (lambda a: a[2].__setitem__(0, a[2][0].double()), "wrong dtype"),
        (lambda a: a[2].__setitem__(0, a[2][0][:-1]), "differs from it in shape"),
        (lambda a: a[2].__setitem__(0, a[2][2]), "share memory"),
        (lambda a: a[1].__setitem__(0, a[0][0]), "the parameter itself"),
        (lambda a: a[2].pop(), "one tensor a parameter"),
        (lambda a: (a[3].pop(), a[2].pop(), a[2].pop()), "parameter 0 lacks the state step"),
        (lambda a: a[7].pop(), "hyperparameters a group"),
        (lambda a: a[3].__setitem__(0, 99), "there is no role 99"),
        (lambda a: a[2].__setitem__(4, torch.zeros(2)), "one element"),
    ],
)
def test_bad_input_of_the_operator_raises_before_anything_is_written(change, message):
    arguments = functional_arguments()
    change(arguments)
    tensors = [t for group in arguments[:3] for t in group]
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_adaptive.step(*arguments)
    assert all(torch.equal(t.to_dense(), b.to_dense()) for t, b in zip(tensors, before, strict=True))


# ---- pitfalls (docs/pitfalls.md) of the kernels ----


@pytest.fixture
def by_default(monkeypatch):
    monkeypatch.setenv("FUSED_ADAPTIVE_BACKEND", "native")


@pytest.mark.thinned
@pytest.mark.feature("empty tensors", backend="native")
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_empty_tensors_are_fine(case, by_default):
    assert pitfalls.empty_tensors_change_nothing_for_others(case)


def test_tensors_of_any_size_count_their_steps():
    """Tensors without chunks, with one and with several are counted in different places."""
    params = parameters(torch.float32, SHAPES)
    optimizer = adamw(params)
    train(optimizer, 3)
    assert [float(optimizer.state[p]["step"]) for p in params] == [3.0] * len(params)


@pytest.mark.thinned
@pytest.mark.feature("channels_last, strided and misaligned tensors", backend="native")
@pytest.mark.parametrize("of_grad", pitfalls.LAYOUTS)
@pytest.mark.parametrize("of_param", pitfalls.LAYOUTS)
@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-preconditioned-tensor", "hypergradient-global"])
def test_strides_of_parameters_and_gradients_may_differ(policy, of_param, of_grad, by_default):
    assert pitfalls.strides_do_not_matter(Case("SGD-momentum", policy, True), of_param, of_grad)


@pytest.mark.feature("mixed dtypes; state that loading does not cast", backend="native")
@pytest.mark.parametrize("case", SOME_CASES, ids=str)
def test_mixed_dtypes_move_and_state_is_not_cast(case, by_default):
    assert pitfalls.every_dtype_moves_and_keeps_its_state(case)


@pytest.mark.parametrize("case", [c for c in SOME_CASES if c.policy in ("fixed", "active")], ids=str)
def test_no_element_of_a_large_odd_tensor_is_skipped(case, by_default):
    assert pitfalls.large_odd_tensor_is_the_same_as_its_chunks(case)


def test_hypergradient_rate_is_never_negative_nor_changed_midway(by_default):
    assert pitfalls.hypergradient_rate_is_never_negative()
    assert pitfalls.hypergradient_rate_is_one_for_all_tensors_of_a_step()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RAdam", "AdaBelief"])
def test_decay_is_coupled_or_decoupled_as_asked(name, by_default):
    assert pitfalls.decay_is_of_the_right_kind(name)


@pytest.mark.feature("GradScaler, with and without fused=True", backend="native")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["fixed", "active", "tlr-gradient-global", "hypergradient-global"])
@pytest.mark.parametrize("optimizer", ["SGD-momentum", "AdamW"])
def test_amp_overflow_changes_nothing_and_ends_no_interval(optimizer, policy, fused, by_default):
    case = Case(optimizer, policy, True)
    assert runtime.overflow_changes_nothing(case, fused)
    if fused:
        step = native.step
        with broken(native, "step", lambda participants, found_inf, *rest: step(participants, None, *rest)):
            assert fails(lambda: runtime.overflow_changes_nothing(case, fused))


@pytest.mark.feature("no copy of the parameters in a step", backend="native")
@pytest.mark.parametrize("policy", [p for p in POLICIES if "displacement" not in p])
def test_a_step_allocates_no_tensor(policy, by_default):
    assert runtime.extra_bytes_of_a_step(Case("AdamW", policy, True), torch.bfloat16) == 0


# ---- the plan ----


def adamw(params, **overrides):
    return fa.AdamW(params, lr=0.01, weight_decay=0.1, backend="native", **overrides)


@pytest.mark.parametrize("groups", [3, 40])
@pytest.mark.parametrize("policy", ["tlr-displacement-global", "tlr-gradient-eta", "hypergradient-global", "active"])
def test_a_tensor_lr_equals_a_float_lr(policy, groups):
    """Sets float32 and float64 tensors, fills them, and replaces them by floats. GPUs read them on the device."""
    runs = []
    for kind in (float, torch.tensor):
        params = parameters(torch.float32, [(5,)] * groups)
        options = {"params": [], "lr": 0.0}
        case = Case("SGD-momentum", policy, False)
        rates = [2.0 ** -(4 + i % 5) for i in range(groups)]
        dtypes = [torch.float32, torch.float64]
        made = [
            options
            | {"params": [p], "lr": lr if kind is float or i % 3 == 2 else torch.tensor(lr, dtype=dtypes[i % 2])}
            for i, (p, lr) in enumerate(zip(params, rates, strict=True))
        ]
        optimizer = case.build(made, backend="native", capturable=True)
        for step in range(7):
            Gradients().set(params, step)
            optimizer.step()
            for i, group in enumerate(optimizer.param_groups):
                if isinstance(group["lr"], torch.Tensor) and step != 3:
                    group["lr"].mul_(0.5)
                elif isinstance(group["lr"], torch.Tensor) and i % 2:
                    group["lr"] = group["lr"] * 0.5
                else:
                    group["lr"] = float(group["lr"]) * 0.5
        runs.append([*params, *state_of(optimizer).values()])
    assert all_equal(*runs)


def test_versions_increase_so_that_autograd_notices_changes():
    params = parameters(torch.float32)
    optimizer = adamw(params)
    train(optimizer, 1)
    versions = [p._version for p in params]
    params[0].grad = None
    optimizer.step()
    assert [p._version - v for p, v in zip(params, versions, strict=True)] == [0, 1, 1, 1, 1, 1]
    moment = optimizer.state[params[1]]["exp_avg"]
    version = moment._version
    optimizer.step()
    assert moment._version == version + 1


@pytest.mark.parametrize("policy", [None, fa.ActiveLR(interval=2)])
def test_a_moved_parameter_is_found(policy):
    moved, still = parameters(torch.float32), parameters(torch.float32)
    a, b = adamw(moved, policy=policy), adamw(still, policy=policy)
    train(a, 3)
    train(b, 3)
    for p in moved:
        p.data = p.data.clone()
    train(a, 1, start=3)
    train(b, 1, start=3)
    state = a.state[moved[0]]
    state["exp_avg"].data = state["exp_avg"].data.clone()
    a.end_interval()
    b.end_interval()
    assert all_equal(train(a, 3, start=4), train(b, 3, start=4))


def test_a_parameter_with_new_strides_at_the_same_address_keeps_its_state():
    """The address is the same, but the elements are at other offsets."""

    def run(backend: str) -> list[torch.Tensor]:
        params = parameters(torch.float32, [(6, 6), (5,)])
        optimizer = fa.AdamW(params, lr=0.01, weight_decay=0.1, backend=backend)
        train(optimizer, 3)
        params[0].data = params[0].data.t()
        for step in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.1 * (step + 1), memory_format=torch.contiguous_format)
            optimizer.step()
        return params

    pairs = zip(run("native"), run("reference"), strict=True)
    assert all(torch.allclose(p, q, rtol=1e-6, atol=1e-7) for p, q in pairs)


def test_a_parameter_whose_dtype_changes_keeps_its_state():
    params = parameters(torch.float32)
    optimizer = adamw(params)
    train(optimizer, 2)
    for p in params:
        p.data, p.grad = p.data.bfloat16(), None
    train(optimizer, 2, start=2)
    assert all(p.dtype == torch.bfloat16 for p in params)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32
    assert optimizer.state[params[0]]["step"] == 4


def test_plans_are_freed():
    gc.collect()  # frees what other tests have left
    before = torch.ops.fused_adaptive.plan_count()
    optimizer = adamw(parameters(torch.float32))
    train(optimizer, 2)
    assert torch.ops.fused_adaptive.plan_count() == before + 1
    del optimizer
    gc.collect()
    assert torch.ops.fused_adaptive.plan_count() == before


def test_gradients_are_not_kept_alive():
    import weakref

    params = parameters(torch.float32)
    optimizer = adamw(params)
    train(optimizer, 2)
    grad = weakref.ref(params[0].grad)
    optimizer.zero_grad()
    assert grad() is None


def test_a_step_needs_no_memory_apart_from_the_state():
    params = parameters(torch.float32, [(12_000_000,)])
    optimizer = adamw(params, policy=fa.ActiveLR(interval=2))
    params[0].grad = torch.randn(12_000_000)
    optimizer.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(4):
        optimizer.step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 12_000  # KiB; one copy would take 47 000


def test_a_global_gain_that_one_plan_cannot_hold_goes_to_the_reference(monkeypatch):
    """The gain is over tensors of several plans."""
    monkeypatch.setattr(native, "_on_device", lambda view: bool(view.group["capturable"]))
    policy = TrainableLR(interval=2)
    runs = []
    for backend in ("native", "reference"):
        params = parameters(torch.float64)
        groups = [{"params": params[:3], "capturable": True}, {"params": params[3:]}]
        optimizer = fa.AdamW(groups, lr=0.01, policy=policy, backend=backend)
        runs.append(train(optimizer, 5))
    assert all_equal(*runs)


def test_auto_selects_native_and_a_copied_optimizer_has_its_own_plan():
    params = parameters(torch.float32)
    optimizer = fa.AdamW(params, lr=0.01)
    assert optimizer._step_backend.name == "native" == backends.select("auto", [torch.device("cpu")]).name
    train(optimizer, 2)
    twin = copy.deepcopy(optimizer)
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    train(twin, 2)
    assert all_equal(before, params)
    assert not all_equal(before, twin_params)
