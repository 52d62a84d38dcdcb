"""The backends that can run a step, which one is chosen, and why another cannot be.

A backend is a module with ``name``, ``why_not(devices) -> str``, ``step(…)`` and ``end_interval(…)``, as in
:mod:`fused_adaptive.backends.reference`. It is imported when it is first asked for. Its ``step`` checks the gradients
before it modifies anything. ``supports_masters = True`` says that it knows ``master="split"`` and ``"stochastic"``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..controllers.draws import RateDraw
    from ..gather import Gathered

#: All backends, in the order in which "auto" tries them.
NAMES = ("native", "triton", "reference")

#: Devices for which "auto" does not take a backend, although it can run there: Triton's interpreter is for tests.
ONLY_ON_REQUEST = {"triton": ("cpu",)}

#: Overrides ``backend="auto"``.
ENVIRONMENT_VARIABLE = "FUSED_ADAPTIVE_BACKEND"


class Backend(Protocol):
    """What a backend module provides."""

    name: str

    def why_not(self, devices: Iterable[torch.device]) -> str: ...

    def step(
        self, gathered: Gathered, found_inf: Tensor | None, grad_scale: Tensor | None, draw: RateDraw | None
    ) -> None: ...

    def end_interval(self, gathered: Gathered) -> None: ...


def available(devices: Iterable[torch.device | str] | None = None) -> dict[str, str]:
    """Every backend by name, with "" where it can run and the reason where it cannot.

    Args:
        devices: what it should run on; default all devices of this machine.
    """
    wanted = _devices() if devices is None else [torch.device(d) for d in devices]
    return {name: _load(name).why_not(wanted) for name in NAMES}


def select(requested: str, devices: Iterable[torch.device]) -> Backend:
    """The backend for parameters on these devices.

    Args:
        requested: a backend's name, or "auto": the first that can run, or what the environment variable
            ``FUSED_ADAPTIVE_BACKEND`` names.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the backend that was asked for cannot run here.
    """
    source = "backend"
    if requested == "auto" and os.environ.get(ENVIRONMENT_VARIABLE, "auto") != "auto":
        requested, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if requested != "auto" and requested not in NAMES:
        raise ValueError(f"unknown {source} {requested!r}: choose 'auto' or one of {', '.join(map(repr, NAMES))}")
    devices = list(devices)
    reasons = {}
    for name in NAMES if requested == "auto" else (requested,):
        if requested == "auto" and any(device.type in ONLY_ON_REQUEST.get(name, ()) for device in devices):
            continue
        backend = _load(name)
        reasons[name] = backend.why_not(devices)
        if not reasons[name]:
            return backend
    raise RuntimeError("; ".join(f"backend {name!r} cannot run: {reason}" for name, reason in reasons.items()))


def check_masters(backend: Backend, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises RuntimeError where a group asks for a ``master`` and the backend has none."""
    asked = next((master for g in groups if (master := g.get("master", "none")) != "none"), None)
    if asked is not None and not getattr(backend, "supports_masters", False):
        raise RuntimeError(
            f"backend {backend.name!r} does not support master={asked!r}: use backend='native' or 'reference'"
        )


def _load(name: str) -> Backend:
    return cast(Backend, import_module(f".{name}", __name__))


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return devices if accelerator is None else [*devices, accelerator]
