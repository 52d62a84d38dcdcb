"""Models under torch's wrappers, against the same model in one process: part of script.py."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import fused_adaptive as fa
from fused_adaptive.core import ranks, shards

from ..common.breaking import broken
from ..common.cases import POLICIES
from .sharded import assert_close, assert_ranks_agree, backends, digests, fails_somewhere, mesh_of

TO_RUN = {
    "fixed": (fa.AdamW, {"lr": 0.01}),
    "active": (fa.AdamW, {"lr": 0.01, "policy": POLICIES["active"]}),
    "tlr-times-active": (fa.AdamW, {"lr": 0.01, "policy": POLICIES["tlr-times-active"]}),
    "tlr-preconditioned-tensor": (fa.AdamW, {"lr": 0.01, "policy": POLICIES["tlr-preconditioned-tensor"]}),
    "tlr-displacement-global": (fa.SGD, {"lr": 0.05, "momentum": 0.8, "policy": POLICIES["tlr-displacement-global"]}),
    "hypergradient-global": (fa.AdamW, {"lr": 0.01, "policy": POLICIES["hypergradient-global"]}),
}


class Net(nn.Module):
    """The first layer has uneven shards, the last has mostly empty ones; the others can be halved twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.before = nn.Linear(6, 7, dtype=torch.float64)
        self.first = nn.Linear(7, 8, dtype=torch.float64)
        self.norm = nn.LayerNorm(8, dtype=torch.float64)
        self.second = nn.Linear(8, 8, dtype=torch.float64)
        self.last = nn.Linear(8, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(self.before(x))))
        return self.last(torch.tanh(self.second(x)))


def batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 4, 6, generator=generator, dtype=torch.float64)
    return x.to(device), x.sum(-1, keepdim=True).sin().to(device)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, rank: int = 0, ranks: int = 1) -> None:
    """Steps on this rank's part of each batch. ``rank`` and ``ranks``: those that the batch is split over."""
    device = next(model.parameters()).device
    for step in range(steps):
        x, y = batch(step, device)
        optimizer.zero_grad()
        (model(x[rank::ranks]) - y[rank::ranks]).square().mean().backward()
        optimizer.step()


def compare(model: nn.Module, optimizer: fa.AdaptiveOptimizer, alone: nn.Module, other: fa.AdaptiveOptimizer) -> None:
    params = list(model.parameters())
    state = [(p, name) for p in params for name in optimizer.state[p]]
    assert_ranks_agree([*params, *(optimizer.state[p][name] for p, name in state)])
    # A wrapper may list parameters in another order.
    for (name, p), (_, q) in zip(sorted(named(model)), sorted(named(alone)), strict=True):
        assert_close(p, q, name)
        for entry, value in optimizer.state[p].items():
            assert_close(value, other.state[q][entry], f"{entry} of {name}")


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters()]


def agrees(
    device: torch.device,
    wrap: Callable[[nn.Module], nn.Module],
    policy: str,
    backend: str,
    rank: int | None = None,
    ranks: int | None = None,
) -> bool:
    cls, arguments = TO_RUN[policy]
    alone = Net().to(device)
    model = wrap(copy.deepcopy(alone))
    ours, other = (cls(m.parameters(), weight_decay=0.1, backend=backend, **arguments) for m in (model, alone))
    rank, ranks = dist.get_rank() if rank is None else rank, dist.get_world_size() if ranks is None else ranks
    train(model, ours, 7, rank, ranks)
    train(alone, other, 7)
    compare(model, ours, alone, other)
    return True


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(device: torch.device, *names: str, **options: Any) -> Callable[[Any], nn.Module]:
    def wrap(model: Any) -> nn.Module:
        for layer in (model.first, model.second, model):
            fully_shard(layer, mesh=mesh_of(device, *names), **options)
        return model

    return wrap


