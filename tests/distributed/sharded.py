"""Tensors sharded in all ways in one optimizer, on random gradients: part of script.py."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import fused_adaptive as fa
from fused_adaptive.core import ranks, shards
from fused_adaptive.engine.checkpoint import specs

from ..common.breaking import broken, fails
from ..common.cases import OPTIMIZERS, POLICIES, Gradients, is_allowed

TOLERANCE = 1e-12

meshes: dict[Any, DeviceMesh] = {}


def mesh_of(device: torch.device, *names: str) -> DeviceMesh:
    """Returns a mesh of all ranks, with one dimension or two (of 2 if there are 4 ranks)."""
    if names not in meshes:
        world = dist.get_world_size()
        shape = (world,) if len(names) == 1 else (2, world // 2)
        meshes[names] = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return meshes[names]


def layouts(device: torch.device) -> list[tuple[tuple[int, ...], DeviceMesh | None, list[Placement]]]:
    """Returns shapes with their sharding: uneven, empty on most ranks, replicated, on several meshes, none."""
    line, grid = mesh_of(device, "all"), mesh_of(device, "outer", "inner")
    return [
        ((7, 3), line, [Shard(0)]),
        ((1, 5), line, [Shard(0)]),
        ((6, 5), line, [Shard(1)]),
        ((5, 4), grid, [Replicate(), Shard(0)]),
        ((5, 4), grid, [Shard(1), Replicate()]),
        ((4, 9), grid, [Shard(0), Shard(1)]),
        ((6,), grid, [Replicate(), Replicate()]),
        ((2, 3), None, []),
        ((), line, [Replicate()]),
        ((0,), line, [Shard(0)]),
        ((129,), line, [Shard(0)]),
    ]


def sharded(value: Tensor, mesh: DeviceMesh | None, placements: Sequence[Placement]) -> Tensor:
    """Shards a tensor that every rank has as a whole. ``Partial`` is undone by a sum."""
    if mesh is None:
        return value
    whole = [Replicate() if p.is_partial() else p for p in placements]
    result = distribute_tensor(value, mesh, whole, src_data_rank=None)
    if not any(p.is_partial() for p in placements):
        return result
    terms = math.prod(mesh.size(dim) for dim, p in enumerate(placements) if p.is_partial())
    share = ranks.local_part(result) / terms  # a power of two, so the division is exact
    return DTensor.from_local(share, mesh, placements, run_check=False, shape=value.shape, stride=value.stride())


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def digests(values: Sequence[Any]) -> list[str]:
    """Returns digests of numbers and of this rank's parts of tensors, equal only if all bits are."""
    found = []
    for value in values:
        tensor = whole(value.detach()) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found.append(hashlib.sha256(data).hexdigest())
    return found


def assert_ranks_agree(values: Sequence[Any]) -> None:
    own: list[str] = digests(values)
    all_of_them: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, own)
    assert all(theirs == all_of_them[0] for theirs in all_of_them), "ranks differ"


