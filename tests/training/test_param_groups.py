"""Param groups with and without decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_adaptive as fa

from ..common.breaking import fails


class RMSNormOfSomeone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


RMSNormOfSomeone.__name__ = "LlamaRMSNorm"


class Language(nn.Module):
    """A tied output layer, frozen parts, norms of torch and of others, biases with several names."""

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
def test_chosen_parameters_do_not_decay(no_decay, expected):
    groups = fa.param_groups(Language(), 0.1, no_decay)
    assert names_without_decay(groups) == expected
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(EVERYTHING)  # shared parameters once, frozen ones not at all
    assert {group["weight_decay"] for group in groups} <= {0.1, 0.0}


def decaying(module: nn.Module, no_decay="bias") -> set[str]:
    return {name for g in fa.param_groups(module, 0.1, no_decay) if g["weight_decay"] for name, _ in g["params"]}


def parametrized(module: nn.Module, name: str, norm: bool = False) -> nn.Module:
    if norm:
        parametrizations.weight_norm(module, name)
    else:
        parametrize.register_parametrization(module, name, nn.Identity())
    return module


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.ones(2, 2), torch.ones(2, 2)])
        self.biases = nn.ParameterList([torch.ones(2), torch.ones(2)])
        self.qkv_bias = nn.ParameterDict({"q": torch.ones(2)})
        self.bias1 = nn.Parameter(torch.ones(2))
        self.unbiased = nn.Parameter(torch.ones(2))


BIASED = {
    "RNN": nn.RNN(3, 4),
    "LSTM": nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "GRU": nn.GRU(3, 4),
    "RNNCell": nn.RNNCell(3, 4),
    "LSTMCell": nn.LSTMCell(3, 4),
    "GRUCell": nn.GRUCell(3, 4),
    "MultiheadAttention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "Bilinear": nn.Bilinear(2, 3, 4),
    "parametrized": parametrized(nn.Linear(3, 4), "bias"),
    "parametrized LSTM": parametrized(nn.LSTM(3, 4), "bias_hh_l0"),
    "weight_norm of a bias": parametrized(nn.Linear(3, 4), "bias", norm=True),
    "spectral_norm": parametrizations.spectral_norm(nn.Linear(3, 4)),
    "pruned": prune.random_unstructured(nn.Linear(3, 4), "bias", 0.5),
    "pruned GRU": prune.random_unstructured(nn.GRU(3, 4), "bias_ih_l0", 0.5),
    "lists": Lists(),
}


@pytest.mark.parametrize("kind", BIASED)
def test_biases_with_any_name_do_not_decay(kind):
    module = BIASED[kind]
    biases = {name for name, _ in module.named_parameters() if "bias" in name.replace("unbiased", "")}
    assert biases
    assert decaying(module) == {name for name, _ in module.named_parameters()} - biases


NORMALIZATIONS = [
    nn.BatchNorm2d(4),
    nn.SyncBatchNorm(4),
    nn.InstanceNorm1d(4, affine=True),
    nn.GroupNorm(2, 4),
    nn.LayerNorm([4, 4]),
    nn.RMSNorm([4, 4]),
    nn.LazyBatchNorm1d(),
]


@pytest.mark.parametrize("norm", NORMALIZATIONS, ids=lambda norm: type(norm).__name__)
def test_subclasses_of_torchs_normalizations_with_any_name_do_not_decay(norm):
    norm.__class__ = type("Whitening", (type(norm),), {})
    assert decaying(norm, "norm") == set()
    assert decaying(norm, ()) != set()


NAMES = "T5LayerNorm LayerNorm2d BatchNormAct2d FusedLayerNorm RMSNormGated LayerNormFp32 RMSnorm LayerNormalization"
NO_NAMES = "LayerNormLinear WeightNormConv1d NormalizedLinear SpectralNorm Enormous"


@pytest.mark.parametrize("name", NAMES.split())
def test_normalizations_of_other_packages_are_recognized_by_name(name):
    norm = type(name, (nn.Module,), {})()
    norm.scale = nn.Parameter(torch.ones(4))
    assert decaying(norm, "norm") == set()
    subclass = type("Mine", (type(norm),), {})()
    subclass.gamma = nn.Parameter(torch.ones(1, 4, 1, 1))
    assert decaying(subclass, "norm") == set()


@pytest.mark.parametrize(
    "name", ["LayerNormLinear", "WeightNormConv1d", "NormalizedLinear", "SpectralNorm", "Enormous"]
)
def test_matrices_of_layers_with_norm_in_their_names_decay(name):
    layer = type(name, (nn.Module,), {})()
    layer.weight = nn.Parameter(torch.ones(4, 4))
    assert decaying(layer, "norm") == {"weight"}


def test_a_parametrized_embedding_is_an_embedding():
    assert decaying(parametrized(nn.Embedding(3, 2), "weight"), "embedding") == set()


def test_by_default_embeddings_decay():
    assert names_without_decay(fa.param_groups(Language(), 0.1)) == BIASES | NORMS


def test_selection_by_dimension_is_noticed():
    def by_dimension(model):
        return {name for name, p in model.named_parameters() if p.requires_grad and p.ndim < 2}

    assert fails(lambda: by_dimension(Language()) == EVERYTHING - MATRICES)


@pytest.mark.parametrize("cls", [fa.ActiveAdamW, torch.optim.AdamW])
def test_groups_work_with_any_optimizer_and_names_are_saved(cls):
    arguments = {"interval": 2} if cls is fa.ActiveAdamW else {}
    optimizer = cls(fa.param_groups(Language(), 0.1), lr=0.01, weight_decay=0.5, **arguments)
    groups = optimizer.state_dict()["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["param_names"] == ["tokens.weight", "attention.in_proj_weight", "attention.out_proj.weight"]


def test_only_parameters_with_decay_decay():
    model = Language()
    optimizer = fa.AdamW(fa.param_groups(model, 0.5), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in MATRICES | EMBEDDINGS if bool(before[name].any())}


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"unknown kind 'biases' in no_decay; choose from bias, norm, embedding"):
        fa.param_groups(Language(), 0.1, ("biases",))
    with pytest.raises(ValueError, match="weight_decay must be finite"):
        fa.param_groups(Language(), -0.1)
    with pytest.raises(ValueError, match="Linear has no trainable"):
        fa.param_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)
    assert len(fa.param_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


class Traceable(nn.Module):
    """The kinds of layers that torch.jit, torch.fx and torch.export all accept."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.batch_norm = nn.Embedding(10, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 2)
        self.position = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.linear(self.batch_norm(self.norm(self.tokens(x) + self.position)))


