"""Refuses steps on tensors whose memory has been freed, which torch's own operators read without a check."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..core import masters
from ..core.checks import is_freed
from ..core.view import ParamView
from .checkpoint import specs


def is_parked(view: ParamView) -> bool:
    """Returns whether a parameter has no memory: its storage was freed, or its data replaced by an empty tensor."""
    shaped = [t for t in view.state.values() if isinstance(t, Tensor) and t.dim()]
    return is_freed(view.param) or (view.param.numel() == 0 and any(t.numel() > 0 for t in shaped))


def check_memory(views: Iterable[ParamView]) -> None:
    """Raises RuntimeError for a tensor that a step uses and that has no memory.

    A parameter without a gradient may have none (offloaded blocks); its step then uses the state of policies alone.
    """
    for view in views:
        if view.applies and view.param.is_meta:  # a step on the meta device computes shapes
            continue
        named = specs(view.backbone, view.group, view.param.dtype)
        if is_parked(view):
            if view.applies:
                raise _freed("data", view)
            if "interval_start" in named:
                raise RuntimeError(
                    f"the memory of parameter {view.index} has been freed, and TrainableLR measures what it has moved "
                    "by: bring it back before the step, or use source='gradient'"
                )
            named = named.keys() - view.backbone.state_spec(view.group).keys() - masters.NAMES
        for name in named:
            if name in view.state and is_freed(view.state[name]):
                raise _freed(name, view)


def _freed(name: str, view: ParamView) -> RuntimeError:
    return RuntimeError(
        f"the memory of {name!r} of parameter {view.index} has been freed, its storage has no bytes: bring it back "
        "before the step"
    )
