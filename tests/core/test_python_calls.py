"""Calls with Python objects instead of an operator: the results are those of the operator, or of Python."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.backends import native
from fused_adaptive.core import python_calls
from fused_adaptive.engine import fingerprint
from fused_adaptive.engine.fingerprint import Fingerprint

from ..common.breaking import broken, fails
from ..common.cases import all_equal, parameters

if reason := native.why_not([torch.device("cpu")]):
    pytest.skip(reason, allow_module_level=True)

SHAPES = [(6, 5), (4, 3, 2, 2), (7,), (), (0, 3), (1, 8), (300,)]


class Tagged(Tensor):
    """A subclass without behavior of its own."""


def _noise(param: Tensor) -> Tensor:
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()), dtype=param.dtype)


def _strided(param: Tensor) -> Tensor:
    return torch.stack([_noise(param)] * 2, dim=-1)[..., 0]


def _transposed(param: Tensor) -> Tensor:
    return _noise(param).mT.contiguous().mT if param.dim() > 1 else _noise(param)


def _other_dtype(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def make(param: Tensor) -> Tensor:
        param.grad_dtype = None
        return _noise(param).to(dtype)

    return make


def _odd_stride(param: Tensor) -> Tensor:
    """Changes strides of dimensions with one element, which have no meaning."""
    grad = _noise(param)
    return grad.as_strided(
        grad.shape, [99 if size == 1 else s for size, s in zip(grad.shape, grad.stride(), strict=True)]
    )


def _not_dense(param: Tensor) -> Tensor:
    return _noise(param).expand_as(param) if param.dim() == 0 else _noise(param)[:1].expand_as(param)


#: Gradients by kind: those that a step accepts, directly or as a copy, and those that it refuses.
TAKEN: dict[str, Callable[[Tensor], Tensor | None]] = {
    "contiguous": _noise,
    "strided": _strided,
    "transposed": _transposed,
    "odd stride": _odd_stride,
    "not dense": _not_dense,
    "float64": _other_dtype(torch.float64),
    "bfloat16": _other_dtype(torch.bfloat16),
    "float16": _other_dtype(torch.float16),
    "offset": lambda p: torch.cat([torch.zeros(1), _noise(p).flatten()])[1:].view(p.shape),
    "subclass": lambda p: _noise(p).as_subclass(Tagged),
    "negative view": lambda p: torch.complex(_noise(p), -_noise(p)).conj().imag,
    "zero tensor": lambda p: torch.ops.aten._efficientzerotensor(p.shape),
    "absent": lambda p: None if p.numel() % 2 else _noise(p),
    "requires_grad": lambda p: _noise(p).requires_grad_(),
}
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (lambda p: _noise(p).to_sparse(), "sparse"),
    "itself": (lambda p: p.detach() if p.numel() == 300 else _noise(p), "clone it"),
}
#: Changes of a gradient that is already assigned, for which an assignment would now raise an error.
REFUSED_LATER: dict[str, Callable[[Tensor], Tensor]] = {
    "another shape": lambda grad: grad.new_zeros(grad.numel() + 1),
    "no number of its own": lambda grad: grad.to(torch.int32),
}


def by_operator() -> Any:
    return broken(python_calls, "gradients_reader", lambda: None)


def steps(
    kind: Callable[[Tensor], Tensor | None], backend: str = "native", shapes: Sequence[tuple[int, ...]] = SHAPES
) -> tuple[fa.AdamW, list[Tensor]]:
    params = parameters(torch.float32, shapes)
    optimizer = fa.AdamW(params, lr=0.01, weight_decay=0.1, backend=backend)
    for of_step in (_noise, kind, kind):
        for p in params:
            p.grad = None
            p.grad = of_step(p)
        optimizer.step()
    return optimizer, params


@pytest.mark.parametrize("name", TAKEN)
def test_gradients_are_accepted_as_by_the_operator(name):
    _, params = steps(TAKEN[name])
    with by_operator():
        _, expected = steps(TAKEN[name])
    assert all_equal(params, expected)
    _, expected = steps(TAKEN[name], "reference")
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-6) for p, q in zip(params, expected, strict=True))


def test_a_negative_view_of_one_element_is_not_read_as_plain_memory():
    """Strides do not show the negation. No other gradient of the step needs a copy, which would resolve it."""

    def is_read_right() -> bool:
        made = [_noise, TAKEN["negative view"]]
        return all_equal(*(steps(kind, shapes=[(), (1, 1)])[1] for kind in made))

    assert is_read_right()
    with broken(Tensor, "is_neg", lambda self: False):
        assert fails(is_read_right)


def is_refused(make: Callable[[list[Tensor]], None], words: str) -> bool:
    """Returns whether a step raises an error with these words, and changes nothing, not even versions."""
    params = parameters(torch.float32, SHAPES)
    optimizer = fa.AdamW(params, lr=0.01, backend="native")
    for p in params:
        p.grad = _noise(p)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())
    make(params)
    versions = [p._version for p in params]
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()
    assert [p._version for p in params] == versions
    after = optimizer.state_dict()
    pairs = [(state["state"][i][key], after["state"][i][key]) for i in state["state"] for key in state["state"][i]]
    return all_equal(params, before) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("route", ["call", "operator"])
@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_LATER])
def test_gradients_are_refused_as_by_the_operator(name, route):
    def make(params: list[Tensor]) -> None:
        for p in params:
            if name in REFUSED:
                p.grad = REFUSED[name][0](p)
            elif p.numel() == 300:
                assert p.grad is not None
                p.grad_dtype = None
                p.grad.data = REFUSED_LATER[name](p.grad)

    words = REFUSED[name][1] if name in REFUSED else "gradient"
    if route == "call":
        assert is_refused(make, words)
    else:
        with by_operator():
            assert is_refused(make, words)


def test_gradients_are_read_by_the_python_call():
    """Otherwise the tests above would compare the operator with itself."""
    reader, outcomes = python_calls.gradients_reader(), []
    assert reader is not None

    def read(plan: int, held: list[Tensor], grads: list[Tensor]) -> int:
        outcomes.append(reader(plan, held, grads))
        return outcomes[-1]

    with broken(python_calls, "gradients_reader", lambda: read):
        steps(_noise)
    assert outcomes == [0] * 3


def test_an_exception_in_a_property_is_raised():
    class Refusing(torch.nn.Parameter):
        refuses = False

        def __getattribute__(self, name: str) -> Any:
            if name == "grad" and Refusing.refuses:
                raise ValueError("not today")
            return super().__getattribute__(name)

    param = Refusing(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fa.AdamW([param], backend="native")
    optimizer.step()
    assert optimizer._participants is not None
    plan: Any = optimizer._participants.plans[0]
    Refusing.refuses = True
    with pytest.raises(ValueError, match="not today"):
        plan.take_gradients()


def test_gradients_are_alive_only_during_the_step():
    params = parameters(torch.float32, SHAPES)
    optimizer = fa.AdamW(params, backend="native")
    for p in params:
        p.grad = _noise(p)
    optimizer.step()
    references = [sys.getrefcount(p.grad) for p in params]
    optimizer.step()
    assert [sys.getrefcount(p.grad) for p in params] == references
    assert optimizer._participants is not None
    plan: Any = optimizer._participants.plans[0]
    assert plan.take_gradients() == 0
    weak = [weakref.ref(p.grad) for p in params]
    optimizer.zero_grad()
    assert all(grad() is not None for grad in weak)
    plan.step(None, None, None)
    assert all(grad() is None for grad in weak)


@pytest.mark.parametrize("table", [None, "of another version"])
def test_a_torch_without_the_table_can_step(table, monkeypatch):
    import ctypes

    kept = (ctypes.c_uint32 * 64)(2)
    prototype = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    new_capsule = prototype(("PyCapsule_New", ctypes.pythonapi))
    capsule = new_capsule(ctypes.addressof(kept), b"dlpack_exchange_api", None) if table else None
    _, expected = steps(_noise)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "__dlpack_c_exchange_api__", capsule, raising=False)
        python_calls.gradients_reader.cache_clear()
        assert python_calls.gradients_reader() is None
        _, params = steps(_noise)
    python_calls.gradients_reader.cache_clear()
    assert all_equal(params, expected)


# ---- comparing objects ----

A, B, C, PARAM, OTHER = (torch.zeros(2) for _ in range(5))


def base(before: int = 0, after: int = 0) -> dict[Any, Any]:
    others = {i: {"step": A, "exp_avg": B} for i in range(before + after)}
    first, last = list(others.items())[:before], list(others.items())[before:]
    own = {PARAM: {"exp_avg": A, "exp_avg_sq": B}, OTHER: {"exp_avg": C}, "mine": 3, "list": [1]}
    return {**dict(first), **own, **dict(last)}


def _moved_across(states: dict[Any, Any]) -> None:
    states[OTHER] = {"exp_avg_sq": states[PARAM].pop("exp_avg_sq"), **states[OTHER]}


def _under_another_key(states: dict[Any, Any]) -> None:
    states[PARAM]["exp_avg_sq_"] = states[PARAM].pop("exp_avg_sq")


CHANGED: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "an equal tensor": lambda s: s[PARAM].update(exp_avg=A.clone()),
    "swapped": lambda s: s[PARAM].update(exp_avg=B, exp_avg_sq=A),
    "moved across": _moved_across,
    "under another key": _under_another_key,
    "one less": lambda s: s[PARAM].popitem(),
    "one more": lambda s: s[PARAM].update(step=C),
    "one more at the end": lambda s: s.update(more={}),
    "the last is gone": lambda s: s.popitem(),
    "an equal dict": lambda s: s.update({PARAM: dict(s[PARAM])}),
    "cleared": lambda s: s.clear(),
    "another number": lambda s: s.update(mine=4),
    "another parameter": lambda s: s.update({B: s.pop(OTHER)}),
}


def notices(change: Callable[[dict[Any, Any]], Any], before: int = 0, after: int = 0) -> bool:
    states = base(before, after)
    seen = Fingerprint(fa.AdamW.backbone, [], states)
    assert seen.matches([], states)
    change(states)
    return not seen.matches([], states)


@pytest.mark.parametrize("by", ["call", "Python"])
@pytest.mark.parametrize("name", CHANGED)
def test_changed_objects_are_noticed(name, by):
    if by == "call":
        assert notices(CHANGED[name])
    else:
        with broken(python_calls, "same_objects", lambda: None):
            assert notices(CHANGED[name])


@pytest.mark.parametrize("entries", [1, 2, 1000])
def test_an_added_or_removed_entry_is_noticed_at_any_size(entries):
    states = {i: {"step": A} for i in range(entries)}
    seen = Fingerprint(fa.AdamW.backbone, [], states)
    assert seen.matches([], states)
    key, last = states.popitem()
    assert not seen.matches([], states)
    states[key] = last
    assert seen.matches([], states)
    states[-1] = last
    assert not seen.matches([], states)


def test_a_comparison_of_values_alone_fails():
    values = lambda states: [v for values in states.values() if isinstance(values, dict) for v in values.values()]  # noqa: E731

    def same(states: dict[Any, Any], objects: list[Any]) -> bool:
        return len(values(states)) == len(objects) and all(map(lambda a, b: a is b, values(states), objects))

    with broken(python_calls, "objects_of", values), broken(python_calls, "same_objects", lambda: same):
        assert fails(lambda: all(notices(change) for change in CHANGED.values()))


def test_python_compares_without_the_library(monkeypatch):
    monkeypatch.setattr(python_calls.library, "why_not", lambda: "left out")
    python_calls.same_objects.cache_clear()
    assert python_calls.same_objects() is None
    assert notices(CHANGED["an equal tensor"])
    monkeypatch.undo()
    python_calls.same_objects.cache_clear()
    assert isinstance(fingerprint._seen({}), fingerprint._Objects)


@pytest.mark.parametrize("by", ["call", "Python"])
def test_lists_of_parameters_are_compared_by_identity(by, monkeypatch):
    if by == "Python":
        monkeypatch.setattr(python_calls, "same_items", lambda: None)
    seen = [A, B, C]
    assert fingerprint._same_items([A, B, C], seen)
    assert fingerprint._same_items((A, B, C), seen)
    for other in ([A, B], [A, B, C, PARAM], [A, B, C.clone()], [B, A, C], [], [A.clone(), B, C]):
        assert not fingerprint._same_items(other, seen)
    assert fingerprint._same_items([], [])