INDICES = torch.tensor([1, 2])


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and tracing warns of BatchNorm's checks
@pytest.mark.parametrize(
    "convert",
    [torch.jit.script, lambda model: torch.jit.trace(model, INDICES), torch.fx.symbolic_trace],
    ids=["script", "trace", "fx"],
)
@pytest.mark.parametrize("no_decay", [("bias", "norm"), "norm", "embedding"])
def test_scripted_and_traced_modules_have_the_kinds_of_their_classes(convert, no_decay):
    model = Traceable()
    assert decaying(convert(model), no_decay) == decaying(model, no_decay)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_lists_of_biases_in_a_scripted_module_are_biases():
    class Scriptable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.biases = nn.ParameterList([torch.ones(2)])

        def forward(self, x):
            return x

    assert decaying(torch.jit.script(Scriptable())) == set()


@pytest.mark.filterwarnings("ignore")  # of torch.export about itself
@pytest.mark.parametrize("unflatten", [False, True])
def test_norms_and_embeddings_of_an_exported_graph_are_refused_and_biases_found(unflatten):
    program = torch.export.export(Traceable(), (INDICES,))
    graph = torch.export.unflatten(program) if unflatten else program.module()
    for no_decay in (("bias", "norm"), "embedding"):
        with pytest.raises(ValueError, match=r"tokens\.weight is of a graph of torch\.export.*from the model that the"):
            fa.param_groups(graph, 0.1, no_decay)
    biases = {"norm.bias", "batch_norm.bias", "linear.bias"}
    assert names_without_decay(fa.param_groups(graph, 0.1, "bias")) == biases
    assert names_without_decay(fa.param_groups(graph, 0.1, ())) == set()


def test_an_exported_graph_has_the_parameters_of_its_model():
    """So that the groups of the model, which the message advises, are those of the graph."""
    model = Traceable()
    graph = torch.export.export(model, (INDICES,)).module()
    assert {id(p) for p in graph.parameters()} == {id(p) for p in model.parameters()}


def test_a_graph_that_has_lost_the_class_of_a_norm_is_refused():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNormOfSomeone()
            self.norm.forward = lambda x: x * self.norm.scale  # pyright: ignore[reportAttributeAccessIssue]

        def forward(self, x):
            return x * self.norm.scale

    graph = torch.fx.symbolic_trace(Scaled())
    with pytest.raises(ValueError, match=r"norm\.scale is of a graph"):
        fa.param_groups(graph, 0.1)


def test_lazy_modules_have_the_kinds_of_their_classes():
    norm = type("LazyRMSNorm2dAct", (nn.Module,), {})()
    norm.scale = nn.UninitializedParameter()
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(), norm)
    assert decaying(model, ("bias", "norm")) == {"0.weight"}


class Borrowing(nn.Module):
    """Overrides named_parameters() to yield parameters that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {"inner.weight": nn.Parameter(torch.ones(2)), "inner.bias": nn.Parameter(torch.ones(2))}

    def named_parameters(self, *args, **kwargs):
        return iter(self.held.items())


def test_parameters_that_no_module_holds_are_biases_by_name():
    groups = fa.param_groups(Borrowing(), 0.1)
    assert [[name for name, _ in group["params"]] for group in groups] == [["inner.weight"], ["inner.bias"]]


def test_arguments_of_other_types_are_refused():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got generator: pass the model itself"):
        fa.param_groups(Language().parameters(), 0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"no_decay must be a kind or a tuple of kinds, got None; \(\) is none"):
        fa.param_groups(Language(), 0.1, None)  # pyright: ignore[reportArgumentType]
