"""Parameters that share memory: torch moves one after the other, and so does a step of this package."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_adaptive as fa

from ..common.cases import BACKENDS

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def trained(
    parts: Callable[[Tensor], list[Tensor]], build: Callable[[list[Parameter]], torch.optim.Optimizer]
) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    params = [Parameter(part) for part in parts(base)]
    optimizer = build(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return base


OVERLAPPING = {
    "the same tensor": lambda base: [base, base],
    "columns of another": lambda base: [base, base[:, :3]],
    "columns that overlap": lambda base: [base[:, :5], base[:, 3:]],
    "the same columns": lambda base: [base[:, :3], base[:, :3]],
    "a diagonal": lambda base: [base, base.diagonal()],
    "parts of the first alone": lambda base: [base, base[1:3, :2], base[4:5]],
}
APART = {
    "columns": lambda base: [base[:, :3], base[:, 3:5], base[:, 5:]],
    "every other row": lambda base: [base[::2], base[1::2]],
    "rows": lambda base: [base[:3], base[3:]],
}


@every_backend
@pytest.mark.parametrize("parts", OVERLAPPING.values(), ids=OVERLAPPING)
def test_parameters_that_share_memory_move_one_after_the_other(parts, backend):
    expected = trained(parts, lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False))
    ours = fa.AdamW
    if backend == "reference":
        moved = trained(parts, lambda params: ours(params, lr=0.1, backend=backend))
    else:
        with pytest.warns(UserWarning, match="parameters 0 and 1 share memory"):
            moved = trained(parts, lambda params: ours(params, lr=0.1, backend=backend))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


@every_backend
@pytest.mark.parametrize("parts", APART.values(), ids=APART)
def test_parts_of_a_matrix_without_a_common_element_need_no_reference(parts, backend):
    expected = trained(parts, lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False))
    built: list[fa.AdamW] = []

    def build(params: list[Parameter]) -> torch.optim.Optimizer:
        built.append(fa.AdamW(params, lr=0.1, backend=backend))
        return built[0]

    torch.testing.assert_close(trained(parts, build), expected, rtol=0, atol=1e-6)
    participants = built[0]._participants
    assert participants is not None
    assert not participants.uses_reference
