"""The default sets of cases, which measure every goal within minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .algorithms import BACKBONES
from .rivals import FAMILIES

BASIC = ("ours", "torch", "composition")
FIXED_AND_ACTIVE = ("fixed", "active")


@dataclass(frozen=True)
class Case:
    """One list of shapes and the contenders that are measured on it.

    Args:
        backbone, policies: names of :mod:`bench.step.algorithms`.
        shapes: a name that :func:`bench.step.shapes.parse` accepts.
        dtype: the dtype of the parameters.
        families: the families of contenders.
        part: the number of the run, 1 or 2, that measures the case with ``--part``.
    """

    backbone: str
    policies: Sequence[str]
    shapes: str
    dtype: torch.dtype = torch.float32
    families: Sequence[str] = FAMILIES
    part: int = 1


def default_set(device: str) -> list[Case]:
    """Returns the cases in order of importance, since the last are left out if time runs out."""
    if device == "cuda":
        return _gpu_set()
    every = [
        Case("AdamW", FIXED_AND_ACTIVE, "10x5M"),
        Case("AdamW", FIXED_AND_ACTIVE, "2000x1000", families=tuple(f for f in FAMILIES if f != "authors")),
        Case("AdamW", FIXED_AND_ACTIVE, "resnet50"),
    ]
    for shapes in ("gpt2", "vit-b", "1e8", "1e5", "1e6", "1e7", "10000x64", "1000x1024", "odd", "misaligned"):
        every.append(Case("AdamW", FIXED_AND_ACTIVE, shapes, families=BASIC if "1e" not in shapes else BASIC[:2]))
    every += [Case("AdamW", (policy,), "7b", families=BASIC) for policy in FIXED_AND_ACTIVE]
    return [*every, Case("AdamW", FIXED_AND_ACTIVE, "10x5M", torch.bfloat16, BASIC), *_backbones()]


def _backbones(part: int = 2) -> list[Case]:
    """Returns cases of every backbone and policy at one size."""
    others = {"SGD": ("trainable", "displacement", "hypergradient"), "AdamW": ("trainable", "hypergradient")}
    families = (*BASIC, "optimi", "pytorch_optimizer", "flashoptim")
    cases = []
    for backbone in BACKBONES:
        policies = FIXED_AND_ACTIVE if backbone != "AdamW" else ("fixed",)
        cases.append(Case(backbone, (*policies, *others.get(backbone, ())), "10x5M", families=families, part=part))
    return cases


def _gpu_set() -> list[Case]:
    """Returns the cases for a GPU, the most telling first. Compiled rivals are in one case, of a single tensor."""
    dtypes = (torch.float32, torch.bfloat16)
    eager = tuple(f for f in FAMILIES if f != "compiled")
    first = [Case("AdamW", FIXED_AND_ACTIVE, "10x5M", dtype, eager) for dtype in dtypes]
    first.append(Case("AdamW", FIXED_AND_ACTIVE, "1e8", torch.float32, (*BASIC, "compiled")))
    first.append(Case("AdamW", FIXED_AND_ACTIVE, "1e8", torch.bfloat16, BASIC))
    for shapes in ("gpt2", "resnet50"):
        first += [Case("AdamW", FIXED_AND_ACTIVE, shapes, dtype, BASIC[:2]) for dtype in dtypes]
    first += [Case("AdamW", FIXED_AND_ACTIVE, shapes, families=BASIC[:2]) for shapes in ("2000x1000", "10000x64")]
    sizes = ("vit-b", "odd", "misaligned", "1000x1024", "1e5", "1e6", "1e7")
    rest = [Case("AdamW", FIXED_AND_ACTIVE, shapes, families=BASIC[:2]) for shapes in sizes]
    # 80 GB hold one of our optimizers and torch's fused optimizer, but not two of ours, hence a case for each policy.
    huge = [Case("AdamW", (policy,), "7b", d, BASIC[:2], 2) for d in dtypes for policy in FIXED_AND_ACTIVE]
    huge += [Case("AdamW", FIXED_AND_ACTIVE, "1e9", d, BASIC[:2], 2) for d in dtypes]
    return [*first, *_backbones(part=1), *rest, *huge]


def quick_set() -> list[Case]:
    """Returns two small cases with few contenders, to check that everything works."""
    return [
        Case("AdamW", FIXED_AND_ACTIVE, "10x5e5", families=(*BASIC, "optimi", "pytorch_optimizer")),
        Case("AdamW", FIXED_AND_ACTIVE, "200x1000", families=BASIC),
    ]
