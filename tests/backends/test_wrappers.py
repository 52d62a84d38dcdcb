"""Parameters that wrap other tensors, such as torchao's float8 weights: kernels have no address for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fused_adaptive as fa

from ..common.cases import BACKENDS, Gradients, parameters, state_of


class Wrapper(Tensor):
    """A tensor whose values are those of ``wrapped``."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)  # type: ignore[attr-defined]
        wrapper.wrapped = inner
        return wrapper

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["wrapped"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [unwrap(item) for item in value]
            return value.wrapped if isinstance(value, Wrapper) else value

        found = function(*unwrap(args), **{name: unwrap(value) for name, value in (kwargs or {}).items()})
        return cls(found) if function is torch.ops.aten.detach.default else found


POLICIES = {
    "fixed": None,
    "active": fa.ActiveLR(interval=2, high=0.1),
    "trainable": fa.TrainableLR(interval=2),
    "hypergradient": fa.Hypergradient(1e-4),
}


def run(backend: str, policy: Any, wraps: int) -> list[Tensor]:
    inner = [p.detach() for p in parameters(torch.float32)]
    params = [Parameter(Wrapper(t) if i < wraps else t) for i, t in enumerate(inner)]
    optimizer = fa.AdamW(params, lr=0.01, weight_decay=0.1, policy=policy, backend=backend)
    for step in range(5):
        Gradients().set(params, step)
        optimizer.step()
    optimizer.end_interval()
    return [*inner, *state_of(optimizer).values()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("wraps", [1, 6])
def test_wrappers_are_stepped_by_the_reference(wraps, policy, backend):
    expected = run("reference", policy, 0)
    if backend == "reference":
        assert all(map(torch.equal, run(backend, policy, wraps), expected))
        return
    with pytest.warns(UserWarning, match="parameter 0 is a Wrapper, which wraps other tensors: .* is slower"):
        assert all(map(torch.equal, run(backend, policy, wraps), expected))
