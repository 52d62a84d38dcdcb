"""What the kernels are timed against besides ``torch.optim``: the same algorithm by other means."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ForeachActiveAdamW:
    """ActiveAdamW as a careful user composes it from torch's multi-tensor operations: one pass over memory for each.

    Args:
        params: as of any optimizer.
        interval: steps in an interval.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        interval: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.params, self.interval = list(params), interval
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        self.exp_avg, self.exp_avg_sq, self.grad_sum, self.sum_prev = (
            [torch.zeros_like(p) for p in self.params] for _ in range(4)
        )
        self.gain = [torch.ones_like(p) for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        grads = [p.grad for p in self.params if p.grad is not None]
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        torch._foreach_add_(self.grad_sum, grads)
        torch._foreach_lerp_(self.exp_avg, grads, 1 - beta1)
        torch._foreach_mul_(self.exp_avg_sq, beta2)
        torch._foreach_addcmul_(self.exp_avg_sq, grads, grads, 1 - beta2)
        alpha = torch._foreach_mul(self.gain, self.lr)
        decay = torch._foreach_mul(alpha, -self.weight_decay)
        torch._foreach_add_(decay, 1)
        torch._foreach_clamp_min_(decay, 0)
        torch._foreach_mul_(self.params, decay)
        denominator = torch._foreach_sqrt(self.exp_avg_sq)
        torch._foreach_div_(denominator, correction2**0.5)
        torch._foreach_add_(denominator, self.eps)
        torch._foreach_mul_(alpha, self.exp_avg)
        torch._foreach_addcdiv_(self.params, alpha, denominator, -1 / correction1)
        if self.steps % self.interval == 0:
            self._end_interval()

    def _end_interval(self) -> None:
        if self.steps > self.interval:
            for gain, total, previous in zip(self.gain, self.grad_sum, self.sum_prev, strict=True):
                agree = total.sign() * previous.sign() > 0
                gain.copy_(torch.where(agree, gain + 0.1, gain * 0.9))
        self.sum_prev, self.grad_sum = self.grad_sum, self.sum_prev
        torch._foreach_zero_(self.grad_sum)
