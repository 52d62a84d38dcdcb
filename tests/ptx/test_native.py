"""The CUDA kernels as compiled by nvcc: their PTX, run on the CPU, gives the bits of the CPU kernels.

Every kernel in the PTX runs with both orders of threads, and with three orders of blocks. The tests do not cover ptxas
and the hardware.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_adaptive as fa
from fused_adaptive.core.random_rates import RandomRates

from ..backends.test_null_step import is_right_emulated
from ..common.cases import POLICIES, is_allowed, needs_native
from ..cuda_emulation import build
from ..cuda_emulation.driver import BACKBONES, DTYPES, Emulated, load
from ..cuda_emulation.pairs import FAR, STRUCTURES, parameters, set_gradients
from ..parity.test_parity import SLOWER
from . import nvcc
from .parse import parse

pytestmark = [pytest.mark.skipif(nvcc.why_not() != "", reason=nvcc.why_not()), needs_native]
#: Orders of threads and blocks; see tests/cuda_emulation/emulation.cpp. Three more have the threads reversed.
ORDERS = 3
KERNELS = ("update", "slope", "measure", "adjust", "finish", "upload", "null_pass")
STEPS = 6


def kind_of(entry: str) -> str:
    """Returns the kernel's name from a mangled name."""
    return next(kind for kind in KERNELS if f"{len(kind)}{kind}" in entry)


def launched(library: Path) -> set[str]:
    """Returns the kernels that have run since the last call."""
    lib = load(library)
    lib.ptx_launched.restype = ctypes.c_char_p
    return set(lib.ptx_launched().decode().split())


