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

#: All normalizations of torch that have parameters. The first is the base of BatchNorm, SyncBatchNorm, InstanceNorm.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
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
            ``LayerNormLinear`` decays). ``"embedding"``: the weights of ``nn.Embedding`` and ``nn.EmbeddingBag``. A
            parameter may be of several kinds; a shared one is of the kinds of all its modules (a tied output layer is
            an embedding). Default ``("bias", "norm")``; with ``()`` all parameters decay.

    Returns:
        ``[{"params": [(name, parameter), …], "weight_decay": weight_decay}, {…, "weight_decay": 0.0}]`` in the model's
        order. Empty groups are left out.

    Raises:
        ValueError: for an unknown kind, a weight decay out of range, or a model without trainable parameters.
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
    without_decay = [(name, p) for name, p in named if kinds[p].intersection(excluded)]
    with_decay = [(name, p) for name, p in named if not kinds[p].intersection(excluded)]
    groups = [{"params": with_decay, "weight_decay": weight_decay}, {"params": without_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yields every parameter with its module and its name there, once for each module that has it."""
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
    """Checks by class name, since model libraries have LayerNorm and RMSNorm classes that do not inherit torch's."""
    names = [base.__name__ for base in type(module).__mro__ if _NORM.search(base.__name__)]
    is_vector = param.numel() == max(param.shape, default=1)
    return bool(names) and (is_vector or any(map(_ENDS_IN_NORM.search, names)))
