"""The backends that run a step, and the selection of one.

A backend is a module with ``name``, ``why_not(devices) -> str``, ``step(…)`` and ``end_interval(…)``, as in
:mod:`fused_adaptive.backends.reference`. It is imported on first use. Its ``step`` checks the gradients before it
modifies anything. A backend with ``supports_masters = True`` supports ``master="split"`` and ``"stochastic"``. If it
defines ``policies``, it has kernels for these policies only.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from ..core import masters
from ..core.warning import warn

if TYPE_CHECKING:
    from ..core.random_rates import RandomRates
    from ..engine.participants import Participants
    from ..policies import Policy

#: All backends, in the order in which "auto" tries them.
NAMES = ("native", "triton", "reference")

#: Devices for which "auto" does not select a backend although it can run there: Triton's interpreter is for tests.
ONLY_ON_REQUEST = {"triton": ("cpu",)}

#: Warnings about backends that "auto" has skipped; each is given once.
_TOLD: set[str] = set()

#: The environment variable that overrides ``backend="auto"``.
ENVIRONMENT_VARIABLE = "FUSED_ADAPTIVE_BACKEND"


class Backend(Protocol):
    """The interface of a backend module."""

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
    """Returns a dict from each backend's name to the reason why it cannot run, or "" if it can.

    Args:
        devices: the devices to run on; default all devices of this machine.
    """
    checked = _devices() if devices is None else [torch.device(d) for d in devices]
    return {name: _load(name).why_not(checked) for name in NAMES}


def select(requested: str, devices: Iterable[torch.device], policies: Iterable[Policy] = ()) -> Backend:
    """Returns the backend for parameters on these devices under these policies.

    Args:
        requested: the name of a backend, or "auto": the one that the environment variable ``FUSED_ADAPTIVE_BACKEND``
            names, else the first that can run. Warns once per process if "auto" skips a backend because it has no
            kernels for a policy, or selects the reference because kernels for the CPU or a GPU are missing.
        devices: the devices of the parameters.
        policies: the policies of the param groups.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the requested backend cannot run here or has no kernels for a policy.
    """
    source = "backend"
    if requested == "auto" and os.environ.get(ENVIRONMENT_VARIABLE, "auto") != "auto":
        requested, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if requested != "auto" and requested not in NAMES:
        raise ValueError(f"unknown {source} {requested!r}: choose 'auto' or one of {', '.join(map(repr, NAMES))}")
    devices, kinds = list(devices), list(dict.fromkeys(map(type, policies)))
    reasons, skipped = {}, ""
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
                skipped = skipped or _missing(devices, reasons)
            _warn_once(skipped, name)
            return backend
        skipped = skipped or f"backend {name!r} cannot run: {reasons[name]}"
    raise RuntimeError("; ".join(f"backend {name!r} cannot run: {reason}" for name, reason in reasons.items()))


def _why_not_policies(backend: Backend, kinds: Iterable[type[Policy]]) -> str:
    known = getattr(backend, "policies", None)
    # A subclass may adapt rates in another way than its base, so it must be in the list itself.
    unknown = [kind.__name__ for kind in kinds if known is not None and kind not in known]
    return f"it has no kernels for {', '.join(unknown)}: use backend='reference'" if unknown else ""


def _missing(devices: Iterable[torch.device], reasons: Mapping[str, str]) -> str:
    """Returns the warning that kernels are missing, with the reasons; "" if no backend has kernels for the devices."""
    kinds = sorted({device.type for device in devices if device.type in ("cpu", "cuda")})
    why = "; ".join(f"backend {name!r} cannot run: {reason}" for name, reason in reasons.items() if reason)
    without = f"the kernels for {' and '.join(kinds)} are missing, and steps take many times as long without"
    return f"{without}: {why}" if kinds and why else ""


def _warn_once(skipped: str, selected: str) -> None:
    if skipped and skipped not in _TOLD:
        _TOLD.add(skipped)
        warn(
            f"{skipped}. The optimizer takes {selected!r}, which is slower; pass backend={selected!r} if that is meant"
        )


def check_masters(backend: Backend, groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises ValueError for a bad ``master``, and RuntimeError for one that the backend does not support."""
    for group in groups:
        masters.check(group)
        master = group.get("master", "none")
        if master != "none" and not getattr(backend, "supports_masters", False):
            raise RuntimeError(
                f"backend {backend.name!r} does not support master={master!r}: use backend='native' or 'reference'"
            )


@functools.cache  # a second import of this package must not replace the backends of the first
def _load(name: str) -> Backend:
    return cast(Backend, import_module(f".{name}", __name__))


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return devices if accelerator is None else [*devices, accelerator]
