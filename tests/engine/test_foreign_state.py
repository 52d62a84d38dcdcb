"""State written by others: torch's loader, wrappers, users, torch.distributed.checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import fused_adaptive as fa

from ..common.cases import BACKENDS, Gradients, parameters, state_of, train, unmoved

every_backend = pytest.mark.parametrize("backend", BACKENDS)

POLICIES: dict[str, Any] = {
    "fixed": None,
    "active": fa.ActiveLR(interval=2, high=0.1),
    "trainable": fa.TrainableLR(interval=2),
    "preconditioned": fa.TrainableLR(interval=2, source="preconditioned", granularity="tensor"),
    "hypergradient": fa.Hypergradient(1e-6),
}
every_policy = pytest.mark.parametrize("policy", POLICIES)


def dtypes(optimizer: torch.optim.Optimizer) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in state_of(optimizer).items()}


# ---- dtypes ----


@every_backend
@every_policy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_cast_by_torchs_loader_gets_its_dtypes_back(dtype, policy, backend):
    """The loader casts everything to the parameter's dtype, also counts and signs. float64 gains lose bits."""
    ends = []
    for through_torch in (False, True):
        params = [torch.linspace(1, 2, 5).to(dtype).requires_grad_() for _ in range(2)]
        optimizer = fa.AdamW(params, lr=0.01, policy=POLICIES[policy], backend=backend)
        for step in range(7):
            Gradients().set(params, step)
            optimizer.step()
            if step == 2:
                expected = dtypes(optimizer)
                if through_torch:
                    torch.optim.Optimizer.load_state_dict(optimizer, copy.deepcopy(optimizer.state_dict()))
        assert dtypes(optimizer) == expected
        ends.append([p.detach().float() for p in params])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=0)


@every_backend
@pytest.mark.parametrize(
    "reset",
    [
        lambda p, value: torch.zeros_like(p),  # bfloat16
        lambda p, value: torch.zeros(p.shape, dtype=torch.float64),
        lambda p, value: torch.zeros_like(p, memory_format=torch.contiguous_format).T.contiguous().T.float(),
    ],
    ids=["in the parameter's dtype", "in float64", "in another layout"],
)
def test_moments_reset_by_hand_are_used(reset: Callable[[Tensor, Tensor], Tensor], backend):
    def run(put: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        params = parameters(torch.bfloat16, [(4, 3)])
        optimizer = fa.AdamW(params, lr=0.01, backend=backend)
        train(optimizer, 3)
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[params[0]][name] = put(params[0].detach(), optimizer.state[params[0]][name])
        train(optimizer, 3, start=3)
        return [params[0].detach(), *optimizer.state[params[0]].values()]

    assert all(map(torch.equal, run(reset), run(lambda p, value: torch.zeros_like(value))))


@every_backend
def test_step_counts_do_not_saturate_in_low_precision(backend):
    (p,) = parameters(torch.float32, [(4,)])
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        optimizer = fa.AdamW([p], backend=backend)
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        torch.set_default_dtype(default)
    assert optimizer.state[p]["step"] == 300
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] = {n: v.bfloat16() if v.is_floating_point() else v for n, v in saved["state"][0].items()}
    other = fa.AdamW([p], backend=backend)
    other.load_state_dict(saved)
    train(other, 10)
    assert other.state[p]["step"] == 310


@every_backend
def test_counts_that_are_python_numbers_are_used(backend):
    params = parameters(torch.float32, [(4,)])
    optimizer = fa.AdamW(params, policy=POLICIES["active"], backend=backend)
    train(optimizer, 1)
    optimizer.state[params[0]].update(step=7, active_step=1)
    train(optimizer, 1, start=1)
    state = optimizer.state[params[0]]
    assert (state["step"], state["active_step"]) == (torch.tensor(8.0), torch.tensor(0))


@every_backend
@pytest.mark.parametrize(
    ("value", "words"),
    [(torch.zeros(3), r"'exp_avg' of parameter 0 .* shape \(3,\) instead of \(4,\)"), ("x", "is no tensor but 'x'")],
)
def test_unusable_state_is_named_before_anything_changes(value, words, backend):
    params = parameters(torch.float32, [(4,)])
    optimizer = fa.AdamW(params, backend=backend)
    train(optimizer, 1)
    before = params[0].detach().clone()
    optimizer.state[params[0]]["exp_avg"] = value
    with pytest.raises(RuntimeError, match=words) as caught:
        train(optimizer, 1, start=1)
    assert "csrc" not in str(caught.value)
    assert torch.equal(params[0], before)


