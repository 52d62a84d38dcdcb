"""Loads translated kernels as separate libraries that share one runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from ..cuda_emulation import build as emulation
from .compile import HERE, cached, compiled, digest, headers, locked, translated
from .parse import parse
from .translate import translate


@cache
def runtime() -> ctypes.CDLL:
    """Returns the runtime that all kernels share."""
    sources = [HERE / "runtime.cpp", emulation.HERE / "emulation.cpp"]
    key = [digest(headers() | {p.name: p.read_text() for p in sources})]
    with locked("runtime"):
        path = cached("runtime", ".so", key, lambda to: compiled(sources, to, "-O1", "-shared"))
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.ptx_launch.restype = ctypes.c_char_p
    return library


@cache
def kernel(name: str, ptx: str) -> tuple[str, int]:
    """Loads a kernel; returns its name in the runtime, and the number of its parameters."""
    module = parse(ptx)
    own = f"{name}-{digest({name: ptx})}"
    code = translate(module, [name], {name: own})
    runtime()
    with locked(own[-1]):
        ctypes.CDLL(str(translated(code, "kernel", ".so", "-shared")))
    return own, len(module.functions[name].parameters)


def take_turns(order: int) -> None:
    """Sets the order of threads and blocks; see tests/cuda_emulation/emulation.cpp."""
    runtime().emulation_configure(order, 2, 2)


def launch(name: str, ptx: str, blocks: int, threads: int, shared: int, arguments: Sequence[Any]) -> None:
    """Runs a kernel from PTX with numbers of ctypes; missing parameters are 0.

    Raises:
        RuntimeError: for an error in a thread.
    """
    own, count = kernel(name, ptx)
    given = [*arguments, *[ctypes.c_uint64(0)] * (count - len(arguments))]
    pointers = (ctypes.c_void_p * count)(*map(ctypes.addressof, given))
    error = runtime().ptx_launch(own.encode(), blocks, threads, shared, pointers)
    if error:
        raise RuntimeError(error.decode())
