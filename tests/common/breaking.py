"""Tools of the pitfall tests: replace parts of the library, and record what a step allocates and reads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def broken(target: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replaces one part of the library by a mistake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, replacement)
        yield


def fails(check: Callable[[], bool], *errors: type[Exception]) -> bool:
    """Returns whether a check fails: it is False, an assertion in it fails, or it raises one of ``errors``."""
    try:
        return not check()
    except (AssertionError, *errors):
        return True


class PeakMemory(TorchDispatchMode):
    """Records the peak of the bytes of tensors allocated under this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if (
                isinstance(out, torch.Tensor)
                and not out.is_meta
                and out.untyped_storage()._cdata not in inputs | self.seen
            ):
                self._count(out.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size, key)

    def _free(self, size: int, key: int) -> None:
        self.live -= size
        self.seen.discard(key)


class NoSynchronisation(TorchDispatchMode):
    """Fails if a tensor's value is read on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor's value was read"
        return func(*args, **(kwargs or {}))
