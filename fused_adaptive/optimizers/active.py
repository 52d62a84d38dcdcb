"""The base class of ActiveSGD, ActiveAdamW and so on: optimizers that take the arguments of ActiveLR."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from ..core.eager import eager
from ..policies import ActiveLR
from ..policies.base import REQUIRED
from .base import AdaptiveOptimizer
from .options import Params

_ARGUMENTS = inspect.signature(ActiveLR).parameters


class Active(AdaptiveOptimizer):
    """Adds the arguments of :class:`ActiveLR` to an optimizer, in place of ``policy``; a group may have its own."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        first, *others = (base for base in cls.__mro__ if "__init__" in vars(base))
        if first is not Active:
            cls.__signature__ = None  # type: ignore[attr-defined]  # a subclass with arguments of its own
            return
        # inspect, editors and trainers read this signature: the plain optimizer's, with ActiveLR's arguments in place
        # of ``policy``.
        plain = inspect.signature(others[0].__init__).parameters
        arguments = [p for name, p in plain.items() if name not in ("self", "policy")]
        arguments += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in _ARGUMENTS.values()]
        cls.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]

    def __init__(
        self,
        params: Params,
        *args: Any,
        interval: int | None = REQUIRED,
        increment: float | None = None,
        high: float | None = None,
        low: float | None = None,
        on_zero: str = "hold",
        gain_bounds: tuple[float, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if "policy" in kwargs:
            bases = [c for c in type(self).__mro__ if issubclass(c, AdaptiveOptimizer) and not issubclass(c, Active)]
            name, plain = type(self).__name__, bases[0].__name__
            raise TypeError(f"{name} brings its own policy: use {plain}(policy=…) for another")
        given: Any = params if isinstance(params, Tensor) else list(params)
        if interval is REQUIRED and increment is None and high is None and _have_policies(given):
            policy = given[0]["policy"]  # Horovod passes another optimizer's param groups and no other argument
        else:
            policy = ActiveLR(
                interval=interval, increment=increment, high=high, low=low, on_zero=on_zero, gain_bounds=gain_bounds
            )
        super().__init__(given, *args, policy=policy, **kwargs)

    @eager
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, at construction or during training. It may have its own policy or arguments of ActiveLR.

        Raises:
            ValueError, TypeError: as the constructor does; the optimizer has not changed then.
        """
        if isinstance(param_group, dict):
            own = {name: param_group.pop(name) for name in _ARGUMENTS.keys() & param_group.keys()}
            if own and "policy" not in param_group:
                param_group["policy"] = replace(cast(ActiveLR, self._resolutions.default[-1]), **own)
        super().add_param_group(param_group)


def _have_policies(params: Any) -> bool:
    return isinstance(params, list) and bool(params) and all(isinstance(g, dict) and "policy" in g for g in params)
