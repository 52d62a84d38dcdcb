"""Param groups with and without weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, fx, jit, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..core.checks import check_nonnegative
from ..core.plain import plain_number

KINDS = ("bias", "norm", "embedding")

#: Matches bias, bias_ih_l0, in_proj_bias, bias_k, biases, bias2, and bias_orig, which pruning creates.
_BIAS = re.compile(r"(^|_)bias(es)?\d*(_|$)")
#: Matches LlamaRMSNorm, LayerNorm2d, BatchNormAct2d, LayerNormalization; not NormalizedLinear or WeightNormConv.
_NORM = re.compile(r"(?<!Weight)(?<!Spectral)(Norm|norm)(alization)?(?![a-z])")
_ENDS_IN_NORM = re.compile(r"(Norm|norm)(alization)?_?([\dN]?[dD])?$")


def param_groups(
    model: nn.Module, weight_decay: float, no_decay: str | Iterable[str] = ("bias", "norm")
) -> list[dict[str, Any]]:
    """Returns the trainable parameters of a model in two groups: with and without weight decay.

    The groups work with this package's optimizers and any other that takes named parameters in groups. The names
    become the groups' ``param_names``, which checkpoints and error messages use. Each group has its own
    ``weight_decay``, so the optimizer's argument has no effect.

    Args:
        model: the model. Frozen parameters are left out; shared ones appear once.
        weight_decay: the decay of the first group, finite and >= 0.
        no_decay: the kinds of parameters without decay. ``"bias"``: parameters with ``bias`` as a word of their names,
            such as ``bias_ih_l0`` or ``in_proj_bias``, parametrized and pruned ones included. ``"norm"``: the
            parameters of torch's normalizations and their subclasses and of classes whose names end in ``Norm``, and
            the vectors of classes with ``Norm`` as a word of their names (``BatchNormAct2d``; but the matrix of a
            ``LayerNormLinear`` decays), those that a lazy module has not initialized included. ``"embedding"``: the
            parameters of ``nn.Embedding``, ``nn.EmbeddingBag``, their subclasses and classes of these names. Scripted
            and traced modules have only the names of their classes, not those of base classes. A parameter may be of
            several kinds; a shared one is of the kinds of all its modules (a tied output layer is an embedding).
            Default ``("bias", "norm")``; with ``()`` all parameters decay.

    Returns:
        ``[{"params": [(name, parameter), …], "weight_decay": weight_decay}, {…, "weight_decay": 0.0}]`` in the model's
        order. Empty groups are left out.

    Raises:
        TypeError: if ``model`` is not a module, or ``no_decay`` neither a string nor strings.
        ValueError: for an unknown kind, a weight decay out of range, a model without trainable parameters, or the kinds
            ``"norm"`` and ``"embedding"`` for a graph that has lost the modules of its parameters (``torch.export``).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups: model must be a torch.nn.Module, got {type(model).__name__}: pass the model itself, since "
            "the kinds of its parameters are those of its modules"
        )
    if not isinstance(no_decay, Iterable):
        raise TypeError(f"param_groups: no_decay must be a kind or a tuple of kinds, got {no_decay!r}; () is none")
    excluded = (no_decay,) if isinstance(no_decay, str) else tuple(no_decay)
    for kind in excluded:
        if kind not in KINDS:
            raise ValueError(f"param_groups: unknown kind {kind!r} in no_decay; choose from {', '.join(KINDS)}")
    weight_decay = plain_number("param_groups: weight_decay", weight_decay)
    check_nonnegative("param_groups: weight_decay", weight_decay)
    if not {"norm", "embedding"}.isdisjoint(excluded):
        _check_classes_are_known(model)
    kinds: dict[Tensor, set[str]] = {}
    for module, name, p in _places(model):
        kinds.setdefault(p, set()).update(_kinds(module, name, p))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"param_groups: {type(model).__name__} has no trainable parameters")
    for name, p in named:
        if p not in kinds:  # an override of named_parameters() yields it, and no module has it
            kinds[p] = _kinds_of_name(name.rpartition(".")[2])
    without_decay = [(name, p) for name, p in named if kinds[p].intersection(excluded)]
    with_decay = [(name, p) for name, p in named if not kinds[p].intersection(excluded)]
    groups = [{"params": with_decay, "weight_decay": weight_decay}, {"params": without_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yields every parameter with its module and its name there, once for each module that has it."""
    for module in model.modules():
        for name, p in nn.Module.named_parameters(module, recurse=False):  # past an override
            yield module, name, p
        for name, child in module.named_children():
            if not _class_names(child).isdisjoint(("ParameterList", "ParameterDict")):
                yield from ((module, name, p) for p in child.parameters())
        if parametrize.is_parametrized(module):
            for name, originals in module.parametrizations.items():  # type: ignore[union-attr, operator]
                yield from ((module, name, p) for p in originals.parameters(recurse=False))


def _kinds(module: nn.Module, name: str, param: Tensor) -> set[str]:
    kinds, classes = _kinds_of_name(name), _class_names(module)
    if _is_norm(classes, param):
        kinds.add("norm")
    if not classes.isdisjoint(("Embedding", "EmbeddingBag")):
        kinds.add("embedding")
    return kinds


def _kinds_of_name(name: str) -> set[str]:
    return {"bias"} if _BIAS.search(name) else set()


def _class_names(module: nn.Module) -> set[str]:
    """Returns the names of a module's class and its bases; of a scripted or traced module the one its class had."""
    if isinstance(module, jit.ScriptModule):
        return {module.original_name}
    return {base.__name__ for base in type(module).__mro__}


def _is_norm(classes: set[str], param: Tensor) -> bool:
    """Checks by class name, since model libraries have LayerNorm and RMSNorm classes that do not inherit torch's."""
    names = [name for name in classes if _NORM.search(name)]
    if not names or any(map(_ENDS_IN_NORM.search, names)):
        return bool(names)
    return is_lazy(param) or param.numel() == max(param.shape, default=1)


def _check_classes_are_known(model: nn.Module) -> None:
    """Raises ValueError for a graph whose parameters are in modules of no class, as ``torch.export`` puts them."""
    for graph in model.modules():
        if not (isinstance(graph, fx.GraphModule) or type(graph).__name__ == "UnflattenedModule"):
            continue
        for path, module in graph.named_modules():
            is_classless = type(module) is nn.Module or type(module).__name__ == "InterpreterModule"
            if is_classless and (own := [name for name, _ in module.named_parameters(recurse=False)]):
                raise ValueError(
                    f"param_groups: {path}.{own[0]} is of a graph of torch.export or torch.fx, which does not say "
                    "whether it is of a norm or an embedding: build the groups from the model that the graph was made "
                    'of, which has the same parameters, or pass no_decay="bias" or ()'
                )
