"""The same algorithms composed of torch operations: of multi-tensor operations, and as ActiveLR's authors wrote it.

Each multi-tensor operation is a pass over memory. ``torch.compile`` compiles the same composition.
``tests/bench/test_step.py`` compares both with the reference backend.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .algorithms import INTERVAL, LR, Algorithm

#: The default hyperparameters of our classes: those of torch's namesakes, and of AdaBelief's authors.
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"weight_decay": 0.0, "decoupled": False, "momentum": 0.9},
    "AdamW": {"weight_decay": 0.01, "decoupled": True, "betas": (0.9, 0.999), "eps": 1e-8},
    "RAdam": {"weight_decay": 0.0, "decoupled": False, "betas": (0.9, 0.999), "eps": 1e-8},
    "AdaBelief": {"weight_decay": 0.0, "decoupled": True, "betas": (0.9, 0.999), "eps": 1e-16},
}
HIGH, LOW = 0.1, 0.9
Lists = dict[str, list[Tensor]]


class Composition:
    """An algorithm as a composition of foreach operations, with the ``step()`` of an optimizer.

    Args:
        params: the parameters to update.
        algorithm: the algorithm to compute.
        interval: the policy's interval.
        lr: the learning rate.
        compiled: whether the element-wise part is compiled by ``torch.compile``. Scalars are then passed as tensors,
            so that it is compiled only once.
        overrides: hyperparameters that replace those of :data:`SETTINGS`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        algorithm: Algorithm,
        interval: int = INTERVAL,
        lr: float = LR,
        compiled: bool = False,
        **overrides: Any,
    ) -> None:
        self.params, self.algorithm, self.interval, self.lr = list(params), algorithm, interval, lr
        self.settings = SETTINGS[algorithm.backbone] | overrides
        self.count, self.gain = 0, 1.0
        names = ["exp_avg"] if algorithm.backbone == "SGD" else ["exp_avg", "exp_avg_sq"]
        policy = algorithm.policy
        names += ["element_gain"] if policy == "active" else []
        names += ["grad_sum", "grad_sum_prev"] if policy in ("active", "trainable") else []
        names += ["start", "displacement_prev"] if policy == "displacement" else []
        names += ["direction_prev"] if policy == "hypergradient" else []
        self.lists: Lists = {name: [torch.zeros_like(p, dtype=_state_dtype(p)) for p in self.params] for name in names}
        for gain in self.lists.get("element_gain", ()):
            gain.fill_(1)
        for start, p in zip(self.lists.get("start", ()), self.params, strict=False):
            start.copy_(p.detach())
        #: The state of each parameter by name, as in an optimizer.
        self.state = {p: {n: ts[i] for n, ts in self.lists.items()} for i, p in enumerate(self.params)}
        self.compiled = compiled
        self._run: Callable[..., None] = torch.compile(_update, dynamic=False) if compiled else _update
        self._adjust: Callable[..., None] = torch.compile(_adjust, dynamic=False) if compiled else _adjust

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        if grads[0].dtype != _state_dtype(grads[0]):
            grads = [g.to(_state_dtype(g)) for g in grads]
        self.count += 1
        ends = self.count % self.interval == 0
        policy = self.algorithm.policy
        if policy == "trainable":
            torch._foreach_add_(self.lists["grad_sum"], grads)
            if ends:
                mean = torch._foreach_div(self.lists["grad_sum"], float(self.interval))
                self.gain *= _newton(list(mean), self.lists["grad_sum_prev"])
                self.lists["grad_sum_prev"] = list(mean)
                torch._foreach_zero_(self.lists["grad_sum"])
        elif policy == "hypergradient" and self.count > 1:
            slope = _inner(grads, self.lists["direction_prev"]).item()
            self.gain = max(0.0, self.gain + 1e-12 * slope / self.lr)
        scalars = self._scalars()
        if self.compiled:
            scalars = {
                n: v if isinstance(v, bool) else torch.tensor(v, dtype=torch.float64) for n, v in scalars.items()
            }
        self._run(self.algorithm.backbone, policy, self.settings, self.params, grads, self.lists, scalars)
        if ends and policy == "active":
            if self.count > self.interval:
                self._adjust(self.lists["element_gain"], self.lists["grad_sum"], self.lists["grad_sum_prev"])
            self.lists["grad_sum"], self.lists["grad_sum_prev"] = self.lists["grad_sum_prev"], self.lists["grad_sum"]
            torch._foreach_zero_(self.lists["grad_sum"])
        elif ends and policy == "displacement":
            moved = torch._foreach_sub(self.lists["start"], [p.to(_state_dtype(p)) for p in self.params])
            torch._foreach_div_(moved, self.gain * self.lr * self.interval)
            self.gain *= _newton(list(moved), self.lists["displacement_prev"])
            self.lists["displacement_prev"] = list(moved)
            torch._foreach_copy_(self.lists["start"], self.params)

    def _scalars(self) -> dict[str, Any]:
        """Returns the scalars that change from step to step."""
        s, t = self.settings, self.count
        rate = self.lr * self.gain
        scalars = {"rate": rate, "keep": 1 - min(1.0, rate * s["weight_decay"])}
        if "betas" not in s:
            return scalars | {"factor": 1.0}
        beta1, beta2 = s["betas"]
        bc1, bc2 = 1 - beta1**t, 1 - beta2**t
        if self.algorithm.backbone == "AdamW":
            return scalars | {"factor": 1 / bc1, "root": bc2**0.5}
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / bc2
        if length <= 5:
            return scalars | {"factor": 1 / bc1, "rectified": False}
        r = ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5
        return scalars | {"factor": r * bc2**0.5 / bc1, "rectified": True}


