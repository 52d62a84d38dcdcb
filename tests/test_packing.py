"""Small tensors of state lie side by side, and nobody can tell but by asking for their storage."""

from __future__ import annotations

import collections
import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_adaptive as fa
from fused_adaptive import packing
from fused_adaptive.packing import ALIGNMENT, BLOCK, SMALL, pack

from .cases import BACKENDS, CASES, all_equal, parameters, train

LARGE = SMALL // 4 + 1
SHAPES = [(7,), (3, 5), (), (2, 3), (0,), (129,), (SMALL // 4,), (LARGE,), (2, 3, 4, 5)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def small_state(optimizer) -> list[torch.Tensor]:
    return [t for s in optimizer.state.values() for t in s.values() if 0 < t.nbytes <= SMALL]


def adamw(shapes=SHAPES, **arguments) -> fa.AdamW:
    return fa.AdamW(parameters(torch.float32, shapes), lr=0.01, weight_decay=0.1, **arguments)


tensors = st.tuples(
    st.sampled_from([(), (1,), (3,), (16,), (17, 2), (2, 3, 4, 2), (0,), (LARGE,)]),
    st.sampled_from([torch.float32, torch.float64, torch.int8, torch.int64]),
    st.sampled_from(["plain", "transposed", "channels_last"]),
)


def make(shape, dtype, layout) -> torch.Tensor:
    made = torch.testing.make_tensor(shape, dtype=dtype, device="cpu")
    if layout == "transposed":
        return made.permute(tuple(range(made.dim()))[::-1]).clone(memory_format=torch.preserve_format)
    if layout == "channels_last" and made.dim() == 4:
        return made.to(memory_format=torch.channels_last)
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(tensors, max_size=2 * BLOCK + 5))
def test_packed_tensors_are_what_they_were(kinds):
    made = [make(*kind) for kind in kinds]
    for i, tensor in enumerate(made):
        for _ in range(i % 3):
            tensor.add_(0)
    before = [(t, t.clone(), t.stride(), t._version, t.is_leaf, t._is_view()) for t in made]
    pack(made)
    assert all(a is b[0] for a, b in zip(made, before, strict=True))
    for t, values, strides, version, *flags in before:
        assert torch.equal(t, values)
        assert [t.stride(), t._version, t.is_leaf, t._is_view()] == [strides, version, *flags]
        assert t.numel() <= 1 or t.data_ptr() % ALIGNMENT == 0
    # No two share an element.
    for t in made:
        t.fill_(1)
        assert all(o is t or torch.equal(o, values) for o, values, *_ in before)
        t.copy_(next(values for o, values, *_ in before if o is t))
    assert max(collections.Counter(map(storage, made)).values(), default=0) <= BLOCK


def test_small_tensors_share_storages_and_large_ones_do_not():
    many = [torch.ones(5) for _ in range(BLOCK + 2)] + [torch.ones(()) for _ in range(3)] + [torch.ones(LARGE)]
    pack(many)
    assert len(set(map(storage, many))) == 2 + 1 + 1
    assert many[0].untyped_storage().nbytes() == BLOCK * ALIGNMENT
    assert many[-1].untyped_storage().nbytes() == many[-1].nbytes
    assert many[1].data_ptr() - many[0].data_ptr() == ALIGNMENT
    steps = many[BLOCK + 2 : -1]
    assert [t.data_ptr() - steps[0].data_ptr() for t in steps] == [0, 4, 8]


def test_what_is_not_of_ones_own_stays_where_it_is():
    with torch.inference_mode():
        inferred = [torch.ones(3), torch.ones(3)]
    views = [torch.ones(4)[:3], torch.ones(4)[1:]]
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    alone = torch.ones(3)
    for kept in (inferred, views, params, [alone], [torch.ones(3, device="meta")] * 2, [torch.ones(0)] * 2):
        before = list(map(storage, kept))
        pack(kept)
        assert list(map(storage, kept)) == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_are_the_same_to_the_bit(case, backend, monkeypatch):
    found = []
    for small in (SMALL, 0):
        monkeypatch.setattr(packing, "SMALL", small)
        optimizer = case.build(parameters(torch.float32, SHAPES), backend=backend)
        train(optimizer, 5)
        state = [t for s in optimizer.state.values() for t in s.values()]
        if small and backend != "reference" and small_state(optimizer):
            assert len(set(map(storage, small_state(optimizer)))) < len(small_state(optimizer))
        elif not small:
            assert len({storage(t) for t in state}) == len(state)
        found.append([*optimizer.state, *state])
    assert all_equal(*found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_and_loaded_it_goes_on(backend):
    optimizer, other = adamw(backend=backend), adamw(backend=backend)
    train(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for p, q in zip(other.state, optimizer.state, strict=True):
            p.copy_(q)
    assert len(set(map(storage, small_state(other)))) == len(set(map(storage, small_state(optimizer))))
    for o in (optimizer, other):
        train(o, 3, start=3)
    assert all_equal(list(optimizer.state), list(other.state))


def test_loaded_tensors_are_packed_only_where_they_had_to_be_converted():
    optimizer = adamw()
    train(optimizer, 2)
    # As copies one by one, which have storages of their own.
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.update({name: value.clone() for name, value in state.items()})
    optimizer.load_state_dict(saved)
    for p, state in zip(optimizer.state.values(), saved["state"].values(), strict=True):
        assert all(p[name].data_ptr() == value.data_ptr() for name, value in state.items())
    assert len(set(map(storage, small_state(optimizer)))) == len(small_state(optimizer))
    for state in saved["state"].values():
        state.update({name: value.double() for name, value in state.items()})
    optimizer.load_state_dict(saved)
    elements = [t for t in small_state(optimizer) if t.dim()]
    assert len(set(map(storage, elements))) == 1


def test_one_alone_is_saved_with_few_others():
    optimizer = adamw([(16,)] * 200)
    train(optimizer, 1)
    whole, alone = io.BytesIO(), io.BytesIO()
    torch.save(optimizer.state_dict(), whole)
    torch.save(next(iter(optimizer.state.values()))["exp_avg"], alone)
    assert len(alone.getvalue()) < BLOCK * 64 + 4096 < len(whole.getvalue())
