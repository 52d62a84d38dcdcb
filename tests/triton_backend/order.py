"""Order of threads and programs in Triton's kernels, and torch operators in a step; test_triton.py runs this."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_adaptive as fa
from fused_adaptive.backends.triton import counts, sizes

from ..common.cases import POLICIES, Case, Gradients, is_allowed, parameters, state_of, train
from .races import Races, watched

#: More tensors under one gain than a warp has threads, several chunks, and several programs.
SHAPES = [(5,)] * 40 + [(9000,), (33_000,)]


def races_of(case: Case, dtype: torch.dtype = torch.float32, poison: bool = False) -> Races:
    params = parameters(dtype, SHAPES)
    optimizer = case.build(params, backend="triton")
    with watched() as races:
        train(optimizer, 3, gradients=Gradients(missing=0.15))
        if poison:  # nonfinite intervals are reset
            Gradients().set(params, 3)
            params[-1].grad[0] = torch.inf
            optimizer.step()
        train(optimizer, 3, start=4)
        optimizer.end_interval()
    return races


@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_have_no_races(policy):
    name = "SGD-momentum" if "displacement" in policy else "AdamW"
    assert is_allowed(name, policy)
    assert races_of(Case(name, policy, True), poison="tlr" in policy).found == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_kernels_have_no_races_in_other_dtypes(dtype):
    assert races_of(Case("SGD-momentum", "tlr-times-active", False), dtype).found == []


@pytest.mark.parametrize("left_out", range(3))
def test_a_missing_barrier_in_finish_is_noticed(left_out, monkeypatch):
    """Leaves out each of the three barriers of a step."""
    seen, barrier = [], Races.barrier

    def all_but_one(self: Races) -> None:
        here = self._kernel == "finish" and self._program == (0, 0, 0)
        if here:
            seen.append(None)
        if not here or (len(seen) - 1) % 3 != left_out:
            barrier(self)

    monkeypatch.setattr(Races, "barrier", all_but_one)
    assert races_of(Case("AdamW", "tlr-gradient-global", True)).found != []


@pytest.mark.parametrize("decoupled", [True, False])
def test_hypergradient_reads_parameters_only_with_coupled_decay(decoupled, monkeypatch):
    read: list[np.ndarray] = []
    access = Races.access

    def noted(self: Races, program: Any, addresses: np.ndarray, mask: np.ndarray, writes: bool) -> None:
        if self._kernel == "slope":
            read.append(addresses[np.broadcast_to(mask, addresses.shape)].astype(np.int64))
        access(self, program, addresses, mask, writes)

    monkeypatch.setattr(Races, "access", noted)
    params = parameters(torch.float32, SHAPES)
    with watched():
        train(Case("AdamW", "hypergradient-global", decoupled).build(params, backend="triton"), 2)
    addresses, first = np.concatenate(read), params[-1].data_ptr()
    inside = (addresses >= first) & (addresses < first + 4 * params[-1].numel())
    assert inside.any() != decoupled


@pytest.mark.parametrize(("is_cuda", "warp_size"), [(True, 32), (False, 64)])
def test_no_tensor_is_processed_by_two_threads(is_cuda, warp_size):
    """One thread would read counts that the other has already changed."""
    assert sizes.lanes_options(is_cuda, warp_size)["num_warps"] * warp_size == sizes.THREADS


def test_counters_on_the_device_are_not_read(monkeypatch):
    """They are not read at the first step either: the host would wait for each of them."""
    params = parameters(torch.float32)
    optimizer = Case("AdamW", "tlr-times-active", True).build(params, backend="triton", capturable=True)
    read: list[Any] = []
    monkeypatch.setattr(Tensor, "item", lambda self: read.append(self))
    counted = counts.HostCounts({"step": {0: torch.tensor(3.0)}, "tlr_step": {0: torch.tensor(1)}}, {})
    assert counted.rows([], 1, on_device=True).tolist() == [0] * len(counts.COUNTERS)
    assert read == []
    monkeypatch.undo()
    train(optimizer, 2)
    assert state_of(optimizer)["0.step"] == 2


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_drawing_needs_one_more_operator():
    """Kernels draw the rates, and torch only counts the step."""
    took = []
    for draws in (False, True):
        params = parameters(torch.float32)
        optimizer = fa.AdamW(params, lr=0.1, backend="triton")
        search = fa.ASLR(optimizer) if draws else None
        train(optimizer, 2)
        Gradients().set(params, 2)
        with Operators() as operators:
            optimizer.step()
        took.append([name for name in operators.names if not name.startswith(("aten.detach", "aten.select"))])
        del search
    assert len(took[1]) == len(took[0]) + 1
