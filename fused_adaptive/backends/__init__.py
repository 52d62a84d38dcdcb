"""The backends that can run a step, which one is chosen, and why another cannot be.

A backend is a module with ``name``, ``why_not(devices) -> str``, ``step(…)`` and ``end_interval(…)``, as in
:mod:`fused_adaptive.backends.reference`. It is imported when it is first asked for. Its ``step`` checks the gradients
before it modifies anything. ``supports_masters = True`` says that it knows ``master="split"`` and ``"stochastic"``;
``policies``, where it has that, are the only policies that it has kernels for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from ..core.warning import warn

if TYPE_CHECKING:
    from ..core.random_rates import RandomRates
    from ..engine.participants import Participants
    from ..policies import Policy

#: All backends, in the order in which "auto" tries them.
NAMES = ("native", "triton", "reference")

#: Devices for which "auto" does not take a backend, although it can run there: Triton's interpreter is for tests.
ONLY_ON_REQUEST = {"triton": ("cpu",)}

#: What has been said of backends that "auto" passes over.
_TOLD: set[str] = set()

#: Overrides ``backend="auto"``.
ENVIRONMENT_VARIABLE = "FUSED_ADAPTIVE_BACKEND"


class Backend(Protocol):
    """What a backend module provides."""

    name: str

    def why_not(self, devices: Iterable[torch.device]) -> str: ...

    def step(
        self,
        participants: Participants,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        random_rates: RandomRates | None,
    ) -> None: ...

    def end_interval(self, participants: Participants) -> None: ...


def available(devices: Iterable[torch.device | str] | None = None) -> dict[str, str]:
    """Every backend by name, with "" where it can run and the reason where it cannot.

    Args:
        devices: what it should run on; default all devices of this machine.
    """
    wanted = _devices() if devices is None else [torch.device(d) for d in devices]
    return {name: _load(name).why_not(wanted) for name in NAMES}


def select(requested: str, devices: Iterable[torch.device], policies: Iterable[Policy] = ()) -> Backend:
    """The backend for parameters on these devices under these policies.

    Args:
        requested: a backend's name, or "auto": the first that can run, or what the environment variable
            ``FUSED_ADAPTIVE_BACKEND`` names. Where "auto" passes a backend over because it has no kernels for a
            policy, or takes the reference because kernels for the CPU or a GPU are missing, a warning says so, once a
            process.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the backend that was asked for cannot run here, or has no kernels for a policy.
    """
    source = "backend"
    if requested == "auto" and os.environ.get(ENVIRONMENT_VARIABLE, "auto") != "auto":
        requested, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if requested != "auto" and requested not in NAMES:
        raise ValueError(f"unknown {source} {requested!r}: choose 'auto' or one of {', '.join(map(repr, NAMES))}")
    devices, kinds = list(devices), list(dict.fromkeys(map(type, policies)))
    reasons, passed_over = {}, ""
    for name in NAMES if requested == "auto" else (requested,):
        if requested == "auto" and any(device.type in ONLY_ON_REQUEST.get(name, ()) for device in devices):
            continue
        backend = _load(name)
        reasons[name] = backend.why_not(devices)
        if reasons[name]:
            continue
        reasons[name] = _why_not_policies(backend, kinds)
        if not reasons[name]:
            if requested == "auto" and name == "reference":
                passed_over = passed_over or _missing(devices, reasons)
            _tell_once(passed_over, name)
            return backend
        passed_over = passed_over or f"backend {name!r} cannot run: {reasons[name]}"
    raise RuntimeError("; ".join(f"backend {name!r} cannot run: {reason}" for name, reason in reasons.items()))


def _why_not_policies(backend: Backend, kinds: Iterable[type[Policy]]) -> str:
    known = getattr(backend, "policies", None)
    # A subclass may mean something else by the same arguments.
    unknown = [kind.__name__ for kind in kinds if known is not None and kind not in known]
    return f"it has no kernels for {', '.join(unknown)}: use backend='reference'" if unknown else ""


def _missing(devices: Iterable[torch.device], reasons: Mapping[str, str]) -> str:
    """That there are no kernels, with the reasons; "" where there are none to be had."""
    kinds = sorted({device.type for device in devices if device.type in ("cpu", "cuda")})
    why = "; ".join(f"backend {name!r} cannot run: {reason}" for name, reason in reasons.items() if reason)
    without = f"the kernels for {' and '.join(kinds)} are missing, and steps take many times as long without"
    return f"{without}: {why}" if kinds and why else ""


def _tell_once(passed_over: str, taken: str) -> None:
    if passed_over and passed_over not in _TOLD:
        _TOLD.add(passed_over)
        warn(f"{passed_over}. The optimizer takes {taken!r}, which is slower; pass backend={taken!r} if that is meant")


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