def tensor_parallel(device: torch.device, model: nn.Module, sequence: bool = True) -> nn.Module:
    """Shards two linear layers by columns and by rows, and a norm whose gradients are partial sums."""
    mesh = mesh_of(device, "outer", "inner")["inner"] if not sequence else mesh_of(device, "all")
    if sequence:
        plan = {
            "first": ColwiseParallel(output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "second": ColwiseParallel(input_layouts=Shard(1)),
            "last": RowwiseParallel(),
        }
    else:
        plan = {"second": ColwiseParallel(), "last": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def check_ddp(device: torch.device) -> None:
    for backend in backends(device):
        for policy in TO_RUN:
            agrees(device, ddp, policy, backend)


def check_fsdp2(device: torch.device) -> None:
    for backend in backends(device):
        for policy in TO_RUN:
            agrees(device, sharded(device, "all"), policy, backend)


def check_hsdp(device: torch.device) -> None:
    for backend in backends(device):
        agrees(device, sharded(device, "outer", "inner"), "tlr-times-active", backend)


def check_fsdp2_offloaded(device: torch.device) -> None:
    pinned = device.type == "cuda"
    wrap = sharded(device, "all", offload_policy=CPUOffloadPolicy(pin_memory=pinned))
    for backend in backends(torch.device("cpu")):
        agrees(device, wrap, "tlr-times-active", backend)


def check_tensor_parallel(device: torch.device) -> None:
    """All ranks use the whole batch. The norm's gradient is Partial, and wrong unless it is redistributed."""
    for backend in backends(device):
        for policy in ("fixed", "tlr-times-active", "tlr-preconditioned-tensor"):

            def check(policy: str = policy, backend: str = backend) -> bool:
                return agrees(device, lambda m: tensor_parallel(device, m), policy, backend, rank=0, ranks=1)

            with broken(shards.Shard, "localize_gradient", keep_partial):
                assert fails_somewhere(check), "a Partial gradient taken as it is was not noticed"
            assert check()


def keep_partial(part: shards.Shard) -> bool:
    grad: Any = part.param.grad
    part.view.param.grad = None if grad is None else ranks.local_part(grad)
    return True


def check_fsdp2_with_tensor_parallel(device: torch.device) -> None:
    """Shards over both dimensions of a mesh, and replicates along one."""

    def wrap(model: nn.Module) -> Any:
        model = tensor_parallel(device, model, sequence=False)
        return fully_shard(model, mesh=mesh_of(device, "outer", "inner")["outer"])

    grid = mesh_of(device, "outer", "inner")
    for backend in backends(device):
        for policy in ("tlr-times-active", "hypergradient-global"):
            agrees(device, wrap, policy, backend, rank=grid.get_local_rank("outer"), ranks=2)


def check_amp(device: torch.device) -> None:
    """fused=True under GradScaler: infinity in one rank's shard skips the step on all ranks."""
    for backend in backends(device):
        model: Any = sharded(device, "all")(Net().float().to(device))
        policy = (fa.TrainableLR(interval=2, source="gradient"), fa.ActiveLR(interval=2))
        optimizer = fa.AdamW(model.parameters(), lr=0.01, policy=policy, fused=True, backend=backend)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
        for step in range(4):
            x, y = (t.float() for t in batch(step, device))
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            before = digests([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
            if step == 2 and dist.get_rank() == dist.get_world_size() - 1:
                ranks.local_part(model.first.weight.grad).fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
            after = digests([*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
            assert (before == after) == (step == 2)
        assert_ranks_agree([v for s in optimizer.state.values() for v in s.values()])


def check_fsdp1(device: torch.device) -> None:
    """Element policies work, and scalar ones with process_group= and flat parameters. Others raise an error."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def wrap(original: bool) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(Net().to(device), use_orig_params=original, device_id=device)

    rank, ranks, policy = dist.get_rank(), dist.get_world_size(), POLICIES["tlr-gradient-global"]
    for backend in backends(device):
        for original in (True, False):
            model, alone = wrap(original), Net().to(device)
            ours, other = (
                fa.AdamW(m.parameters(), lr=0.01, policy=POLICIES["active"], backend=backend) for m in (model, alone)
            )
            train(model, ours, 7, rank, ranks)
            train(alone, other, 7)
            assert_same_whole(model, alone)

            model = wrap(original)
            for group in (None, dist.group.WORLD):
                optimizer = fa.AdamW(model.parameters(), policy=policy, backend=backend, process_group=group)
                if group is not None and not original:
                    train(model, optimizer, 7, rank, ranks)
                    continue
                with pytest.raises(RuntimeError, match=r"was split by FullyShardedDataParallel.*process_group="):
                    train(model, optimizer, 1, rank, ranks)
                assert not optimizer.state
            if not original:
                alone = Net().to(device)
                other = fa.AdamW(alone.parameters(), policy=policy, backend=backend)
                train(alone, other, 7)
                assert_same_whole(model, alone)
                gains = [s["gain"] for s in optimizer.state.values()]
                assert_ranks_agree(gains)
                assert_close(gains[0], next(iter(other.state.values()))["gain"], "gain")


def assert_same_whole(model: Any, alone: nn.Module) -> None:
    with type(model).summon_full_params(model):
        for (name, p), (_, q) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
            assert_close(p, q, name)


def check_zero_redundancy(device: torch.device) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for backend in backends(device):
        for policy in ("active", "tlr-preconditioned-tensor"):
            cls, arguments = TO_RUN[policy]
            model, alone = ddp(Net().to(device)), Net().to(device)
            ours = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, backend=backend, **arguments)
            other = cls(alone.parameters(), backend=backend, **arguments)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(ours, 0.9)
            expected = torch.optim.lr_scheduler.ExponentialLR(other, 0.9)
            for _ in range(2):
                train(model, ours, 4, dist.get_rank(), dist.get_world_size())
                train(alone, other, 4)
                scheduler.step()
                expected.step()
            for (name, p), (_, q) in zip(named(model), named(alone), strict=True):
                assert_close(p, q, name)
            assert_ranks_agree(list(model.parameters()))


CHECKS: dict[str, Callable[[torch.device], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
