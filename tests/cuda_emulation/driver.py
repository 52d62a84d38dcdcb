"""Runs csrc/cuda on the CPU: passes the addresses of an optimizer's parameters and state to the emulated executor."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.backends import plans
from fused_adaptive.core import declarations
from fused_adaptive.core.view import numbers_of, reference_rate
from fused_adaptive.engine import participants, reference_rates
from fused_adaptive.engine.checkpoint import specs
from fused_adaptive.policies import ActiveLR, Hypergradient, TrainableLR, from_plain

from . import build

#: Roles of a member after the parameter and the backbone's three.
ROLES = list(declarations.ROLES)[4:]
BACKBONES = list(declarations.STRUCTURES)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@cache
def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.emulation_error.restype = ctypes.c_char_p
    library.emulation_plan.restype = ctypes.c_void_p
    library.emulation_memory.restype = ctypes.c_int64
    return library


class Emulated:
    """The emulated CUDA executor of an optimizer. It completes the optimizer's state and changes it in place.

    Args:
        optimizer: any optimizer of this package on the CPU; do not call its ``step()``.
        on_device: whether counters are on the device (capturable, fused AMP).
        library: path from :func:`build.library`; None: the unpatched library.
        order: order of the blocks: 0 forward, 1 backward (threads too), 2 interleaved at barriers.
        shift: number of elements by which every address is moved downwards.
    """

    def __init__(
        self,
        optimizer: fa.AdaptiveOptimizer,
        on_device: bool = False,
        library: Path | None = None,
        order: int = 0,
        processors: int = 2,
        shift: int = 0,
    ) -> None:
        self.lib = load(library or build.library())
        self.lib.emulation_configure(order, processors, 2)
        self.optimizer, self.groups, self.shift = optimizer, optimizer.param_groups, shift
        self.params: list[Tensor] = [p for group in self.groups for p in group["params"]]
        self._buffers: dict[Tensor, Tensor] = {}
        self._plan = ctypes.c_void_p(self.lib.emulation_plan(int(on_device)))
        self._build()

    def __del__(self) -> None:
        self.lib.emulation_free(self._plan)

    def step(
        self,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        random_rates: Tensor | None = None,
        skips: bool = False,
    ) -> None:
        """Takes one step with the parameters' gradients. ``skips``: whether the step is expected to do nothing."""
        empty = ctypes.c_double()  # an empty tensor has a gradient but no address
        grads = [0 if p.grad is None else self._address(p.grad) or ctypes.addressof(empty) for p in self.params]
        reference_rates.follow(self.groups)
        self._check(
            self.lib.emulation_step(
                self._plan,
                (ctypes.c_void_p * len(grads))(*grads),
                self._hypers(),
                *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (random_rates, grad_scale, found_inf)),
            )
        )
        for p in list(self._buffers):  # a buffer is state once it has values
            if p.grad is not None and not skips:
                self.optimizer.state[p]["momentum_buffer"] = self._buffers.pop(p)

    def end_interval(self) -> None:
        self._check(self.lib.emulation_end_interval(self._plan, self._hypers()))

    def _hypers(self) -> Any:
        scales = participants.scale_groups(self.groups)
        numbers = [
            number
            for group in self.groups
            for number in numbers_of(group, max(map(reference_rate, scales.get(id(group), (group,)))))
        ]
        return (ctypes.c_double * len(numbers))(*numbers)

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(self.lib.emulation_error().decode())

    def _address(self, tensor: Tensor) -> int:
        return tensor.data_ptr() - self.shift * tensor.element_size() * (tensor.dim() > 0 and tensor.numel() > 0)

    def _build(self) -> None:
        backbone, number = self.optimizer.backbone, {}
        for group in self.groups:
            structure = BACKBONES.index(_structure(backbone.name, group))
            self.lib.emulation_group(
                self._plan, structure, int(not group["decoupled_weight_decay"]), int(group["maximize"])
            )
            for policy in from_plain(group["policy"]):
                if policy not in number and not isinstance(policy, fa.FixedLR):
                    number[policy] = len(number)
                    self._add_policy(policy)
        index = 0
        for g, group in enumerate(self.groups):
            policies = from_plain(group["policy"])
            active = next((number[p] for p in policies if isinstance(p, ActiveLR)), -1)
            scalar = next((number[p] for p in policies if isinstance(p, (TrainableLR, Hypergradient))), -1)
            for p in group["params"]:
                state = self._complete(p, group)
                names = declarations.STATE_NAMES[backbone.name]
                if backbone.name == "SGD":
                    names = names if group["momentum"] else ()
                own = {**state, **({"momentum_buffer": self._buffers[p]} if p in self._buffers else {})}
                own["previous"] = own.get("grad_mean_prev", own.get("direction_prev"))
                at = [p, *(own.get(name) for name in names), *[None] * (3 - len(names)), *(own.get(r) for r in ROLES)]
                self.lib.emulation_member(
                    self._plan,
                    (ctypes.c_void_p * len(at))(*(None if t is None else self._address(t) for t in at)),
                    ctypes.c_int64(p.numel() + self.shift),
                    ctypes.c_int64(index),
                    g,
                    active,
                    scalar,
                    DTYPES.index(p.dtype),
                    int("step" in state and state["step"].dtype == torch.float64),
                    int(active >= 0 or scalar >= 0),
                    int(p in self._buffers),
                    ctypes.c_int64(group.get("rounding_seed", 0)),
                )
                index += 1

    def _complete(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        spec = specs(self.optimizer.backbone, group, p.dtype)
        if not spec:
            return {}
        state = self.optimizer.state[p]
        for name, entry in spec.items():
            if name in state:
                continue
            if entry.optional:
                self._buffers[p] = entry.create(p, group)
            else:
                state[name] = entry.create(p, group)
        return state

    def _add_policy(self, policy: Any) -> None:
        kind = [isinstance(policy, c) for c in (ActiveLR, TrainableLR, Hypergradient)].index(True)
        arguments = plans.rule_of(policy)
        self.lib.emulation_policy(self._plan, kind, (ctypes.c_double * len(arguments))(*arguments))


def _structure(backbone: str, group: Mapping[str, Any]) -> str:
    if backbone == "SGD":
        return f"Sgd{'Plain' if group['momentum'] == 0 else 'Nesterov' if group['nesterov'] else 'Momentum'}"
    variant = ("Rectify" if group.get("rectify") else "") + ("Amsgrad" if group.get("amsgrad") else "")
    return f"{backbone}{variant or 'Plain'}"


class Twin:
    """The float64 reference that takes each step from the state of another optimizer."""

    def __init__(self, optimizer: fa.AdaptiveOptimizer, build_twin: Any) -> None:
        self.of = optimizer
        self.originals = [p for group in optimizer.param_groups for p in group["params"]]
        self.params = [p.detach().to(torch.float64, copy=True).requires_grad_() for p in self.originals]
        self.optimizer: fa.AdaptiveOptimizer = build_twin(self.params)

    @torch.no_grad()
    def follow(self) -> None:
        """Copies parameters, gradients and state."""
        for p, q in zip(self.originals, self.params, strict=True):
            q.copy_(p)
            q.grad = None if p.grad is None else p.grad.double()
            state = self.of.state.get(p, {})
            for name, value in state.items():
                own = self.optimizer.state[q]
                dtype = torch.float64 if value.dim() or (p.dim() == 0 and value.dtype == torch.float32) else value.dtype
                if name == "grad_sign_prev":
                    dtype = value.dtype
                if name not in own:
                    own[name] = value.to(dtype, copy=True)
                else:
                    own[name].copy_(value)
