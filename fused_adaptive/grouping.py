"""Param groups with and without weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

KINDS = ("bias", "norm", "embedding")


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
        no_decay: which kinds do not. ``"bias"``: whatever is named ``bias`` or ``…_bias``. ``"norm"``: the parameters
            of normalizations (BatchNorm, LayerNorm, GroupNorm, RMSNorm, …, and classes whose names end in ``Norm``).
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
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"param_groups: weight_decay must be finite and >= 0, got {weight_decay}")
    kinds: dict[Tensor, set[str]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            kinds.setdefault(p, set()).update(_kinds(module, name))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"param_groups: {type(model).__name__} has no trainable parameters")
    spared = [(name, p) for name, p in named if kinds[p].intersection(excluded)]
    decaying = [(name, p) for name, p in named if not kinds[p].intersection(excluded)]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _kinds(module: nn.Module, name: str) -> set[str]:
    kinds = set()
    if name == "bias" or name.endswith("_bias"):
        kinds.add("bias")
    # Every model library has a LayerNorm or RMSNorm of its own, which inherits from none of torch's.
    if isinstance(module, nn.modules.batchnorm._NormBase) or type(module).__name__.endswith("Norm"):
        kinds.add("norm")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        kinds.add("embedding")
    return kinds
