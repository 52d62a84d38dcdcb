"""Backbones of the float64 oracle: functions from ``ĝ`` to the direction ``u``. ``parameter``: ``oracle.Parameter``."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def sgd(parameter: Any, gradient: Tensor) -> Tensor:
    """SGD with momentum, dampening and Nesterov; the first gradient is the first buffer."""
    options, buffer = parameter.group.options, parameter.moments.get("buffer")
    if options["momentum"] == 0:
        return gradient
    buffer = gradient if buffer is None else options["momentum"] * buffer + (1 - options["dampening"]) * gradient
    parameter.moments["buffer"] = buffer
    return gradient + options["momentum"] * buffer if options["nesterov"] else buffer


def adamw(parameter: Any, gradient: Tensor) -> Tensor:
    """``(m/bc1) / (√v/√bc2 + ε)``."""
    options, (beta1, beta2) = parameter.group.options, parameter.group.options["betas"]
    mean = parameter.average("m", gradient, beta1) / (1 - beta1**parameter.steps)
    square = parameter.average("v", gradient**2, beta2)
    if options["amsgrad"]:
        square = parameter.maximum(square)
    return mean / ((square / (1 - beta2**parameter.steps)).sqrt() + options["eps"])


def radam(parameter: Any, gradient: Tensor) -> Tensor:
    """``(m/bc1)·r·√bc2 / (√v + ε)`` where ``ρ > 5``, else ``m/bc1``."""
    options, (beta1, beta2) = parameter.group.options, parameter.group.options["betas"]
    mean = parameter.average("m", gradient, beta1) / (1 - beta1**parameter.steps)
    square = parameter.average("v", gradient**2, beta2)
    length, factor = rectification(beta2, parameter.steps)
    if length <= 5:
        return mean
    return mean * factor * math.sqrt(1 - beta2**parameter.steps) / (square.sqrt() + options["eps"])


def adabelief(parameter: Any, gradient: Tensor) -> Tensor:
    """As AdamW, or as RAdam but from ``ρ ≥ 5``. ``s`` is centered at the new mean, and ``ε`` is also added to it."""
    options, (beta1, beta2) = parameter.group.options, parameter.group.options["betas"]
    moving = parameter.average("m", gradient, beta1)
    variance = parameter.average("s", (gradient - moving) ** 2, beta2) + options["eps"]
    parameter.moments["s"] = variance
    mean, correction = moving / (1 - beta1**parameter.steps), math.sqrt(1 - beta2**parameter.steps)
    if options["rectify"]:
        length, factor = rectification(beta2, parameter.steps)
        return mean if length < 5 else mean * factor * correction / (variance.sqrt() + options["eps"])
    if options["amsgrad"]:
        variance = parameter.maximum(variance)
    return mean / (variance.sqrt() / correction + options["eps"])


def rectification(beta2: float, step: int) -> tuple[float, float]:
    """Returns ``ρ`` and, if that is above 4, ``r``."""
    limit = 2 / (1 - beta2) - 1
    length = limit - 2 * step * beta2**step / (1 - beta2**step)
    square = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
    return length, math.sqrt(square) if length > 4 else math.nan


DIRECTIONS = {"SGD": sgd, "AdamW": adamw, "RAdam": radam, "AdaBelief": adabelief}
