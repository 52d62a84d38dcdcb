"""The Triton backend on the CPU as on a GPU: Triton's own JIT, with a driver that runs the compiled PTX.

``python -m pytest -p tests.ptx.triton_driver …`` runs any test with a backend on it. It needs a separate process: the
driver cannot be removed, and Triton must not be set to interpret.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_adaptive.backends import triton as backend
from fused_adaptive.backends.triton import launch, plan, sizes

from . import load

WARP_SIZE = 32
TARGET = GPUTarget("cuda", 90, WARP_SIZE)
ARGUMENTS: dict[str, Callable[[Any], Any]] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}

#: Launched kernels: names and compile-time arguments.
launched: set[tuple[str, frozenset[tuple[str, str]]]] = set()


def change(name: str, ptx: str) -> str:
    """Returns the PTX to run for a kernel. Tests replace this to insert mistakes."""
    return ptx


def plain(value: Any) -> str:
    """Returns a compile-time argument as text; functions are named."""
    return str(getattr(value, "__name__", value))


class Utils:
    """Accepts PTX instead of machine code."""

    def __init__(self) -> None:
        self.ptx = ""
        knobs.runtime.kernel_load_start_hook.add(self.remember)

    def remember(self, module: Any, function: Any, name: str, files: dict[str, str], key: str) -> None:
        self.ptx = Path(files[f"{name}.ptx"]).read_text()

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        registers, spills, threads = 0, 0, 1024
        return object(), (name, self.ptx), registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Launcher:
    """Calls a kernel with Python's arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())
        constants = {(source.fn.arg_names[i], plain(value)) for (i,), value in source.constants.items()}
        self.variant = source.fn.__name__, frozenset(constants)
        self.threads, self.shared = metadata.num_warps * WARP_SIZE, metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        assert (y, z) == (1, 1)
        launched.add(self.variant)
        arguments = rest[-len(self.types) :]  # after the metadata and hooks
        given = [self.argument(t, a) for t, a in zip(self.types, arguments, strict=True) if t != "constexpr"]
        # Further parameters are scratch memory, which our kernels do not use.
        load.launch(function[0], change(*function), x, self.threads, self.shared, given)

    @staticmethod
    def argument(kind: str, value: Any) -> Any:
        return ctypes.c_uint64(value.data_ptr()) if kind.startswith("*") else ARGUMENTS[kind](value)


class Driver:
    """The part of a driver that Triton's JIT needs."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = Utils(), Launcher
        self.get_current_device = self.get_current_stream = lambda *_: 0
        self.get_current_target = lambda: TARGET


def pytest_configure() -> None:
    assert not backend.is_interpreted(), "Triton compiles here"
    driver.set_active(Driver())
    # Code around the kernels uses the CPU as the device, as with the interpreter. Sizes are those for a GPU.
    for module in (backend, launch, plan):
        vars(module)["is_interpreted"] = lambda: True
    plan.sizes_of = lambda dtype, device: sizes.sizes_for(dtype, WARP_SIZE, is_cuda=True)
