"""FullyShardedDataParallel gathers and flattens optimizer state if all of it has one floating-point dtype."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import fused_adaptive as fa

from ..common.cases import BACKENDS
from . import script

OPTIMIZERS: dict[str, Any] = {
    "signs": lambda params, **a: fa.ActiveAdamW(params, lr=0.01, interval=2, high=0.1, **a),
    "remainders": lambda params, **a: fa.AdamW(params, lr=0.01, master="split", **a),
    "floats": lambda params, **a: fa.AdamW(params, lr=0.01, **a),
}


def _run(rank: int, world: int, directory: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    warnings.simplefilter("ignore")  # FSDP1 warns that it is deprecated
    script.initialize("gloo", rank, world, init_method=f"file://{directory}/rendezvous")
    for name, make in OPTIMIZERS.items():
        for original in (True, False):
            for backend in BACKENDS:
                _saves_and_goes_on(FSDP, name, make, original, backend)
    script.finish()


def _saves_and_goes_on(fsdp: Any, name: str, make: Any, original: bool, backend: str) -> None:
    dtype = torch.bfloat16 if name == "remainders" else torch.float32

    def build() -> tuple[Any, fa.AdaptiveOptimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).to(dtype)
        sharded = fsdp(model, use_orig_params=original, device_id=torch.device("cpu"))
        return sharded, make(sharded.parameters(), backend=backend)

    def train(model: Any, optimizer: Any, start: int, steps: int) -> None:
        for step in range(start, start + steps):
            generator = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(5, 4, generator=generator).to(dtype)).square().mean().backward()
            optimizer.step()

    straight, resumed = build(), build()
    train(*straight, 0, 7)
    train(*resumed, 0, 3)
    saved = fsdp.optim_state_dict(*resumed)
    weights = [p.detach().clone() for p in resumed[0].parameters()]
    model, optimizer = build()
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(fsdp.optim_state_dict_to_load(model, optimizer, saved))
    train(model, optimizer, 3, 4)
    # With use_orig_params=True torch 2.13 confuses moments on the CPU, those of torch.optim.AdamW too.
    for p, q in zip(model.parameters(), straight[0].parameters(), strict=True):
        assert original or torch.equal(p, q), (name, backend)
    kept = {key: value.dtype for state in optimizer.state.values() for key, value in state.items()}
    assert kept.get("grad_sign_prev", torch.int8) == torch.int8
    assert kept.get("master_low", torch.int16) == torch.int16


@pytest.mark.heavy
def test_training_continues_bit_for_bit_after_optim_state_dict(tmp_path: Path):
    mp.spawn(_run, args=(2, str(tmp_path)), nprocs=2)  # pyright: ignore