@every_backend
@pytest.mark.parametrize("names", [("step", "step"), ("exp_avg", "exp_avg"), ("exp_avg", "exp_avg_sq")], ids="-".join)
def test_a_tensor_that_is_set_for_two_entries_counts_as_two(names, backend):
    def run(put: Callable[[Tensor], Tensor]) -> list[Tensor]:
        params = parameters(torch.float32, [(4,), (4,)])
        optimizer = fa.AdamW(params, lr=0.01, policy=POLICIES["active"], backend=backend)
        train(optimizer, 3)
        first, second = (optimizer.state[p] for p in params)
        first[names[0]] = first["step"].clone() if names[0] == "step" else torch.full((4,), 0.25)
        second[names[1]] = put(first[names[0]])
        train(optimizer, 3, start=3)
        return [*params, *state_of(optimizer).values()]

    assert all(map(torch.equal, run(lambda value: value), run(torch.clone)))


@every_backend
def test_a_tensor_that_is_set_for_two_entries_and_freed_is_named(backend):
    params = parameters(torch.float32, [(4,), (4,)])
    optimizer = fa.AdamW(params, lr=0.01, backend=backend)
    train(optimizer, 3)
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    for p in params:
        optimizer.state[p]["exp_avg"] = freed
    with unmoved(params), pytest.raises(RuntimeError, match="the memory of 'exp_avg' of parameter 0 has been freed"):
        train(optimizer, 1)


# ---- entries of other libraries ----


@every_backend
@pytest.mark.parametrize("value", [1, None, 0.5, "note", [1, 2], {"a": 1}, torch.tensor(1.0), ...], ids=repr)
def test_foreign_entries_in_state_are_kept(value, backend):
    params = parameters(torch.float32)
    optimizer = fa.SGD(params, momentum=0.9, backend=backend)
    optimizer.state["note"] = value
    train(optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, 1, start=2)
    optimizer.end_interval()
    assert optimizer.state["note"] is value


# ---- state that groups share ----


@every_backend
def test_groups_that_are_given_one_global_policy_share_its_gain(backend):
    """The gain and count of the earlier groups are kept; new groups start with empty sums."""
    first, second = parameters(shapes=[(20,), (30,)])
    groups = [
        {"params": [first], "policy": fa.TrainableLR(interval=4)},
        {"params": [second], "policy": fa.TrainableLR(interval=3)},
    ]
    optimizer = fa.SGD(groups, lr=1e-2, backend=backend)
    for step in range(20):
        Gradients().set([first, second], step)
        optimizer.step()
        a, b = optimizer.state[first], optimizer.state[second]
        if step == 8:
            assert a["gain"] != b["gain"]
            kept = a["gain"].item()
            optimizer.param_groups[1]["policy"] = dict(optimizer.param_groups[0]["policy"])
        if step == 9:
            assert a["gain"] == b["gain"] == kept
            assert (b["direction_prev"] == 0).all()
            assert b["tlr_applied"] == 1
        if step > 8:
            assert a["gain"] == b["gain"]
            assert a["tlr_step"] == b["tlr_step"] == (step + 1) % 4


@every_backend
def test_groups_whose_policy_changes_together_keep_their_state(backend):
    """Only the numbers of the policy change: sums, counts and gains stay."""
    params = parameters(shapes=[(20,), (30,)])
    policies = fa.TrainableLR(interval=4), fa.TrainableLR(interval=4, c=0.2)
    optimizer = fa.SGD([{"params": [p]} for p in params], lr=1e-2, policy=policies[0], backend=backend)
    train(optimizer, 9)
    before = {name: value.clone() for name, value in state_of(optimizer).items()}
    for group in optimizer.param_groups:
        group["policy"] = policies[1]
    for p in params:
        p.grad = None
    optimizer.step()
    after = state_of(optimizer)
    for name, value in before.items():
        assert torch.equal(after[name], value + 1 if name.endswith("tlr_step") else value), name
    assert before["0.gain"] == before["1.gain"] != 1


@every_backend
@every_policy
def test_reading_a_state_dict_before_training_does_not_change_intervals(policy, backend):
    """torch.distributed.checkpoint creates state by a step with zero gradients and lr 0."""
    model = torch.nn.Linear(4, 3)
    other = copy.deepcopy(model)

    def ends(module: torch.nn.Module, reads: bool) -> list[dict[str, Any]]:
        optimizer = fa.SGD(module.parameters(), lr=0.1, policy=POLICIES[policy], backend=backend)
        if reads:
            get_optimizer_state_dict(module, optimizer)
        found = []
        for step in range(5):
            Gradients().set(list(module.parameters()), step)
            optimizer.step()
            found.append({k: v.clone() for k, v in state_of(optimizer).items() if not k.endswith(".step")})
        return found

    for mine, yours in zip(ends(model, reads=True), ends(other, reads=False), strict=True):
        assert all(torch.equal(mine[name], yours[name]) for name in yours)


