"""The reference against independently computed float64 trajectories, to 1e-12."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.policies import from_plain

from ..common.cases import BACKENDS

OPTIMIZERS = {"sgd": fa.SGD, "adamw": fa.AdamW, "radam": fa.RAdam, "adabelief": fa.AdaBelief}
POLICIES = {"fixed": fa.FixedLR, "active": fa.ActiveLR, "tlr": fa.TrainableLR, "hypergradient": fa.Hypergradient}
TOLERANCE = 1e-12

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.json"))
TRAJECTORIES = [name for name in NAMES if not name.startswith(("aalr", "aslr"))]


def load(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / f"{name}.json").read_text())


def tensor(values: Any) -> torch.Tensor:
    def floats(v: Any) -> Any:
        return [floats(x) for x in v] if isinstance(v, list) else float(v)  # "NaN" and "Infinity" are strings

    return torch.tensor(floats(values), dtype=torch.float64)


def policy_of(golden: dict[str, Any]) -> Any:
    names, arguments = golden["policy"], golden["policy_args"]
    if isinstance(names, list):
        return tuple(POLICIES[n](**a) for n, a in zip(names, arguments, strict=True))
    return POLICIES[names](**arguments)


def backbone_arguments(golden: dict[str, Any]) -> dict[str, Any]:
    arguments = dict(golden["backbone_args"])
    if "decoupled" in arguments:
        arguments["decoupled_weight_decay"] = arguments.pop("decoupled")
    return arguments


def lr_scales(golden: dict[str, Any]) -> list[float]:
    """Returns lr of each tensor's group, divided by ``lr``; there is one group if all are 1."""
    return golden.get("lr_scales", [1.0] * len(golden["params0"]))


#: The initial lr, and thus the reference rate, of groups whose lr is 0 in every step of the trajectories.
FROZEN_FROM = 1.0


def groups_of(golden: dict[str, Any], params: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Returns one group, or one group per tensor, with the initial rates."""
    if "lr_scales" not in golden:
        return [{"params": params, "lr": golden["lr_ref"]}]
    scales = zip(params, lr_scales(golden), strict=True)
    return [{"params": [p], "lr": golden["lr_ref"] * scale or FROZEN_FROM} for p, scale in scales]


def gains(optimizer: fa.AdaptiveOptimizer, params: list[torch.Tensor]) -> list[torch.Tensor]:
    """Returns one gain per tensor or element, as in the trajectories. A global gain exists before the first step."""
    shared = [state["gain"] for state in optimizer.state.values() if "gain" in state]
    is_global = any(getattr(p, "granularity", "") == "global" for p in from_plain(optimizer.param_groups[0]["policy"]))
    found = []
    for p in params:
        state = optimizer.state.get(p, {})
        gain = state.get("gain", shared[0] if is_global and shared else torch.ones((), dtype=torch.float64))
        found.append((state["element_gain"] if "element_gain" in state else torch.ones_like(p)) * gain)
    return found


def worst_deviation(golden: dict[str, Any], cls: Any, policy: Any, arguments: dict[str, Any], **backend: str) -> float:
    """Returns the largest relative difference from the trajectory, in parameters and gains, over all steps."""
    params = [tensor(p).requires_grad_() for p in golden["params0"]]
    optimizer = cls(groups_of(golden, params), policy=policy, **arguments, **backend)
    scales = lr_scales(golden) if "lr_scales" in golden else [1.0]
    worst = 0.0
    for step, grads in enumerate(golden["grads"]):
        lr = golden["lr"][step] if isinstance(golden["lr"], list) else golden["lr"]
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = lr * scale
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else tensor(grad)
        optimizer.step()
        pairs = list(zip(gains(optimizer, params), golden["gain"][step], strict=True))
        if golden.get("only") != "gain":
            pairs += zip(params, golden["params"][step], strict=True)
        for ours, expected in pairs:
            difference = (ours.detach() - tensor(expected)).abs() / (1 + tensor(expected).abs())
            worst = max(worst, difference.max().item()) if difference.isfinite().all() else math.inf
    return worst


@pytest.mark.feature("golden trajectories in float64")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name, backend):
    golden = load(name)
    cls = OPTIMIZERS[golden["backbone"]]
    deviation = worst_deviation(golden, cls, policy_of(golden), backbone_arguments(golden), backend=backend)
    assert deviation < TOLERANCE


def wrong_variants(golden: dict[str, Any]) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Returns arguments of the trajectory with one thing changed: backbone, policy or decay."""
    cls, policy, arguments = OPTIMIZERS[golden["backbone"]], policy_of(golden), backbone_arguments(golden)
    variants: dict[str, tuple[Any, Any, dict[str, Any]]] = {}
    if golden.get("only") != "gain":
        decay = {**arguments, "weight_decay": arguments.get("weight_decay", 0.0) + 0.05}
        variants["decay"] = (cls, policy, decay)
        if arguments.get("weight_decay"):
            flipped = not arguments.get("decoupled_weight_decay", cls in (fa.AdamW, fa.AdaBelief))
            variants["decoupling"] = (cls, policy, {**arguments, "decoupled_weight_decay": flipped})
        other = fa.RAdam if cls is not fa.RAdam else fa.AdaBelief
        kept = {k: v for k, v in arguments.items() if k in ("weight_decay", "decoupled_weight_decay")}
        if getattr(policy, "source", None) != "displacement" and not (cls is fa.SGD and golden["policy"] == "tlr"):
            variants["backbone"] = (other, policy, kept)
    if golden["policy"] != "fixed":
        variants["policy"] = (cls, fa.FixedLR(), arguments)
    else:
        variants["policy"] = (cls, fa.ActiveLR(interval=4), arguments)
    return variants


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_a_wrong_variant_differs_from_the_trajectory(name):
    golden = load(name)
    for variant, (cls, policy, arguments) in wrong_variants(golden).items():
        assert worst_deviation(golden, cls, policy, arguments) > 1e3 * TOLERANCE, variant


def test_the_trajectories_cover_every_backbone_and_policy():
    goldens = [load(name) for name in TRAJECTORIES]
    assert {g["backbone"] for g in goldens} == set(OPTIMIZERS)
    assert {g["policy"] for g in goldens if isinstance(g["policy"], str)} == set(POLICIES)
    assert len(goldens) == 63
