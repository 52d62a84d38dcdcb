"""Finds races in interpreted Triton kernels: two threads access one address without order, and one of them writes.

Threads of a program are ordered only by barriers, and programs of a launch are not ordered. Within a program, between
two barriers, no lane may access what another lane writes. Within a launch, no program may access what another writes.
A number that is not a block is read by every thread, and stored by one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

#: A lane number that stands for all threads.
EVERY = -1


class Races:
    """Races that were found, and the accesses of the current kernel."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._kernel, self._program = "", (-1, -1, -1)
        self._phase: list[np.ndarray] = []  # since the last barrier: rows of address, lane, whether it writes
        self._launch: list[np.ndarray] = []  # of all programs: address, program, whether it writes

    def begin(self, kernel: str) -> None:
        self._kernel, self._program = kernel, (-1, -1, -1)

    def end(self) -> None:
        self.barrier()
        self._check(self._launch, "programs share")
        self._launch = []

    def barrier(self) -> None:
        self._check(self._phase, "threads of a program share")
        self._phase = []

    def access(self, program: Any, addresses: np.ndarray, mask: np.ndarray, writes: bool) -> None:
        if program != self._program:
            self.barrier()
            self._program = program
        mask = np.broadcast_to(mask, addresses.shape).reshape(-1)
        lanes = np.arange(mask.size) if mask.size > 1 or writes else np.full(1, EVERY)
        own = addresses.reshape(-1).astype(np.int64)[mask]
        self._phase.append(np.stack([own, lanes[mask], np.full(own.size, writes)]))
        self._launch.append(np.stack([own, np.full(own.size, hash(program)), np.full(own.size, writes)]))

    def _check(self, accesses: list[np.ndarray], what: str) -> None:
        """Notes addresses that one lane or program writes and another reads or writes."""
        if not accesses:
            return
        addresses, who, writes = np.concatenate(accesses, axis=1)
        order = np.lexsort((who, addresses))
        addresses, who, writes = addresses[order], who[order], writes[order]
        begins = np.flatnonzero(np.diff(addresses, prepend=addresses[:1] - 1))
        if begins.size:
            written = np.maximum.reduceat(writes, begins) > 0
            shared = np.minimum.reduceat(who, begins) != np.maximum.reduceat(who, begins)
            if count := int((written & shared).sum()):
                self.found.append(f"{self._kernel}: {what} {count} addresses, and one writes them")


@contextmanager
def watched() -> Iterator[Races]:
    """Watches all kernels that are launched in its body."""
    races, builder = Races(), interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    run = interpreter.InterpretedFunction.run

    def watched_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        races.access(self.grid_idx, ptrs.data, mask.data, writes=False)
        return load(self, ptrs, mask, *others)

    def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *others: Any) -> Any:
        races.access(self.grid_idx, ptrs.data, mask.data, writes=True)
        return store(self, ptrs, value, mask, *others)

    def watched_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        races.begin(self.__name__)
        try:
            return run(self, *args, **kwargs)
        finally:
            races.end()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", watched_load)
        patch.setattr(builder, "create_masked_store", watched_store)
        patch.setattr(builder, "create_barrier", lambda self: races.barrier())
        patch.setattr(interpreter.InterpretedFunction, "run", watched_run)
        yield races
