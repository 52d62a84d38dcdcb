"""The contenders of a measurement: our backends, ``torch.optim``, compositions of torch operations, PyPI packages.

Every contender is tried. One that cannot run has a row with the reason in the results.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import fused_adaptive as fa

from .algorithms import BACKBONES, LR, Algorithm
from .compositions import AuthorsActiveAdamW, Composition

#: The most tensors for which contenders are compiled: compile time grows with the number of tensors.
MOST_COMPILED = {"cpu": 200, "cuda": 400}
#: The most tensors for which a GPU is given each tensor's operations one by one: thousands take longer than all rivals.
MOST_ONE_BY_ONE = 400


class Steps(Protocol):
    """The interface that is timed."""

    def step(self) -> Any: ...


class Unavailable(Exception):
    """Raised if a contender cannot run; the message is the reason."""


@dataclass(frozen=True)
class Contender:
    """An implementation of an algorithm's step.

    Args:
        name: the name of the implementation, which identifies a row together with the algorithm.
        family: the group that ``--rivals`` selects.
        algorithm: the algorithm that it computes.
        build: builds it on parameters that have gradients. Raises :class:`Unavailable` or an error of the package.
        extra_bytes: bytes per parameter of temporaries for all parameters, and of state that ours does not need.
        most: the most elements that a step processes; None if it processes all parameters.
    """

    name: str
    family: str
    algorithm: Algorithm
    build: Callable[[Sequence[Tensor]], Steps]
    extra_bytes: int = 0
    most: int | None = None

    def elements(self, numel: int) -> int:
        """Returns the number of elements that a step processes for ``numel`` parameters."""
        return numel if self.most is None else min(numel, self.most)

    def bytes(self, dtype: torch.dtype) -> int:
        """Returns the bytes per parameter that it needs besides gradients, which decides whether it fits in memory."""
        return dtype.itemsize + self.algorithm.state_bytes + self.extra_bytes


FAMILIES = ("ours", "torch", "composition", "compiled", "authors", "optimi", "pytorch_optimizer", "flashoptim", "bnb")


def contenders(
    backbone: str,
    policies: Sequence[str],
    backends: Sequence[str],
    families: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    tensors: int,
) -> list[Contender]:
    """Returns all contenders of one backbone, the most important first, since the last may find no memory left."""
    found: list[Contender] = []
    algorithms = [a for a in (Algorithm(backbone, p) for p in policies) if not a.why_not()]
    fixed = Algorithm(backbone)
    for algorithm in algorithms:
        found += [Contender(f"ours, {b}", "ours", algorithm, _ours(algorithm, b)) for b in backends]
    found += _of_torch(fixed, dtype, device, tensors)
    for algorithm in algorithms:
        if algorithm.policy != "fixed" or not hasattr(torch.optim, backbone):
            found += _compositions(algorithm, device, tensors)
    if Algorithm("AdamW", "active") in algorithms:
        authors = Contender("as the authors wrote it", "authors", Algorithm("AdamW", "active"), AuthorsActiveAdamW, 4)
        found.append(authors)
    found += _of_packages(fixed, device)
    return [c for c in found if c.family in families]


def _ours(algorithm: Algorithm, backend: str) -> Callable[[Sequence[Tensor]], Steps]:
    def build(params: Sequence[Tensor]) -> Steps:
        if backend not in fa.backends.NAMES:
            raise Unavailable(f"there is no backend {backend!r}")
        if reason := fa.backends.available({p.device for p in params})[backend]:
            raise Unavailable(reason)
        return algorithm.build(params, backend)

    return build


# ---- torch.optim ----


def _of_torch(algorithm: Algorithm, dtype: torch.dtype, device: torch.device, tensors: int) -> list[Contender]:
    backbone = algorithm.backbone
    cls = getattr(torch.optim, backbone, None)
    if cls is None:  # torch has no AdaBelief; AdamW reads and writes the same bytes
        cls, algorithm = torch.optim.AdamW, Algorithm("AdamW")
    arguments = {"lr": LR, **(BACKBONES[backbone][1] if backbone == "SGD" else {})}

    def variant(**flags: Any) -> Callable[[Sequence[Tensor]], Steps]:
        def build(params: Sequence[Tensor]) -> Steps:
            if flags.get("fused") and "fused" not in cls.__init__.__code__.co_varnames:
                raise Unavailable(f"torch.optim.{cls.__name__} has no fused form")
            return cls(params, **arguments, **flags)

        return build

    def one_by_one(params: Sequence[Tensor]) -> Steps:
        if device.type == "cuda" and tensors > MOST_ONE_BY_ONE:
            raise Unavailable(
                f"not measured: {tensors} tensors with 8 launches each; up to {MOST_ONE_BY_ONE} are tried"
            )
        return variant(foreach=False)(params)

    def compiled(params: Sequence[Tensor]) -> Steps:
        _refuse_to_compile(device, tensors)
        return Compiled(cls(params, **arguments, foreach=True))

    extra = dtype.itemsize
    return [
        Contender("torch fused", "torch", algorithm, variant(fused=True)),
        Contender("torch foreach", "torch", algorithm, variant(foreach=True), extra),
        Contender("torch.compile of torch's", "compiled", algorithm, compiled, extra),
        Contender("torch for-loop", "torch", algorithm, one_by_one),
    ]


class Compiled:
    """An optimizer whose step is compiled with ``torch.compile``, as torch's documentation recommends."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.state = optimizer.state
        self._step = torch.compile(optimizer.step, fullgraph=False)

    def step(self) -> None:
        self._step()


