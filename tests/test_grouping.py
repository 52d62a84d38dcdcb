"""Param groups with and without decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_adaptive as fa

from .breaking import fails


class RMSNormOfSomeone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


RMSNormOfSomeone.__name__ = "LlamaRMSNorm"


class Language(nn.Module):
    """A tied output layer, frozen parts, norms of torch's and of others, biases of several names."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm, self.own_norm, self.batch_norm = nn.LayerNorm(4), RMSNormOfSomeone(), nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.tokens.weight


MATRICES = {"attention.in_proj_weight", "attention.out_proj.weight"}
BIASES = {"attention.in_proj_bias", "attention.out_proj.bias", "norm.bias", "batch_norm.bias", "head.bias"}
NORMS = {"norm.weight", "norm.bias", "own_norm.scale", "batch_norm.weight", "batch_norm.bias"}
EMBEDDINGS = {"tokens.weight"}
EVERYTHING = MATRICES | BIASES | NORMS | EMBEDDINGS


def names_without_decay(groups) -> set[str]:
    return {name for group in groups if group["weight_decay"] == 0 for name, _ in group["params"]}


@pytest.mark.parametrize(
    ("no_decay", "expected"),
    [
        ((), set()),
        ("bias", BIASES),
        (("norm",), NORMS),
        (["embedding"], EMBEDDINGS),
        (("bias", "norm", "embedding"), EVERYTHING - MATRICES),
    ],
)
def test_what_does_not_decay_is_what_was_chosen(no_decay, expected):
    groups = fa.param_groups(Language(), 0.1, no_decay)
    assert names_without_decay(groups) == expected
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(EVERYTHING)  # the shared one once, the frozen ones not at all
    assert {group["weight_decay"] for group in groups} <= {0.1, 0.0}


def test_by_default_embeddings_decay():
    assert names_without_decay(fa.param_groups(Language(), 0.1)) == BIASES | NORMS


def test_dimensions_instead_of_kinds_would_be_seen():
    def by_dimension(model):
        return {name for name, p in model.named_parameters() if p.requires_grad and p.ndim < 2}

    assert fails(lambda: by_dimension(Language()) == EVERYTHING - MATRICES)


@pytest.mark.parametrize("cls", [fa.ActiveAdamW, torch.optim.AdamW])
def test_they_are_groups_for_any_optimizer_and_names_go_on_disk(cls):
    arguments = {"interval": 2} if cls is fa.ActiveAdamW else {}
    optimizer = cls(fa.param_groups(Language(), 0.1), lr=0.01, weight_decay=0.5, **arguments)
    groups = optimizer.state_dict()["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["param_names"] == ["tokens.weight", "attention.in_proj_weight", "attention.out_proj.weight"]


def test_decay_reaches_only_those_that_decay():
    model = Language()
    optimizer = fa.AdamW(fa.param_groups(model, 0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in MATRICES | EMBEDDINGS if bool(before[name].any())}


def test_refused():
    with pytest.raises(ValueError, match=r"unknown kind 'biases' in no_decay; choose from bias, norm, embedding"):
        fa.param_groups(Language(), 0.1, ("biases",))
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        fa.param_groups(Language(), -0.1)
    with pytest.raises(ValueError, match="Linear has no trainable"):
        fa.param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    assert len(fa.param_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
