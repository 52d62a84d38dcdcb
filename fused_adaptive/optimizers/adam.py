"""The public optimizer classes. Their arguments are those of the ``torch.optim`` namesakes, in the same order.

Every class takes, besides:

* ``decoupled_weight_decay``: whether decay acts on the parameter (``p ← p·(1 − α·wd)``) or joins the gradient;
* ``policy``: what drives the learning rate, see :mod:`fused_adaptive.policies`; also per param group;
* ``master``: for bfloat16 parameters, ``"split"`` trains exact float32 masters (2 more bytes a parameter, see
  :mod:`fused_adaptive.core.masters`), ``"stochastic"`` rounds stochastically and reproducibly, with ``rounding_seed``
  (an int in [0, 2⁶³), default 0), ``"none"`` (default) rounds to nearest; also per param group. Other dtypes stay
  plain; float16 raises ValueError;
* ``max_grad_norm``, ``skip_nonfinite``: clipping inside of the step, see :class:`AdaptiveOptimizer`;
* ``backend``: ``"auto"`` or a backend's name;
* ``process_group``: the ranks over which a framework has split the parameters without DTensor, see
  :class:`~fused_adaptive.optimizer.AdaptiveOptimizer`.

``foreach`` and ``fused`` choose nothing, except that ``fused=True`` takes torch's fused AMP contract: GradScaler hands
its scale and its overflow flag to the step, which unscales as it reads (``p.grad`` stays as it is).
``capturable=True`` keeps step counts on the device, for CUDA graphs and
``torch.compile``; an ``lr`` that is a tensor on a GPU is read there. ``differentiable=True`` raises ValueError.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core import backbone as backbones
from ..policies import ActiveLR
from ..policies.base import REQUIRED
from .base import AdaptiveOptimizer, Params

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Betas = tuple[float | Tensor, float | Tensor]


class SGD(AdaptiveOptimizer):
    """Stochastic gradient descent with momentum; replaces ``torch.optim.SGD``.

    ``b ← μ·b + (1 − dampening)·ĝ`` (the first ĝ itself), ``u = b``, with Nesterov ``u = ĝ + μ·b``. State:
    ``momentum_buffer``, 4 bytes a parameter with momentum in float32, else none. Decay is coupled by default.
    """

    backbone = backbones.SGD()

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
        policy: Any = None,
        master: str = "none",
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "master": master,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults, policy, backend, max_grad_norm, skip_nonfinite, process_group)


class Adam(AdaptiveOptimizer):
    """Adam; replaces ``torch.optim.Adam``. Decay is coupled by default.

    ``m ← β1·m + (1 − β1)·ĝ``, ``v ← β2·v + (1 − β2)·ĝ²``, ``u = (m/bc1) / (√v/√bc2 + ε)``; amsgrad: the running
    maximum of ``v`` in the denominator. State: ``step``, ``exp_avg``, ``exp_avg_sq`` (``max_exp_avg_sq``), 8 (12)
    bytes a parameter in float32.
    """

    backbone = backbones.AdamW()

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        policy: Any = None,
        master: str = "none",
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "master": master,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults, policy, backend, max_grad_norm, skip_nonfinite, process_group)


class AdamW(Adam):
    """Adam with decoupled decay; replaces ``torch.optim.AdamW``. State and arguments as :class:`Adam`."""

    _own_flags = ("decoupled_weight_decay",)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = True,
        policy: Any = None,
        master: str = "none",
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            policy=policy,
            master=master,
            rounding_seed=rounding_seed,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            backend=backend,
            process_group=process_group,
        )


class RAdam(AdaptiveOptimizer):
    """Rectified Adam; replaces ``torch.optim.RAdam``. Decay is coupled by default.

    Moments as :class:`Adam`; ``u = (m/bc1)·r·√bc2 / (√v + ε)`` where ``ρ > 5``, else ``u = m/bc1``. State: ``step``,
    ``exp_avg``, ``exp_avg_sq``, 8 bytes a parameter in float32.
    """

    backbone = backbones.RAdam()

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        policy: Any = None,
        master: str = "none",
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "master": master,
            "rounding_seed": rounding_seed,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, policy, backend, max_grad_norm, skip_nonfinite, process_group)


class AdaBelief(AdaptiveOptimizer):
    """AdaBelief, with the defaults of the authors' package 0.2.1: rectified, decoupled decay, ``eps=1e-16``.

    ``s ← β2·s + (1 − β2)·(ĝ − m)² + ε`` with the new ``m``; ``u = (m/bc1) / (√s/√bc2 + ε)``, rectified as
    :class:`RAdam` from ``ρ >= 5``; amsgrad: the running maximum of ``s``, where not rectified. State: ``step``,
    ``exp_avg``, ``exp_avg_var`` (``max_exp_avg_var``), 8 (12) bytes a parameter in float32.

    Args:
        rectify: whether to rectify as RAdam does. Default True.
    """

    backbone = backbones.AdaBelief()

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        rectify: bool = True,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        policy: Any = None,
        master: str = "none",
        rounding_seed: int = 0,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        backend: str = "auto",
        process_group: ProcessGroup | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "rectify": rectify,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "master": master,
            "rounding_seed": rounding_seed,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, policy, backend, max_grad_norm, skip_nonfinite, process_group)


class _Active(AdaptiveOptimizer):
    """Adds the arguments of :class:`ActiveLR` to an optimizer, in place of ``policy``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        first, *others = (base for base in cls.__mro__ if "__init__" in vars(base))
        if first is not _Active:
            cls.__signature__ = None  # type: ignore[attr-defined]  # a subclass with arguments of its own
            return
        # What inspect, editors and trainers see: the arguments of the plain optimizer with ActiveLR's for its policy.
        plain = inspect.signature(others[0].__init__).parameters
        added = inspect.signature(ActiveLR).parameters
        arguments = [p for name, p in plain.items() if name not in ("self", "policy")]
        arguments += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in added.values()]
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
            bases = [c for c in type(self).__mro__ if issubclass(c, AdaptiveOptimizer) and not issubclass(c, _Active)]
            name, plain = type(self).__name__, bases[0].__name__
            raise TypeError(f"{name} brings its own policy: use {plain}(policy=…) for another")
        given: Any = params if isinstance(params, Tensor) else list(params)
        if interval is REQUIRED and increment is None and high is None and _have_policies(given):
            policy = given[0]["policy"]  # Horovod builds an optimizer of another's param groups, and no more
        else:
            policy = ActiveLR(
                interval=interval, increment=increment, high=high, low=low, on_zero=on_zero, gain_bounds=gain_bounds
            )
        super().__init__(given, *args, policy=policy, **kwargs)


class ActiveSGD(_Active, SGD):
    """``SGD(…, policy=ActiveLR(interval=…))``, the paper's ActiveSGD."""


class ActiveAdam(_Active, Adam):
    """``Adam(…, policy=ActiveLR(interval=…))``, the paper's ActiveAdam."""


class ActiveAdamW(_Active, AdamW):
    """``AdamW(…, policy=ActiveLR(interval=…))``, the paper's ActiveAdamW."""


class ActiveRAdam(_Active, RAdam):
    """``RAdam(…, policy=ActiveLR(interval=…))``, the paper's ActiveRAdam."""


class ActiveAdaBelief(_Active, AdaBelief):
    """``AdaBelief(…, policy=ActiveLR(interval=…))``, the paper's ActiveBelief."""


ActiveBelief = ActiveAdaBelief


def _have_policies(params: Any) -> bool:
    return isinstance(params, list) and bool(params) and all(isinstance(g, dict) and "policy" in g for g in params)