def _refuse_to_compile(device: torch.device, tensors: int) -> None:
    most = MOST_COMPILED[device.type]
    if tensors > most:
        raise Unavailable(f"not compiled: {tensors} tensors take many minutes; up to {most} are tried")


def _compositions(algorithm: Algorithm, device: torch.device, tensors: int) -> list[Contender]:
    def compiled(params: Sequence[Tensor]) -> Steps:
        _refuse_to_compile(device, tensors)
        return Composition(params, algorithm, compiled=True)

    return [
        Contender("foreach composition", "composition", algorithm, lambda p: Composition(p, algorithm), 16),
        Contender("torch.compile of it", "compiled", algorithm, compiled, 8),
    ]


# ---- packages ----


def _of_packages(algorithm: Algorithm, device: torch.device) -> list[Contender]:
    backbone = algorithm.backbone
    found = []

    def add(name: str, family: str, package: str, builders: dict[str, Callable[..., Steps]], gpu: bool = False) -> None:
        if backbone not in builders:
            return

        def build(params: Sequence[Tensor]) -> Steps:
            if gpu and device.type != "cuda":
                raise Unavailable("runs on GPUs only")
            _need(package)
            return builders[backbone](params)

        found.append(Contender(name, family, algorithm, build))

    def optimi(cls: str, **arguments: Any) -> Callable[..., Steps]:
        return lambda params: getattr(__import__("optimi"), cls)(params, lr=LR, **arguments)

    def kozistr(cls: str, **arguments: Any) -> Callable[..., Steps]:
        return lambda params: getattr(__import__("pytorch_optimizer"), cls)(params, lr=LR, **arguments)

    def flash(cls: str) -> Callable[..., Steps]:
        return lambda params: getattr(__import__("flashoptim"), cls)(params, lr=LR)

    def bitsandbytes(params: Sequence[Tensor]) -> Steps:
        return __import__("bitsandbytes").optim.AdamW(params, lr=LR, optim_bits=32)

    optimi_builders = {"SGD": optimi("SGD", momentum=0.9), "AdamW": optimi("AdamW"), "RAdam": optimi("RAdam")}
    add("torch-optimi", "optimi", "torch-optimi", optimi_builders)
    # pytorch_optimizer's AdamW is torch's class. Its StableAdamW, AdamW with a clipped update, is its own code.
    classes = {"SGD": ("SGDW", {"momentum": 0.9}), "AdamW": ("StableAdamW", {}), "RAdam": ("RAdam", {})}
    cls, arguments = classes.get(backbone, ("AdaBelief", {}))
    name = f"pytorch_optimizer {cls}"
    add(name, "pytorch_optimizer", "pytorch_optimizer", {backbone: kozistr(cls, **arguments)})
    add("flashoptim", "flashoptim", "flashoptim", {"SGD": flash("FlashSGD"), "AdamW": flash("FlashAdamW")}, gpu=True)
    add("bitsandbytes, 32 bit", "bnb", "bitsandbytes", {"AdamW": bitsandbytes}, gpu=True)
    return found


def _need(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"not installed: pip install {package}") from None