def differing(
    structure: str,
    policy: Any,
    decoupled: bool,
    dtype: torch.dtype,
    library: Path,
    given: Mapping[str, Any] | None = None,
    spoilt: Tensor | None = None,
    inputs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[str]:
    """Returns values that differ from the CPU's after some steps and an interval end by hand.

    Args:
        given: other arguments of the optimizers.
        spoilt: a number that is put into the gradients of the third step.
        inputs: inputs of the steps apart from gradients; found_inf is set in the third step.
        options: arguments of Emulated.
    """
    cls, arguments = STRUCTURES[structure]
    arguments = {**arguments, **(given or {}), "policy": policy, "decoupled_weight_decay": decoupled}
    params, others = parameters(dtype), parameters(dtype)
    optimizer, native = cls(params, backend="reference", **arguments), cls(others, backend="native", **arguments)
    emulated = Emulated(optimizer, library=library, **options)
    for step in range(STEPS):
        set_gradients(params, step, missing=0.15 * (step > 0))
        if spoilt is not None and step == 2:
            params[4].grad = torch.zeros_like(params[4]).index_fill_(0, torch.tensor([7]), spoilt.item())
        for p, q in zip(params, others, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        if inputs is None:
            emulated.step()
        else:
            found_inf, scale = torch.tensor(float(step == 2)), inputs["grad_scale"]
            random_rates = inputs["random_rates"]
            emulated.step(found_inf, scale, random_rates.table, skips=step == 2)
            native.found_inf, native.grad_scale, native._random_rates = found_inf, scale, random_rates
        native.step()
    emulated.end_interval()
    native.end_interval()
    return [
        f"{name} of {tuple(p.shape)}"
        for p, q in zip(params, others, strict=True)
        for name, value, other in tensors_of(optimizer, p, native, q)
        if not torch.equal(value.nan_to_num(7.0), other.nan_to_num(7.0))
    ]


def tensors_of(
    a: fa.AdaptiveOptimizer, p: Tensor, b: fa.AdaptiveOptimizer, q: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    assert a.state[p].keys() == b.state[q].keys()
    yield "parameter", p.detach(), q.detach()
    for name, value in a.state[p].items():
        yield name, value, b.state[q][name]


def every_order(turn: int) -> list[int]:
    """Returns orders of the blocks, with both orders of the threads."""
    return [turn % ORDERS, turn % ORDERS + ORDERS]


#: One of each family of kernels, except updates and uploads.
SOME = {
    "fixed": [],
    "active": ["adjust"],
    "tlr-gradient-global": ["measure"],
    "tlr-times-active": ["measure", "adjust"],
    "hypergradient-tensor": ["slope"],
}


@pytest.mark.parametrize("policy", SOME)
def test_some_kernels_equal_the_cpu_kernels_bit_for_bit(policy):
    library = nvcc.library(small=True)
    launched(library)
    for order in range(2 * ORDERS):
        found = differing("AdamWPlain", POLICIES[policy], True, torch.float32, library, order=order)
        assert found == [], order
    assert set(map(kind_of, launched(library))) == {"update", "upload", *SOME[policy]}


@pytest.mark.parametrize("order", range(2 * ORDERS))
def test_the_null_step_accesses_every_array(order):
    library = nvcc.library(small=True)
    load(library).emulation_configure(order, 2, 2)
    launched(library)
    text = (build.CSRC / "plan" / "null.h").read_text()
    for written, grads, read in re.findall(r"\bX\((\d), (\d), (\d)\)", text):
        streams = int(written), int(grads), int(read)
        for dtype in (torch.float32, torch.bfloat16):
            assert is_right_emulated(library, streams, dtype, order)
    entries = {name for name in entries_of("null") if kind_of(name) == "null_pass"}
    assert launched(library) == entries


@pytest.mark.parametrize("policy", ["tlr-gradient-global", "tlr-preconditioned-tensor", "hypergradient-global"])
def test_gains_are_adjusted_after_a_sum_over_ranks(policy):
    """There is one rank, so its sums are those of all ranks."""
    library = nvcc.library(small=True)
    for order in range(2 * ORDERS):
        runs = []
        for shares in (False, True):
            params = parameters(torch.float32)
            optimizer = fa.AdamW(params, lr=0.01, policy=POLICIES[policy], backend="reference")
            emulated = Emulated(optimizer, library=library, order=order)
            products = torch.zeros(len(params), 2, dtype=torch.float64)
            if shares:
                emulated.lib.emulation_share(emulated._plan, ctypes.c_void_p(products.data_ptr()))
            launched(library)
            for step in range(STEPS):
                set_gradients(params, step, missing=0.15)
                emulated.step()
            assert ("finish" in map(kind_of, launched(library))) == shares
            runs.append([v for p in params for v in (p.detach(), *optimizer.state[p].values())])
        assert all(map(torch.equal, *runs))
        assert len({optimizer.state[p]["gain"].item() for p in params}) > ("tensor" in policy)


def test_tables_of_any_size_are_uploaded():
    """Tables of many tensors and of many groups are uploaded in large and small pieces."""
    library = nvcc.library(small=True)
    launched(library)
    for groups, tensors in ((1, 600), (40, 3)):
        runs = []
        for backend in ("reference", "native"):
            torch.manual_seed(groups)
            params = [[torch.randn(3).requires_grad_() for _ in range(tensors)] for _ in range(groups)]
            own = [{"params": p, "lr": 0.01 * (i + 1)} for i, p in enumerate(params)]
            optimizer, flat = fa.AdamW(own, backend=backend), [p for ps in params for p in ps]
            for p in flat:
                p.grad = torch.randn(3)
            if backend == "native":
                optimizer.step()
            else:
                Emulated(optimizer, library=library).step()
            runs.append(flat)
        assert all(map(torch.equal, *runs))
    assert len([name for name in launched(library) if kind_of(name) == "upload"]) == 2


@pytest.mark.feature("exact float32 masters of bfloat16 parameters", backend="native-cuda", ptx=True)
@pytest.mark.feature("stochastic rounding of bfloat16 parameters", backend="native-cuda", ptx=True)
@pytest.mark.feature("maximize", backend="native-cuda", ptx=True)
@pytest.mark.heavy
@pytest.mark.parametrize("policy", SOME)
def test_options_of_some_steps_equal_the_cpu_kernels_bit_for_bit(policy):
    """Masters, stochastic rounding, AMP, draws, maximize, and gradients that are NaN or infinite."""
    library, policy = nvcc.library(), POLICIES[policy]
    for order in range(2 * ORDERS):
        options = {"library": library, "order": order}
        for master in ("split", "stochastic"):
            given = {"master": master}
            assert differing("AdamWPlain", policy, True, torch.bfloat16, given=given, **options) == [], (master, order)
        inputs = {"grad_scale": torch.tensor(1024.0), "random_rates": RandomRates(seed=3, relative_width=0.5)}
        given, amp = {"maximize": True, "fused": True}, {**options, "inputs": inputs, "on_device": True}
        assert differing("AdamWPlain", policy, False, torch.float32, given=given, **amp) == [], order
        for spoilt in (torch.nan, torch.inf):
            options["spoilt"] = torch.tensor(spoilt)
            assert differing("AdamWPlain", policy, True, torch.float32, **options) == [], (spoilt, order)


@pytest.mark.heavy
@pytest.mark.parametrize("policy", ["tlr-gradient-eta", "tlr-gradient-global"])
def test_nonfinite_memory_is_reset(policy):
    spoilt = torch.tensor(torch.nan)
    for order in range(2 * ORDERS):
        options = {"library": nvcc.library(), "order": order, "spoilt": spoilt}
        assert differing("SgdMomentum", SLOWER.get(policy, POLICIES[policy]), True, torch.float64, **options) == []


@cache
def entries_of(source: str) -> list[str]:
    """Returns the kernels of a .cu, from the PTX that the library was made from."""
    return nvcc.entries_of(parse(nvcc.ptx_of(source)))


@pytest.mark.heavy
@pytest.mark.feature("end_interval() by hand", backend="native-cuda", ptx=True)
@pytest.mark.feature(
    "every optimizer, policy, decay and dtype within rounding of float64", backend="native-cuda", ptx=True
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("structure", BACKBONES)
def test_every_kernel_equals_the_cpu_kernels_bit_for_bit(structure, dtype):
    library = nvcc.library()
    launched(library)
    cases = [(p, d) for p in POLICIES if is_allowed(structure.upper()[:3], p) for d in (False, True)]
    for turn, (policy, decoupled) in enumerate(cases):
        for order in every_order(turn + turn // 2):
            own = SLOWER.get(policy, POLICIES[policy])
            found = differing(structure, own, decoupled, dtype, library, order=order, on_device=turn % 2 == 1)
            assert found == [], (policy, decoupled, order)
    kinds = Counter(map(kind_of, launched(library)))
    # All modes and decays run in each case, so each case covers other kernels.
    assert kinds == {"update": 8, "slope": 1, "measure": 1, "adjust": 1, "upload": 1}


@pytest.mark.heavy
def test_every_kernel_of_the_ptx_is_tested():
    """A new kernel needs a case in one of the tests above."""
    files = sorted((build.CSRC / "cuda").glob("*.cu"))
    entries = Counter(kind_of(name) for file in files for name in entries_of(file.stem))
    structures, dtypes = len(BACKBONES), len(DTYPES)
    assert entries.pop("null_pass") == len(entries_of("null"))
    assert entries == {
        "update": 8 * structures * dtypes,
        "slope": structures * dtypes,
        "measure": dtypes,
        "adjust": 2,
        "finish": 1,
        "upload": 2,
    }


# ---- mistakes that must be noticed ----

MISTAKES = {
    "none": ([], ""),
    "a missing barrier": (
        [("cuda/device.cuh", "set_up(current);\n      __syncthreads();", "set_up(current);")],
        "",
    ),
    "a wrong alignment": (
        [("cuda/device.cuh", "return x.aligned && reinterpret_cast<uintptr_t>(grad) % 16 == 0;", "return true;")],
        r"misaligned address in `ld\.global\S*\.v4",
    ),
    "an offset of 32 bits": (
        [("cuda/access.cuh", "cuda::load<kOnce>(to, array + first);", "cuda::load<kOnce>(to, array + (int)first);")],
        "illegal memory access",
    ),
}


def far(patches: list[tuple[str, str, str]]) -> Path:
    """Returns a library whose chunks begin FAR elements into their tensors."""
    begin = [
        ("cuda/layout.cpp", "for (int64_t base = 0; base < numel", f"for (int64_t base = {FAR}; base < numel"),
        (
            "cuda/layout.cpp",
            "chunks = chunks_of(plan.members[member].numel)",
            f"chunks = chunks_of(plan.members[member].numel - {FAR})",
        ),
    ]
    return nvcc.library([*begin, *patches], small=True)


@pytest.mark.feature("a tensor of more than 2³¹ elements", backend="native-cuda", ptx=True)
@pytest.mark.heavy
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_noticed(mistake):
    """All addresses are FAR elements below the memory, and the chunks begin at FAR."""
    patches, expected = MISTAKES[mistake]
    found = []
    for order in range(2 * ORDERS):
        try:
            options = {"library": far(patches), "shift": FAR, "order": order}
            found += differing("AdamWPlain", POLICIES["active"], True, torch.float32, **options)
        except RuntimeError as error:
            found.append(str(error))
    if mistake == "none":
        assert found == []
    else:
        assert any(re.search(expected, text) for text in found)
