"""What every optimizer takes besides the arguments of its torch namesake, declared once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import TypedDict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Init = TypeVar("_Init", bound=Callable[..., None])


class Options(TypedDict, total=False):
    """The keyword arguments of every optimizer.

    Args:
        maximize: ascends instead of descending. Default False.
        foreach, fused: choose nothing, except that ``fused=True`` takes torch's fused AMP contract: GradScaler hands
            its scale and its overflow flag to the step, which unscales as it reads (``p.grad`` stays as it is). Default
            None.
        capturable: keeps step counts on the device, for CUDA graphs and ``torch.compile``. Default False.
        differentiable: True raises ValueError. Default False.
        policy: a :class:`~fused_adaptive.policies.Policy`, a tuple of one ActiveLR and one TrainableLR, or None
            (default, :class:`~fused_adaptive.FixedLR`); also per param group.
        master: for bfloat16 parameters, ``"split"`` trains exact float32 masters (2 more bytes a parameter),
            ``"stochastic"`` rounds stochastically and reproducibly, ``"none"`` (default) rounds to nearest; also per
            param group. Other dtypes stay plain; float16 raises ValueError.
        rounding_seed: of ``master="stochastic"``, an int in [0, 2⁶³). Default 0.
        max_grad_norm: clips gradients as ``torch.nn.utils.clip_grad_norm_`` does, over all groups, devices and shards,
            after unscaling (AMP); ``p.grad`` stays as it is. Default None. May be set between steps, as an attribute.
        skip_nonfinite: skips the step where the norm of all gradients is not finite, as AMP skips one: nothing
            changes, nothing counts. Default False. With the native backend on a GPU it needs ``capturable=True`` or
            ``fused=True``, since only the device knows whether the step counts.
        backend: ``"auto"`` (default) or the name of a backend, see :func:`fused_adaptive.backends.available`.
        process_group: the ranks over which a framework has split the parameters without DTensor (flat shards): each
            rank's optimizer has as many parameters in the same order, and holds a part, perhaps empty, of each. Inner
            products are summed over them. None (default): plain parameters are whole. DTensors tell their own.
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


#: The defaults of those that stand in param groups, and of the others.
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
    """Decorates a constructor with ``**options: Unpack[Options]``: ``inspect.signature`` then shows each of them."""
    *own, _ = inspect.signature(init).parameters.values()
    defaults = {**OF_GROUPS, **OF_OPTIMIZER}
    types = {name: getattr(kind, "__forward_arg__", kind) for name, kind in Options.__annotations__.items()}
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=types[name])
        for name in defaults
    ]
    init.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    return init
