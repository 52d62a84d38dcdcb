"""Param groups with and without weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.checks import check_nonnegative
from ..core.plain import plain_number

KINDS = ("bias", "norm", "embedding")

#: All of torch's normalizations that have parameters: BatchNorm, SyncBatchNorm and InstanceNorm are the first.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
#: bias, bias_ih_l0, in_proj_bias, bias_k, biases, bias2; pruning makes it bias_orig.
_BIAS = re.compile(r"(^|_)bias(es)?\d*(_|$)")
#: LlamaRMSNorm, LayerNorm2d, BatchNormAct2d, LayerNormalization; no NormalizedLinear, no WeightNormConv.
_NORM = re.compile(r"(?<!Weight)(?<!Spectral)(Norm|norm)(alization)?(?![a-z])")
_ENDS_IN_NORM = re.compile(r"(Norm|norm)(alization)?_?([\dN]?[dD])?$")


def param_groups(
    model: nn.Module, weight_decay: float, no_decay: str | Iterable[str] = ("bias", "norm")
) -> list[dict[str, Any]]:
    """The trainable parameters of a model in two groups: those that decay, and those that do not.

    For this package's optimizers and any other that takes named parameters in groups; the names go into the groups'
    ``param_names`` and so into checkpoints and error messages. ``weight_decay`` stands in the groups, so what the
    optimizer is given plays no part.

    Args:
        model: its frozen parameters are left out, shared ones stand in the groups once.
        weight_decay: of those that decay, finite and >= 0.
        no_decay: which kinds do not. ``"bias"``: whatever has ``bias`` as a word of its name, such as ``bias_ih_l0`` or
            ``in_proj_bias``, also where it is parametrized or pruned. ``"norm"``: the parameters of normalizations:
            torch's and their subclasses, classes whose names end in ``Norm``, and the vectors of those that have it as
            a word of their names (``BatchNormAct2d``; but the matrix of a ``LayerNormLinear`` decays).
            ``"embedding"``: the weights of ``nn.Embedding`` and ``nn.EmbeddingBag``. A parameter may be of several
            kinds; a shared one is of the kinds of all its places (a tied output layer is an embedding). Default
            ``("bias", "norm")``; ``()`` lets all decay.

    Returns:
        ``[{"params": [(name, parameter), …], "weight_decay": weight_decay}, {…, "weight_decay": 0.0}]`` in the model's
        order; a group that would be empty is left out.

    Raises:
        ValueError: for an unknown kind, a weight decay outside of its range, or a model without trainable parameters.
    """
    excluded = (no_decay,) if isinstance(no_decay, str) else tuple(no_decay)
    for kind in excluded:
        if kind not in KINDS:
            raise ValueError(f"param_groups: unknown kind {kind!r} in no_decay; choose from {', '.join(KINDS)}")
    weight_decay = plain_number("param_groups: weight_decay", weight_decay)
    check_nonnegative("param_groups: weight_decay", weight_decay)
    kinds: dict[Tensor, set[str]] = {}
    for module, name, p in _places(model):
        kinds.setdefault(p, set()).update(_kinds(module, name, p))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"param_groups: {type(model).__name__} has no trainable parameters")
    spared = [(name, p) for name, p in named if kinds[p].intersection(excluded)]
    decaying = [(name, p) for name, p in named if not kinds[p].intersection(excluded)]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every parameter, with each module that it is of and the name that it has there."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            yield module, name, p
        for name, child in module.named_children():
            if isinstance(child, (nn.ParameterList, nn.ParameterDict)):
                yield from ((module, name, p) for p in child.parameters())
        if parametrize.is_parametrized(module):
            for name, originals in module.parametrizations.items():  # type: ignore[union-attr, operator]
                yield from ((module, name, p) for p in originals.parameters(recurse=False))


def _kinds(module: nn.Module, name: str, param: Tensor) -> set[str]:
    kinds = set()
    if _BIAS.search(name):
        kinds.add("bias")
    if isinstance(module, NORMS) or _is_named_norm(module, param):
        kinds.add("norm")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        kinds.add("embedding")
    return kinds


def _is_named_norm(module: nn.Module, param: Tensor) -> bool:
    """Every model library has a LayerNorm or RMSNorm of its own, which inherits from none of torch's."""
    names = [base.__name__ for base in type(module).__mro__ if _NORM.search(base.__name__)]
    is_vector = param.numel() == max(param.shape, default=1)
    return bool(names) and (is_vector or any(map(_ENDS_IN_NORM.search, names)))