def assert_close(ours: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    ours, expected = whole(ours.detach()).double().cpu(), expected.detach().double().cpu()
    assert ours.shape == expected.shape, what
    if ours.numel() == 0:
        return
    error = (ours - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{what} is off by {error}"


class Twins:
    """An optimizer over sharded tensors, and one over the same whole tensors, which each process computes alone."""

    def __init__(self, device: torch.device, optimizer: str, policy: Any, partial: bool = False, **options: Any):
        cls, arguments = OPTIMIZERS[optimizer]
        self.layouts = layouts(device)
        generator = torch.Generator().manual_seed(3)
        values = [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s, *_ in self.layouts]
        self.alone = [v.clone().requires_grad_() for v in values]
        self.sharded = [sharded(v, *how).requires_grad_() for v, (_, *how) in zip(values, self.layouts, strict=True)]
        self.partial, self.options = partial, options
        self.optimizers = [
            cls([{"params": p[:4]}, {"params": p[4:], "lr": 0.02}], **{**arguments, **options, "policy": policy})
            for p in (self.sharded, self.alone)
        ]

    @property
    def ours(self) -> fa.AdaptiveOptimizer:
        return self.optimizers[0]

    def step(self, gradients: Gradients, step: int) -> None:
        gradients.set(self.alone, step)
        for p, alone, (_, mesh, placements) in zip(self.sharded, self.alone, self.layouts, strict=True):
            if self.partial and mesh is not None:
                placements = [Partial() if x.is_replicate() else x for x in placements]
            p.grad = None if alone.grad is None else sharded(alone.grad, mesh, placements)
        for optimizer in self.optimizers:
            optimizer.step()

    def run(self, steps: int = 7, missing: float = 0.2) -> Twins:
        gradients = Gradients(missing=missing)
        for step in range(steps):
            if step == 5:
                for optimizer in self.optimizers:
                    optimizer.end_interval()
            self.step(gradients, step)
        return self

    def compare(self) -> None:
        ours, alone = self.optimizers
        pairs = list(zip(self.sharded, self.alone, strict=True))
        assert_ranks_agree([*self.sharded, *(v for p in self.sharded for v in ours.state[p].values())])
        for i, (p, q) in enumerate(pairs):
            assert_close(p, q, f"parameter {i}")
            assert ours.state[p].keys() == alone.state[q].keys()
            expected = specs(ours.backbone, ours.param_groups[0], torch.float64)
            for name, value in ours.state[p].items():
                if isinstance(p, DTensor):
                    assert isinstance(value, DTensor) == (not expected[name].scalar), name
                assert_close(value, alone.state[q][name], f"{name} of parameter {i}")


def agrees(device: torch.device, optimizer: str, policy: Any, steps: int = 7, **options: Any) -> bool:
    Twins(device, optimizer, policy, **options).run(steps).compare()
    return True


def backends(device: torch.device) -> list[str]:
    return [name for name, why_not in fa.backends.available([device]).items() if not why_not]


def check_matrix(device: torch.device) -> None:
    """Checks every policy, each with another optimizer."""
    for backend in backends(device):
        for i, (name, policy) in enumerate(POLICIES.items()):
            optimizers = [o for o in ("SGD-momentum", "AdamW", "SGD-nesterov") if is_allowed(o, name)]
            optimizer = optimizers[i % len(optimizers)]
            try:
                agrees(device, optimizer, policy, backend=backend, partial=name.endswith("global"))
            except AssertionError as error:
                raise AssertionError(f"{backend} {optimizer} {name}: {error}") from error


def check_eta_and_infinities(device: torch.device) -> None:
    """A NaN on one rank shrinks the gain and resets the memory of the policy on all ranks."""
    for backend in backends(device):
        for policy in (fa.TrainableLR(interval=2), fa.TrainableLR(interval=2, source="gradient", eta=1e-3)):
            twins = Twins(device, "SGD", policy, backend=backend)
            for step in range(6):
                gradients = Gradients()
                if step == 2:
                    gradients = _WithNaN()
                twins.step(gradients, step)
            gains = [twins.ours.state[p]["gain"] for p in twins.sharded]
            assert_ranks_agree(gains)
            for p, q in zip(twins.sharded, twins.alone, strict=True):
                assert_close(twins.ours.state[p]["gain"], twins.optimizers[1].state[q]["gain"], "gain")


class _WithNaN(Gradients):
    def set(self, params: Sequence[Tensor], step: int) -> None:
        super().set(params, step)
        params[0].grad[0, 0] = torch.nan  # on the first rank


def check_explicit_intervals(device: torch.device) -> None:
    for backend in backends(device):
        twins = Twins(device, "AdamW", (fa.TrainableLR(interval=None), fa.ActiveLR(interval=3)), backend=backend)
        gradients = Gradients()
        for step in range(6):
            twins.step(gradients, step)
            for optimizer in twins.optimizers:
                if step in (1, 3, 4):
                    optimizer.end_interval()
                if step == 2:
                    optimizer.restart_interval()
        twins.compare()
        for ours, alone in zip(*(o.learning_rates(per_tensor=True) for o in twins.optimizers), strict=True):
            for a, b in zip(ours["tensors"], alone["tensors"], strict=True):
                assert a["numel"] == b["numel"]
                assert b["min"] * (1 - 1e-12) <= a["min"] <= a["mean"] <= a["max"] <= b["max"] * (1 + 1e-12)


def check_capturable(device: torch.device) -> None:
    """With counters on the device, sums over ranks are computed in every step and used at interval ends only."""
    names = ("tlr-gradient-global", "tlr-preconditioned-tensor", "tlr-gradient-eta", "hypergradient-global")
    for backend in backends(device):
        for name in names:
            agrees(device, "AdamW", POLICIES[name], backend=backend, capturable=True)


def check_draws(device: torch.device) -> None:
    """ASLR draws one rate per tensor: the same on all ranks, whatever part of the tensor they hold."""
    for backend in backends(device):
        twins = Twins(device, "SGD-momentum", POLICIES["tlr-displacement-global"], backend=backend)
        for optimizer in twins.optimizers:
            fa.ASLR(optimizer, seed=3)
        twins.run().compare()


def check_moved_in_memory(device: torch.device) -> None:
    """A framework may replace the local tensor of a DTensor between two steps; the next step must use it."""
    for backend in backends(device):

        def check(backend: str = backend) -> bool:
            twins = Twins(device, "AdamW", POLICIES["tlr-times-active"], backend=backend)
            for step in range(4):
                twins.step(Gradients(), step)
                for p in twins.sharded:
                    if isinstance(p, DTensor):
                        p._local_tensor = p._local_tensor.clone()
            twins.compare()
            return True

        with broken(shards.Shard, "is_current", lambda _: True):
            assert fails_somewhere(check), "a step into memory that is no longer the parameter's was not noticed"
        assert check()


def check_versions(device: torch.device) -> None:
    """DTensors have versions of their own, apart from those of their local tensors."""
    for backend in backends(device):
        twins = Twins(device, "AdamW", POLICIES["active"], backend=backend).run(3, missing=0)
        sharded = {p: s for p, s in twins.ours.state.items() if isinstance(p, DTensor)}
        written = [t for p, s in sharded.items() for t in (p, *s.values()) if isinstance(t, DTensor)]
        before = [t._version for t in written]
        twins.step(Gradients(), 3)
        assert len(written) == 6 * len(sharded)
        assert all(t._version > v for t, v in zip(written, before, strict=True))


def check_low_precision(device: torch.device) -> None:
    """Ranks agree bit for bit in bfloat16."""
    line = mesh_of(device, "all")
    for backend in backends(device):
        generator = torch.Generator().manual_seed(3)
        params = [torch.randn(s, generator=generator).to(device, torch.bfloat16) for s in ((9, 5), (3,))]
        params = [sharded(p, line, [Shard(0)]).requires_grad_() for p in params]
        optimizer = fa.AdamW(params, policy=POLICIES["tlr-times-active"], backend=backend)
        for _ in range(5):
            for p in params:
                p.grad = sharded(torch.randn(p.shape, generator=generator).to(device, torch.bfloat16), line, [Shard(0)])
            optimizer.step()
        assert_ranks_agree([*params, *(v for p in params for v in optimizer.state[p].values())])
        assert optimizer.state[params[0]]["gain"] != 1


def check_naive(device: torch.device) -> None:
    def closure_for(params: Sequence[Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            for i, p in enumerate(params):
                p.grad = p.detach() * (1.0 + i)
            return torch.zeros(())

        return closure

    twins = Twins(device, "SGD", fa.TrainableLR(naive=True, eta=1e-3), backend="reference", weight_decay=0.0)
    for _ in range(3):
        for optimizer, params in zip(twins.optimizers, (twins.sharded, twins.alone), strict=True):
            optimizer.step(closure_for(params))
    twins.compare()
    assert twins.ours.state[twins.sharded[0]]["gain"] != 1


def check_process_group(device: torch.device) -> None:
    """Flat shards without DTensor, some of them empty: rates are those of the whole tensor."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for backend in backends(device):
        for policy in (POLICIES["tlr-gradient-global"], POLICIES["hypergradient-tensor"]):
            generator = torch.Generator().manual_seed(5)
            values = [torch.randn(n, generator=generator, dtype=torch.float64).to(device) for n in (11, 3, 64)]

            def part(value: Tensor) -> Tensor:
                size = -(-value.numel() // world)
                return value[rank * size : (rank + 1) * size].clone()

            alone = [v.clone().requires_grad_() for v in values]
            parts = [part(v).requires_grad_() for v in values]
            ours = fa.AdamW(parts, policy=policy, backend=backend, process_group=dist.group.WORLD)
            expected = fa.AdamW(alone, policy=policy, backend=backend)
            for step in range(5):
                Gradients().set(alone, step)
                for p, q in zip(parts, alone, strict=True):
                    p.grad = part(q.grad)
                ours.step()
                expected.step()
            assert_ranks_agree([ours.state[p]["gain"] for p in parts])
            for p, q in zip(parts, alone, strict=True):
                assert_close(p, part(q), "a part")
                assert_close(ours.state[p]["gain"], expected.state[q]["gain"], "gain")
                assert expected.state[q]["gain"] != 1
            with pytest.raises(TypeError, match="process_group= cannot be copied"):
                copy.deepcopy(ours)


def check_bad_gradients(device: torch.device) -> None:
    """Bad gradients are refused on all ranks, at the first step and later, and nothing changes."""
    line, grid = mesh_of(device, "all"), mesh_of(device, "outer", "inner")
    value = torch.ones(4, 2, device=device)
    for backend in backends(device):
        for bad in (torch.ones(4, 2, device=device), sharded(value, grid, [Shard(0), Replicate()])):
            for good_steps in (0, 2):
                p = sharded(value, line, [Shard(0)]).requires_grad_()
                optimizer = fa.AdamW([p], policy=fa.TrainableLR(interval=1), backend=backend)
                for _ in range(good_steps):
                    p.grad = sharded(value, line, [Shard(0)])
                    optimizer.step()
                before = digests([p, *optimizer.state[p].values()])
                # A plain Parameter refuses such an assignment; autograd hooks and frameworks can still do it.
                refused = pytest.raises(RuntimeError, match=r"parameter 0 of shape \(4, 2\)")
                with torch.no_grad(), broken(type(p), "grad", bad), refused:
                    optimizer.step()
                assert digests([p, *optimizer.state[p].values()]) == before


# ---- broken variants: the same checks must notice them ----


def _counts_replicas(param: Tensor, process_group: Any) -> ranks.Ranks | None:
    if not isinstance(param, DTensor):
        return None
    mesh = param.device_mesh
    return ranks.Ranks(tuple(mesh.get_group(i) for i in range(mesh.ndim)))


def _keeps_partial(part: shards.Shard) -> bool:
    grad: Any = part.param.grad
    part.view.param.grad = None if grad is None else ranks.local_part(grad)
    return True


def check_broken_variants_fail(device: torch.device) -> None:
    variants = {
        "products of replicated tensors counted twice": (shards, "ranks_of", _counts_replicas),
        "no all-reduce": (ranks.Ranks, "add_up_", lambda *_: None),
        "a Partial gradient taken as it is": (shards.Shard, "localize_gradient", _keeps_partial),
    }
    for backend in backends(device):
        for what, (target, name, replacement) in variants.items():
            for policy in ("tlr-gradient-global", "hypergradient-tensor")[: 2 if dist.get_world_size() == 2 else 1]:

                def check(policy: str = policy, backend: str = backend) -> bool:
                    return agrees(device, "AdamW", POLICIES[policy], backend=backend, partial=True)

                with broken(target, name, replacement):
                    assert fails_somewhere(check), f"{what}, {backend}, {policy}: not noticed"
                assert check()


def fails_somewhere(check: Callable[[], bool]) -> bool:
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, fails(check))
    return any(seen)


CHECKS: dict[str, Callable[[torch.device], None]] = {
    name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")
}
