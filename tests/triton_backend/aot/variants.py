"""Every kernel of the Triton backend as it is compiled on a GPU, compiled ahead of time, and what came of it.

``python -m tests.triton_backend.aot.variants sm_90 1 build/triton_machine_code`` writes one JSON. A process of its own:
Triton's compiler does not run in one that interprets.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
#: name → (backend, architecture, threads of a warp)
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Variant:
    """``signature``: types of the run-time arguments, by name, in order. ``constants``: the compile-time ones."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def variants(warp_size: int, is_cuda: bool) -> Iterator[Variant]:
    """All that ``launch.py`` can ask for."""
    import torch

    from fused_adaptive.backends.triton import kernels, prepare, reduce
    from fused_adaptive.backends.triton.sizes import THREADS, lanes_options, options, sizes_for
    from fused_adaptive.backends.triton.tables import SOURCES, STORED, STRUCTURES, Kind

    tables = {"chunks": "*i64", "tensors": "*i64", "scalars": "*fp64", "flags": "*i32"}
    lanes = lanes_options(is_cuda, warp_size)
    gradients, partials = {"grads": "*i64"}, {"partials": "*fp64"}
    by_update = {s.update.__name__: s for s in STRUCTURES.values()}  # the others differ in scalars alone
    directions = {s.direction.__name__: s for s in STRUCTURES.values() if s.direction is not None}
    for dtype, (stored, computed) in STORED.items():
        sizes, short = sizes_for(dtype, warp_size, is_cuda), str(dtype).removeprefix("torch.")
        for update, structure in by_update.items():
            modes = [(adds, scales, False) for adds in (False, True) for scales in (False, True)]
            for adds, scales, stores in modes + [(False, False, True)] * (structure.direction is None):
                for coupled in (False, True):
                    kind = Kind(structure, adds, scales, stores, coupled, dtype)
                    mode = f"{'+mean' * adds}{'+gain' * scales}{'+direction' * stores}{'+coupled' * coupled}"
                    constants = {**kind.constants(), "BLOCK": sizes.block, "TAIL": sizes.tail}
                    own = options(sizes, kind.arrays)
                    yield Variant(f"update {short} {update}{mode}", kernels.update, tables | gradients, constants, own)
        own_lanes = lanes_options(is_cuda, warp_size, dtype.itemsize)
        for source, number in SOURCES.items():
            constants = {"SOURCE_OF": number.value, "STORED": stored, "TYPE": computed}
            signature = tables | gradients | partials
            yield Variant(f"measure {short} {source}", reduce.measure, signature, constants, own_lanes)
        for direction, structure in [("stored", None), *directions.items()]:
            functions = {"DIRECTION": structure and structure.direction, "STATES": structure.states if structure else 0}
            constants = {**functions, "STORED": stored, "TYPE": computed}
            yield Variant(
                f"slope {short} {direction}", reduce.slope, tables | gradients | partials, constants, own_lanes
            )
        if dtype in (torch.float32, torch.float64):
            constants = {"TYPE": computed, "BLOCK": sizes.tail}
            yield Variant(f"end_active {short}", kernels.end_active, tables, constants, options(sizes))
    for now, draws in ((False, False), (False, True), (True, False)):
        signature = {
            "tensors": "*i64",
            "tensor_count": "i32",
            "grads": "*i64",
            "hypers": "*fp64",
            "rules": "*fp64",
            "random_rates": "*i64",
            "grad_scale": "*fp32",
            "found_inf": "*fp32",
            "scalars": "*fp64",
            "flags": "*i32",
        }
        constants = {"RANDOM_RATES": draws, "NOW": now, "BLOCK": THREADS}
        yield Variant(f"prepare{' now' * now}{' draws' * draws}", prepare.prepare, signature, constants, lanes)
    signature = {
        "tensors": "*i64",
        "scalars": "*fp64",
        "flags": "*i32",
        "rule": "*fp64",
        "partials": "*fp64",
        "groups": "*i64",
        "group_count": "i32",
        "group_sums": "*fp64",
        "shares": "*i64",
        "share_count": "i32",
        "outcomes": "*fp64",
    }
    yield Variant("finish", reduce.finish, signature, {"BLOCK": THREADS}, lanes)


def compiled(variant: Variant, target: str) -> dict[str, Any]:
    """Registers, spills and the widths of memory accesses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = variant.signature | dict.fromkeys(variant.constants, "constexpr")
    source = ASTSource(variant.kernel, signature, variant.constants)
    options = dict(variant.options)
    code = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options).asm
    if target.startswith("gfx"):
        return amd_figures(code["amdgcn"])
    return nvidia_figures(code["ptx"], code["cubin"])


def nvidia_figures(ptx: str, cubin: bytes) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    registers, stack, local = map(int, re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)[0])
    wide = r"\.global[\w.:]*\.(?:v4\.b32|v2\.b64)"
    return {
        "registers": registers,
        "spills": stack + local,
        "wide_loads": len(re.findall("ld" + wide, ptx)),
        "wide_stores": len(re.findall("st" + wide, ptx)),
        "contracted": len(re.findall(r"\bfma\.", ptx)),
        "approximate": len(re.findall(r"\b(?:div|sqrt|rcp)\.(?:full|approx)|\.ftz", ptx)),
        "barriers": len(re.findall(r"\bbar\.sync|\bbarrier\.sync", ptx)),
    }


def amd_figures(assembly: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "wide_loads": len(re.findall(r"\b(?:global|flat|buffer)_load_dwordx4", assembly)),
        "wide_stores": len(re.findall(r"\b(?:global|flat|buffer)_store_dwordx4", assembly)),
    }


def digest() -> str:
    """Of all that the results depend on."""
    import triton

    folder = ROOT / "fused_adaptive" / "backends" / "triton"
    texts = [path.read_text() for path in (*sorted(folder.glob("*.py")), Path(__file__))]
    return hashlib.sha256("\0".join([triton.__version__, *texts]).encode()).hexdigest()[:16]


def main(target: str, every: str, folder: str) -> None:
    """Compiles all kernels, or each ``every``-th update and some of the others; prints the path of the results."""
    backend, _, warp_size = TARGETS[target]
    file = Path(folder, f"{target}-{every}-{digest()}.json")
    if not file.exists():
        updates, others = [], []
        for variant in variants(warp_size, backend == "cuda"):
            (updates if variant.name.startswith("update") else others).append(variant)
        wanted = updates[:: int(every)] + others[:: max(1, int(every) // 8)]
        found = {v.name: compiled(v, target) for v in wanted}
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found, indent=1))
        partial.replace(file)
    print(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