@every_backend
def test_a_first_step_at_lr_zero_with_gradients_counts(backend):
    params = parameters()
    optimizer = fa.SGD(params, lr=0.0, policy=POLICIES["active"], backend=backend)
    train(optimizer, 1)
    assert {int(state["active_step"]) for state in optimizer.state.values()} == {1}


@every_backend
def test_sparse_state_is_refused_before_anything_moves(backend):
    params = parameters(torch.float32, [(3,), (4,)])
    optimizer = fa.AdamW(params, backend=backend)
    train(optimizer, 2)
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(4).to_sparse()
    message = r"the state 'exp_avg' of parameter 1 .* is sparse \(torch.sparse_coo\)"
    with unmoved(params), pytest.raises(RuntimeError, match=message):
        optimizer.step()


# ---- state that is changed in place ----

IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "another dtype": lambda value: setattr(value, "data", value.data.bfloat16()),
    "swapped": lambda value: torch.utils.swap_tensors(value, value.detach().bfloat16()),
}


@every_backend
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_state_whose_data_get_another_dtype_gets_its_own_back(change, name, backend):
    params = parameters(torch.float32, [(3,), (4,)])
    optimizer = fa.AdamW(params, backend=backend)
    train(optimizer, 2)
    change(optimizer.state[params[1]][name])
    train(optimizer, 2, start=2)
    assert optimizer.state[params[1]][name].dtype == torch.float32


@every_backend
def test_state_whose_data_get_another_shape_is_refused_before_anything_moves(backend):
    params = parameters(torch.float32, [(3,), (4,)])
    optimizer = fa.AdamW(params, backend=backend)
    train(optimizer, 2)
    optimizer.state[params[1]]["exp_avg"].data = torch.zeros(2)
    message = r"'exp_avg' of parameter 1 .* has shape \(2,\) instead of \(4,\)"
    with unmoved(params), pytest.raises(RuntimeError, match=message):
        optimizer.step()


@every_backend
@pytest.mark.parametrize("kind", ["expanded", "inference"])
def test_state_that_torch_refuses_to_write_to_is_copied(kind, backend):
    params, others = parameters(torch.float32, [(3,), (4,)]), parameters(torch.float32, [(3,), (4,)])
    for ps in (params, others):
        optimizer = fa.AdamW(ps, backend=backend)
        train(optimizer, 2)
        moment = torch.zeros(4)
        if ps is params:
            with torch.inference_mode(kind == "inference"):
                moment = torch.zeros(4) if kind == "inference" else torch.zeros(1).expand(4)
        optimizer.state[ps[1]]["exp_avg"] = moment
        train(optimizer, 2, start=2)
    assert all(map(torch.equal, params, others))


@every_backend
def test_a_nadam_checkpoint_through_torchs_loader_can_be_continued(backend):
    """torch's loader casts mu_product to the parameter's dtype, and not step."""
    params = parameters(torch.float64)
    theirs = torch.optim.NAdam(params)
    train(theirs, 2)
    theirs.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(theirs, 1, start=2)
    others = [p.detach().clone().requires_grad_() for p in params]
    ours = fa.NAdam(others, backend=backend)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for optimizer in (theirs, ours):
        train(optimizer, 3, start=3)
    for mine, yours in zip(others, params, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [np.int64(1), np.float32(1), np.float64(1)], ids=lambda value: type(value).__name__)
def test_a_step_count_of_numpy_loads(step):
    params = parameters()
    theirs = torch.optim.AdamW(params)
    train(theirs, 1)
    saved = theirs.state_dict()
    saved["state"][0]["step"] = step
    ours = fa.AdamW(params)
    ours.load_state_dict(saved)
    assert ours.state[params[0]]["step"] == 1


@every_backend
@every_policy
def test_reading_a_state_dict_keeps_the_calls_before_the_first_gradient(policy, backend):
    ends = []
    for reads in (False, True):
        model = torch.nn.Linear(4, 3)
        torch.nn.init.constant_(model.weight, 0.5)
        torch.nn.init.constant_(model.bias, 0.5)
        optimizer = fa.SGD(model.parameters(), lr=0.1, policy=POLICIES[policy], backend=backend)
        optimizer.step()
        if reads:
            get_optimizer_state_dict(model, optimizer)
        train(optimizer, 4)
        ends.append({k: v.clone() for k, v in state_of(optimizer).items()} | dict(model.named_parameters()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
