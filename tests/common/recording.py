"""CUDA graphs without a GPU, on both emulated backends: a capture records launches, and a replay runs them.

As on a GPU, a capture runs nothing: what torch's operators write in it is restored at its end. Each replay runs the
operators and kernels again, on the same memory, with the arguments of the capture.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_adaptive import backends
from fused_adaptive.backends import native, plans
from fused_adaptive.engine import reference_rates

#: The emulated native library of this process, and whether Triton is interpreted. The plugins of both set this.
emulated: dict[str, Any] = {"native": None, "triton": False}


class Graph:
    """Like ``torch.cuda.CUDAGraph``; a replay runs the recorded calls."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for call in self._calls:
                call()


class _Recording(TorchDispatchMode):
    """Runs and records torch's operators; records the kernels of the emulated library and does not run them."""

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.calls, self.written = calls, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: the host reads a tensor")
        if func.namespace == "fused_adaptive" and emulated["native"] is not None:
            return self._launch(func, args, kwargs)
        if func._schema.is_mutable:
            own = zip(func._schema.arguments, args, strict=False)
            written = [value for argument, value in own if argument.alias_info and argument.alias_info.is_write]
            self.written += [(t, t.detach().clone()) for t in tree_leaves(written) if isinstance(t, Tensor)]
        out = func(*args, **kwargs)

        def run() -> None:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.calls.append(run)
        return out

    def _launch(self, func: Any, args: Any, kwargs: Any) -> Any:
        library: ctypes.CDLL = emulated["native"]
        library.emulation_capture(1)
        try:
            out = func(*args, **kwargs)
        finally:
            graph = library.emulation_capture(0)
        self.calls.append(lambda: library.emulation_replay(graph))
        return out

    def put_back(self) -> None:
        for tensor, before in reversed(self.written):
            tensor.copy_(before)


@contextmanager
def capture(graph: Any) -> Iterator[None]:
    """Captures the launches in its body: on a GPU if there is one, else on the emulated device."""
    if isinstance(graph, torch.cuda.CUDAGraph):
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            yield
        return
    with ExitStack() as stack, torch.no_grad():
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(plans, "is_capturing", lambda device: True)
        recording = _Recording(graph._calls)
        if emulated["triton"]:
            from triton.runtime.interpreter import InterpretedFunction

            launch = InterpretedFunction.run

            def run(*args: Any, **kwargs: Any) -> None:
                with np.errstate(all="ignore"):  # as in a GPU's arithmetic
                    launch(*args, **kwargs)

            patch.setattr(InterpretedFunction, "run", lambda *a, **k: graph._calls.append(lambda: run(*a, **k)))
        with recording:
            yield
        recording.put_back()


def emulate(patch: pytest.MonkeyPatch) -> None:
    """Treats numbers as if they were on a GPU: the host does not read them."""
    if is_emulated():
        patch.setattr(native, "_is_on_host", lambda found_inf: False)
        patch.setattr(plans, "_lr_on", lambda device, lr: lr if isinstance(lr, Tensor) else None)
        patch.setattr(reference_rates, "is_on_host", lambda rate: False)


def device() -> str:
    """Returns the device of captures."""
    return "cpu" if is_emulated() else "cuda"


def is_emulated() -> bool:
    return emulated["native"] is not None or emulated["triton"]


def graph() -> Any:
    return Graph() if is_emulated() else torch.cuda.CUDAGraph()


def backends_here() -> list[str]:
    """Returns the backends whose steps can be captured in this process."""
    if is_emulated():
        return ["native"] if emulated["native"] is not None else ["triton"]
    return [name for name in ("native", "triton") if not backends.available(["cuda"])[name]]