def _update(
    backbone: str,
    policy: str,
    settings: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    lists: Lists,
    scalars: dict[str, Any],
) -> None:
    """Updates all parameters. Scalars are floats, or tensors if this function is compiled."""
    if policy == "active":
        torch._foreach_add_(lists["grad_sum"], grads)
    numerator, denominator = _direction(backbone, settings, grads, lists, scalars)
    narrow = params[0].dtype != numerator[0].dtype
    targets: list[Tensor] = [p.to(numerator[0].dtype) for p in params] if narrow else params
    if policy == "hypergradient":
        direction = torch._foreach_div(numerator, denominator) if denominator else numerator
        torch._foreach_copy_(lists["direction_prev"], torch._foreach_mul(direction, scalars["factor"]))
    if policy == "active":
        rate = torch._foreach_mul(lists["element_gain"], scalars["rate"])
        if settings["decoupled"] and settings["weight_decay"]:
            keep = torch._foreach_mul(rate, -settings["weight_decay"])
            torch._foreach_add_(keep, 1)
            torch._foreach_clamp_min_(keep, 0)
            torch._foreach_mul_(targets, keep)
        torch._foreach_mul_(rate, numerator)
        _subtract(targets, rate, denominator, scalars["factor"])
    else:
        if settings["decoupled"] and settings["weight_decay"]:
            torch._foreach_mul_(targets, scalars["keep"])
        _subtract(targets, numerator, denominator, scalars["rate"] * scalars["factor"])
    if narrow:
        torch._foreach_copy_(params, targets)


