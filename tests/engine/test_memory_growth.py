"""Memory for caches and rebuilt objects does not grow with the number of changes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

import fused_adaptive as fa

from ..common.cases import BACKENDS, parameters, train


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4


@pytest.mark.heavy
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_does_not_grow_in_a_hundred_thousand_steps_with_changes(backend):
    """Changes policies, rates, decay, betas, structure, groups, gradients, and addresses of parameters."""
    params = parameters(torch.float32, [(10,), (4,), (3,), ()])
    optimizer = fa.AdamW(params[:3], policy=fa.ActiveLR(interval=5, high=0.1), backend=backend)
    extra = {"params": params[3:], "lr": 0.01}

    def run(first: int, steps: int) -> None:
        for step in range(first, first + steps):
            (group, *_) = optimizer.param_groups
            number = 1e-9 * step
            group["policy"] = (
                fa.ActiveLR(interval=2 + step % 7, high=0.1 + number, gain_bounds=(0.5, 2.0)),
                fa.TrainableLR(interval=3, c=0.25 + number, gain_bounds=(0.5, 2.0)),
                fa.Hypergradient(1e-12 * number),
                (fa.TrainableLR(interval=2, gain_bounds=(0.5, 2.0 + number)), fa.ActiveLR(interval=3, high=0.0)),
            )[step // 10 % 4]
            group.update(lr=1e-3 + number, weight_decay=step % 3 * number, betas=(0.9 - number, 0.99))
            group["amsgrad"] = step // 50 % 2 == 0
            if step % 20 == 0 and len(optimizer.param_groups) == 1:
                optimizer.add_param_group(dict(extra))
            elif step % 20 == 10 and len(optimizer.param_groups) == 2:
                optimizer.state.pop(optimizer.param_groups.pop()["params"][0], None)
            for i, p in enumerate(params):
                p.grad = None if (step + i) % 5 == 0 else torch.full_like(p, (-1.0) ** step)
            params[step % 3].data = params[step % 3].data.clone()
            optimizer.step()
        gc.collect()

    few = 2500 if backend == "reference" else 10_000
    run(0, few)
    before = resident_kib()
    run(few, 9 * few)
    assert resident_kib() - before < 2000


def test_policies_annealed_by_their_plain_form_are_not_all_kept():
    optimizer = fa.AdamW(parameters(), policy=fa.ActiveLR(interval=2, high=0.1))
    train(optimizer, 1)
    for step in range(20):
        group = optimizer.param_groups[0]
        group["policy"] = {**group["policy"], "high": 0.1 + 1e-3 * step}
        train(optimizer, 1, start=step)
    assert len(optimizer._resolutions._resolved) <= 2
