"""Controllers, the range test and exported weights under torch's wrappers: part of script.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import fused_adaptive as fa
from fused_adaptive.core import ranks

from .models import Net, batch, ddp, sharded, train
from .sharded import assert_ranks_agree, whole


def evaluate(model: nn.Module, device: torch.device) -> Tensor:
    """Under FSDP2 the root then has whole parameters, until the next backward pass."""
    with torch.no_grad():
        return model(batch(0, device)[0])


def parts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: ranks.local_part(t.detach()).clone() for name, t in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_here(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    train(model, optimizer, steps, dist.get_rank(), dist.get_world_size())


def batches(device: torch.device) -> list[tuple[Tensor, Tensor]]:
    return [batch(step, device) for step in range(3)]


# ---- FSDP2 after an evaluation ----


def check_aalr_after_an_evaluation_restores_the_shards(device: torch.device) -> None:
    model: Any = sharded(device, "all")(Net().to(device))
    params = dict(model.named_parameters())
    optimizer = fa.AdamW(model.parameters(), lr=0.01)
    evaluate(model, device)
    controller = fa.AALR(optimizer, model, initial_loss=10.0, patience=1)
    kept, output = parts(params), evaluate(model, device)
    for loss, action in ((math.nan, "restore_initial"), (1.0, "save"), (math.nan, "restore_best")):
        train_here(model, optimizer, 2)
        trained = parts(params), evaluate(model, device)
        assert not equal(trained[0], kept)
        if action == "save":
            kept, output = trained
        controller.step(loss)
        assert controller.action == action
        assert equal(parts(params), kept)
        assert torch.equal(evaluate(model, device), output), "the model computes with what was restored"


def check_a_snapshot_of_whole_parameters_does_not_fit_shards(device: torch.device) -> None:
    """And it is noticed before a tensor is overwritten."""
    model: Any = sharded(device, "all")(Net().to(device))
    controller = fa.AALR(fa.AdamW(model.parameters(), lr=0.01), model, initial_loss=10.0)
    state = controller.state_dict()
    name = list(state["snapshot"])[-1]
    bad = {**state, "snapshot": {**state["snapshot"], name: whole(state["snapshot"][name])}}
    before = parts(state["snapshot"])
    with pytest.raises(
        ValueError, match=rf"'{name}' is of shape \(1,\) in the snapshot and of shape \(1,\) as .*Shard"
    ):
        controller.load_state_dict(bad)
    assert equal(parts(controller.state_dict()["snapshot"]), before)


def check_range_test_after_an_evaluation_restores_the_shards(device: torch.device) -> None:
    model: Any = sharded(device, "all")(Net().to(device))
    params = dict(model.named_parameters())
    optimizer = fa.AdamW(model.parameters(), lr=0.01)
    train_here(model, optimizer, 2)
    output = evaluate(model, device)
    before = parts(params)
    state = {p: parts(values) for p, values in optimizer.state.items()}
    fa.lr_range_test(model, optimizer, batches(device), nn.functional.mse_loss, steps=4)
    assert equal(parts(params), before)
    assert all(equal(parts(optimizer.state[p]), values) for p, values in state.items())
    assert torch.equal(evaluate(model, device), output)


def check_masters_are_exported_and_imported_after_an_evaluation(device: torch.device) -> None:
    model: Any = sharded(device, "all")(Net().to(device).bfloat16())
    optimizer = fa.SGD(model.parameters(), lr=0.1, master="split")
    x, y = (t.bfloat16() for t in batch(0, device))
    (model(x) - y).square().mean().backward()
    optimizer.step()
    expected = parts(fa.export_fp32(model, optimizer))
    assert any(not torch.equal(w, w.bfloat16().float()) for w in expected.values()), "masters have more digits"
    with torch.no_grad():
        model(x)
    assert equal(parts(fa.export_fp32(model, optimizer)), expected)
    with torch.no_grad():
        model(x)
    weights = {name: whole(w) + 0.001 for name, w in fa.export_fp32(model, optimizer).items()}
    fa.import_fp32(model, optimizer, weights)  # each rank keeps its part
    found = fa.export_fp32(model, optimizer)
    assert equal({name: whole(w) for name, w in found.items()}, weights)


# ---- an optimizer inside another ----


def zero_redundancy(model: nn.Module) -> Any:
    policy = fa.ActiveLR(interval=2)
    return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fa.SGD, lr=0.01, momentum=0.9, policy=policy)


def check_aalr_resets_the_optimizer_inside_zero_redundancy(device: torch.device) -> None:
    model = ddp(Net().to(device))
    optimizer = zero_redundancy(model)
    controller = fa.AALR(optimizer, model, initial_loss=10.0)
    train_here(model, optimizer, 3)
    assert optimizer.optim.state
    controller.step(math.nan)
    assert controller.action == "restore_initial"
    assert not optimizer.optim.state


def check_range_test_restores_the_optimizer_inside_zero_redundancy(device: torch.device) -> None:
    model = ddp(Net().to(device))
    optimizer = zero_redundancy(model)
    train_here(model, optimizer, 3)
    before = {p: parts(values) for p, values in optimizer.optim.state.items()}
    fa.lr_range_test(model, optimizer, batches(device), nn.functional.mse_loss, steps=5)
    assert before.keys() == optimizer.optim.state.keys()
    assert all(equal(parts(optimizer.optim.state[p]), values) for p, values in before.items())
    assert [group["lr"] for group in optimizer.optim.param_groups] == [0.01]


# ---- DDP ----


def check_ranks_end_a_range_test_together(device: torch.device) -> None:
    """Rank 0 alone sees a loss that is not finite, and would leave the others waiting for its gradients."""
    model = ddp(Net().to(device))
    steps = 0

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        loss = nn.functional.mse_loss(outputs, targets)
        return loss * math.nan if steps == 3 and dist.get_rank() == 0 else loss + dist.get_rank()

    optimizer = fa.SGD(model.parameters(), lr=0.01)
    test = fa.lr_range_test(model, optimizer, batches(device), loss_fn, max_lr=0.01, steps=10)
    assert (steps, len(test.losses)) == (3, 2)
    assert_ranks_agree(test.losses)


CHECKS: dict[str, Callable[[torch.device], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