def _direction(
    backbone: str, s: dict[str, Any], grads: list[Tensor], lists: Lists, scalars: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Returns the direction as a numerator, which is state, and a denominator, which is not, or None.

    The direction is their quotient times the scalar ``factor``.
    """
    exp_avg = lists["exp_avg"]
    if backbone == "SGD":
        torch._foreach_mul_(exp_avg, s["momentum"])  # 0 before the first step
        torch._foreach_add_(exp_avg, grads)
        return exp_avg, None
    beta1, beta2 = s["betas"]
    torch._foreach_lerp_(exp_avg, grads, 1 - beta1)
    exp_avg_sq = lists["exp_avg_sq"]
    torch._foreach_mul_(exp_avg_sq, beta2)
    residual = torch._foreach_sub(grads, exp_avg) if backbone == "AdaBelief" else grads
    torch._foreach_addcmul_(exp_avg_sq, residual, residual, 1 - beta2)
    if backbone == "AdaBelief":
        torch._foreach_add_(exp_avg_sq, s["eps"])
    if backbone != "AdamW" and not scalars["rectified"]:
        return exp_avg, None
    denominator = list(torch._foreach_sqrt(exp_avg_sq))
    if backbone == "AdamW":
        torch._foreach_div_(denominator, scalars["root"])
    torch._foreach_add_(denominator, s["eps"])
    return exp_avg, denominator


def _subtract(targets: list[Tensor], numerator: Any, denominator: Any, factor: Any) -> None:
    if isinstance(factor, Tensor):  # one more pass over memory, which compilation fuses
        direction = torch._foreach_div(numerator, denominator) if denominator else numerator
        torch._foreach_sub_(targets, torch._foreach_mul(direction, factor))
    elif denominator:
        torch._foreach_addcdiv_(targets, numerator, denominator, -factor)
    else:
        torch._foreach_add_(targets, numerator, alpha=-factor)


def _adjust(gains: list[Tensor], sums: list[Tensor], previous: list[Tensor]) -> None:
    """Adjusts ActiveLR's gains at the end of an interval."""
    for gain, total, before in zip(gains, sums, previous, strict=True):
        agree = total.sign() * before.sign() > 0
        gain.copy_(torch.where(agree, gain + HIGH, gain * LOW))


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    products = torch._foreach_mul(a, b)
    return torch.stack([p.sum(dtype=torch.float64) for p in products]).sum()


def _newton(mean: list[Tensor], previous: list[Tensor]) -> float:
    """Returns the factor of TrainableLR's global gain."""
    num, sq = torch.stack([_inner(mean, previous), _inner(mean, mean)]).tolist()
    return 1 + num / max(4 * (sq - num), 4 * num) if num else 1.0


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class AuthorsActiveAdamW:
    """ActiveAdamW in the style of its authors: twenty operations per tensor, and 12 bytes more state per parameter.

    Arguments are those of :class:`Composition`.
    """

    def __init__(
        self, params: Sequence[Tensor], interval: int = INTERVAL, lr: float = LR, weight_decay: float = 0.01
    ) -> None:
        self.params, self.interval, self.lr, self.weight_decay = list(params), interval, lr, weight_decay
        self.count = 0
        names = ("exp_avg", "exp_avg_sq", "grad_sum", "grad_sum_prev", "element_gain")
        self.state = {p: {n: torch.zeros_like(p, dtype=_state_dtype(p)) for n in names} for p in self.params}
        for state in self.state.values():
            state["element_gain"].fill_(1)

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        bc1, bc2 = 1 - 0.9**self.count, 1 - 0.999**self.count
        for p in self.params:
            grad, state = p.grad, self.state[p]
            assert grad is not None
            exp_avg, exp_avg_sq, gain = state["exp_avg"], state["exp_avg_sq"], state["element_gain"]
            state["grad_sum"].add_(grad)
            rate = gain * self.lr
            decay = (rate * self.weight_decay).neg().add(1).clamp(min=0)
            p.mul_(decay)
            exp_avg.mul_(0.9).add_(grad * (1 - 0.9))
            exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=1 - 0.999)
            denominator = (exp_avg_sq.sqrt() / bc2**0.5).add_(1e-8)
            step_size = rate / bc1
            p.add_(-(step_size * (exp_avg / denominator)))
            if self.count % self.interval == 0:
                if self.count > self.interval:
                    agree = torch.sign(state["grad_sum"]) * torch.sign(state["grad_sum_prev"]) > 0
                    gain.copy_(torch.where(agree, gain + HIGH, gain * LOW))
                state["grad_sum_prev"].copy_(state["grad_sum"])
                state["grad_sum"].zero_()
