"""Functions that step an optimizer of one parameter."""

from __future__ import annotations

import torch


def one_parameter(value=(1.0, 1.0)):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def feed(optimizer, *grads):
    """Takes one step for each gradient of the only parameter; None is a step without a gradient."""
    (p,) = optimizer.param_groups[0]["params"]
    for grad in grads:
        p.grad = None if grad is None else torch.tensor(grad, dtype=p.dtype)
        optimizer.step()


def element_gain(optimizer):
    (p,) = optimizer.param_groups[0]["params"]
    return optimizer.state[p]["element_gain"].tolist()


def gain(optimizer, index=0):
    return optimizer.state[optimizer.param_groups[0]["params"][index]]["gain"].item()
