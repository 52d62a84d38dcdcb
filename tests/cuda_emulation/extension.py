"""The native library with its CUDA side emulated: runs the code for GPUs, from Python down, on the CPU's memory.

``python -m pytest -p tests.cuda_emulation.extension …`` runs tests on it: the native backend uses the CUDA executor.
"""

from __future__ import annotations

import ctypes
import sysconfig
from pathlib import Path

import torch
from torch.utils import cpp_extension

from fused_adaptive import __version__
from fused_adaptive.backends import native, plans
from fused_adaptive.core import library as native_library

from ..common import recording
from . import build

#: Selects the CUDA executor on the CPU too.
PATCH = (
    "plan/tensors.cpp",
    "plan_.executor = make_cpu_executor(plan_);",
    "plan_.executor = make_cuda_executor(plan_, 0, on_device_);",
)


def flags() -> list[str]:
    """Returns flags to compile and link sources that use torch."""
    includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    own = ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f'-DFUSED_ADAPTIVE_VERSION="{__version__}"', *includes]
    return [*own, *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]


def library() -> Path:
    """Returns the path of the library."""
    texts = build.sources("*/*")
    build.patch(texts, PATCH)
    texts |= {f"emulation/{p.name}": p.read_text() for p in build.HERE.iterdir() if p.suffix in (".h", ".cpp")}
    own = ("bindings/torch_cuda.cpp", "emulation/stubs.cpp", "emulation/entry.cpp")
    for name in (*own, "cpu/kernels_v3.cpp", "cpu/kernels_v4.cpp"):
        del texts[name]
    # The CPU's loops are not tested here: the baseline is enough.
    texts["cpu/kernels.h"] = texts["cpu/kernels.h"].replace("#define FA_X86_LEVELS 1", "")
    return build.cached(texts, flags())


def pytest_configure() -> None:
    torch.ops.load_library(str(library()))
    recording.emulated["native"] = ctypes.CDLL(str(library()))
    assert native_library.why_not() == "", "the library that is loaded is taken for the installed one"
    # Counters are on the device in the same cases as on a GPU.
    native._on_device = lambda view: bool(view.group.get("capturable") or view.group.get("fused"))
    plans._lr_on = lambda device, lr: lr if isinstance(lr, torch.Tensor) else None
