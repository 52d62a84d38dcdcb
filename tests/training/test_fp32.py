"""Float32 weights: dtypes without a float32 form, refused imports, and optimizers of other packages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fused_adaptive as fa


class Kinds(nn.Module):
    """A weight of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Parameter(torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128))
        self.codes = nn.Parameter(torch.tensor([2**40 + 1, -5]), requires_grad=False)
        self.short = nn.Parameter(torch.tensor([1.5, 2.5], dtype=torch.bfloat16))


def parts() -> tuple[Kinds, fa.SGD]:
    model = Kinds()
    return model, fa.SGD([model.short], lr=0.1, master="split")


def test_complex_and_integer_parameters_are_copied_in_their_own_dtypes():
    model, optimizer = parts()
    exported = fa.export_fp32(model, optimizer)
    assert {name: w.dtype for name, w in exported.items()} == {
        "wave": torch.complex128,
        "codes": torch.int64,
        "short": torch.float32,
    }
    assert torch.equal(exported["wave"], model.wave)
    assert torch.equal(exported["codes"], model.codes)
    other, its_optimizer = parts()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    fa.import_fp32(other, its_optimizer, exported)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    exported["wave"].zero_()
    assert model.wave[0] == 1 + 2j, "it is a copy"


REFUSED: list[tuple[str, Any, type[Exception], str]] = [
    ("wave", torch.zeros(2), ValueError, r"wave is real in weights \(torch\.float32\) and complex in the model"),
    (
        "short",
        torch.zeros(2) * 1j,
        ValueError,
        r"short is complex in weights \(torch\.complex64\) and real in the model",
    ),
    ("codes", torch.zeros(2), ValueError, r"codes is real in weights .* and integer in the model"),
    ("short", torch.zeros(2).numpy(), TypeError, r"short is a ndarray in weights: .*torch\.from_numpy"),
    ("short", [0.0, 0.0], TypeError, "short is a list in weights"),
    ("short", torch.zeros(2, device="meta"), ValueError, "short is on the meta device"),
    ("short", torch.zeros(2).to_sparse(), ValueError, r"short is torch\.sparse_coo in weights: pass its to_dense\(\)"),
]


@pytest.mark.parametrize(("name", "weight", "error", "message"), REFUSED)
def test_weights_that_cannot_be_copied_change_nothing(name, weight, error, message):
    model, optimizer = parts()
    before = copy.deepcopy(list(model.parameters()))
    weights = {key: torch.zeros_like(w) for key, w in fa.export_fp32(model, optimizer).items()}
    with pytest.raises(error, match=message):
        fa.import_fp32(model, optimizer, weights | {name: weight})
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_an_optimizer_of_another_package_has_no_masters():
    model = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    exported = fa.export_fp32(model, optimizer)
    assert all(torch.equal(exported[name], p.float()) for name, p in model.named_parameters())
    fa.import_fp32(model, optimizer, {name: w + 1 for name, w in exported.items()})
    assert all(torch.equal((exported[name] + 1).bfloat16(), p) for name, p in model.named_parameters())
    assert not optimizer.state


def test_what_is_no_optimizer_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got NoneType"):
        fa.export_fp32(model, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Linear"):
        fa.import_fp32(model, model, {})  # pyright: ignore[reportArgumentType]
