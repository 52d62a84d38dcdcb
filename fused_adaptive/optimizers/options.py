"""The types of the optimizers' arguments, and the keyword arguments that all of them take besides torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from typing_extensions import TypedDict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
Betas = tuple[float | Tensor, float | Tensor]

_Init = TypeVar("_Init", bound=Callable[..., None])


class Options(TypedDict, total=False):
    """The keyword arguments of every optimizer.

    Args:
        maximize: maximizes instead of minimizing. Default False.
        foreach, fused: do not choose an implementation. ``fused=True`` only selects torch's fused AMP protocol:
            GradScaler passes its scale and its overflow flag to the step, which unscales the gradients as it reads
            them and does not change ``p.grad``. Default None.
        capturable: keeps step counts on the device, for CUDA graphs and ``torch.compile``. Default False.
        differentiable: True raises ValueError. Default False.
        policy: a :class:`~fused_adaptive.policies.Policy`, a tuple of one ActiveLR and one TrainableLR, or None
            (default, :class:`~fused_adaptive.FixedLR`). May differ between param groups.
        master: applies to bfloat16 parameters. ``"split"`` trains exact float32 masters (2 more bytes per parameter),
            ``"stochastic"`` rounds stochastically and reproducibly, ``"none"`` (default) rounds to nearest. May differ
            between param groups. Other dtypes are not affected, except that float16 raises ValueError.
        rounding_seed: the seed of ``master="stochastic"``, an int in [0, 2⁶³). Default 0.
        max_grad_norm: clips gradients as ``torch.nn.utils.clip_grad_norm_`` does, over all groups, devices and shards,
            after unscaling (AMP); does not change ``p.grad``. Default None. Can be set as an attribute between steps.
        skip_nonfinite: skips the step if the norm of all gradients is not finite, as AMP does: nothing changes and the
            step is not counted. Default False. The native backend on a GPU requires ``capturable=True`` or
            ``fused=True`` for it, since only the device knows whether the step counts.
        backend: ``"auto"`` (default) or the name of a backend, see :func:`fused_adaptive.backends.available`.
        process_group: the ranks over which a framework has split the parameters without DTensor (flat shards). Each
            rank's optimizer has the same number of parameters in the same order and holds a part of each, which may be
            empty. Inner products are summed over the ranks. None (default): plain parameters are not split. A DTensor
            carries its own process groups.
    """

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    policy: Any
    master: str
    rounding_seed: int
    max_grad_norm: float | None
    skip_nonfinite: bool
    backend: str
    process_group: ProcessGroup | None


#: The defaults of the options in param groups, then those of the options of the whole optimizer.
OF_GROUPS: Mapping[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "policy": None,
    "master": "none",
    "rounding_seed": 0,
}
OF_OPTIMIZER: Mapping[str, Any] = {
    "max_grad_norm": None,
    "skip_nonfinite": False,
    "backend": "auto",
    "process_group": None,
}


def shows_options(init: _Init) -> _Init:
    """Makes ``inspect.signature`` show each option of a constructor that takes ``**options: Unpack[Options]``."""
    *own, _ = inspect.signature(init).parameters.values()
    defaults = {**OF_GROUPS, **OF_OPTIMIZER}
    types = {name: getattr(kind, "__forward_arg__", kind) for name, kind in Options.__annotations__.items()}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=types[name])
        for name in defaults
    ]
    init.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return init
