"""Times contenders side by side: they take turns, step by step, in one process, each with its own tensors."""

from __future__ import annotations

import gc
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..machine import available_memory, cache_bytes
from .algorithms import INTERVAL
from .ceilings import bandwidth_bytes
from .profiling import count_launches, placement_of_threads, state_bytes, update_clock
from .rivals import Contender, Steps, Unavailable
from .shapes import ShapeList

#: With more tensors than this, the host's time dominates, and whether data is in a cache makes no difference.
MOST_TENSORS_COLD = 1000
#: The most sets of tensors that take turns so that none is in a cache. If more are needed, the host's time dominates.
MOST_COPIES = 100
WARM_UP = 20
#: Fewer samples than this with threads in one placement are left out, if most are in another.
LEAST_OF_PLACEMENT = 3


@dataclass(frozen=True)
class Sampling:
    """How much is measured of one case.

    Args:
        samples: the most samples of each contender.
        least: the fewest samples of a slow contender, even if they exceed its share of ``seconds``.
        least_of_main: the same for our optimizers, torch's fused optimizer and the ceilings, which ratios are made of.
        seconds: the time for samples, shared by the contenders.
        profile: whether the launches of a step are counted.
    """

    samples: int = 100
    least: int = 5
    least_of_main: int = 30
    seconds: float = 20.0
    profile: bool = True


@dataclass
class Entry:
    """A contender with its tensors and samples.

    ``replicas`` take turns step by step, each with its own tensors: one replica, or enough of them that each evicts
    the others' tensors from the caches.
    """

    contender: Contender
    numel: int
    dtype: torch.dtype
    device: torch.device
    params: list[list[Tensor]] = field(default_factory=list)
    replicas: list[Steps] = field(default_factory=list)
    why_not: str = ""
    warm_up: float = 0.0
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)  # of each sample, see placement_of_threads()
    launches: int | None = None
    state: float | None = None

    @property
    def needs_grads(self) -> bool:
        return self.contender.family != "ceiling"

    def set_up(self, originals: Sequence[Tensor], copies: int, grads: Sequence[Sequence[Tensor]]) -> None:
        """Builds the contender on copies of these parameters. An error becomes the reason why it does not run."""
        try:
            for _ in range(copies):
                params = [like(t).requires_grad_() for t in originals] if self.needs_grads else list(originals)
                self.params.append(params)
                self.give(grads)
                self.replicas.append(self.contender.build(params))
        except Exception as error:
            self.drop(error)

    def drop(self, error: Exception | str) -> None:
        """Excludes the contender and records why."""
        if isinstance(error, (str, Unavailable)):
            self.why_not = str(error)
        elif isinstance(error, torch.OutOfMemoryError):
            self.why_not = "not enough memory"
        else:
            first = (str(error).strip() or "no message").splitlines()[0]
            self.why_not = f"{type(error).__name__}: {first[:200]}"
        self.params, self.replicas = [], []

    def give(self, grads: Sequence[Sequence[Tensor]]) -> None:
        """Sets the gradients of every replica to tensors other than those of its last step."""
        if not self.needs_grads:
            return
        for i, params in enumerate(self.params):
            chosen = grads[(self.steps + i) % len(grads)]
            for p, g in zip(params, chosen, strict=True):
                p.grad = g

    def step(self, grads: Sequence[Sequence[Tensor]]) -> None:
        """Performs a step that is not timed."""
        i = self.steps % len(self.replicas)
        self._set_grads(i, grads)
        self.replicas[i].step()
        self.steps += 1

    def _set_grads(self, i: int, grads: Sequence[Sequence[Tensor]]) -> None:
        if self.needs_grads:
            for p, g in zip(self.params[i], grads[self.steps % len(grads)], strict=True):
                p.grad = g

    def warm(self, grads: Sequence[Sequence[Tensor]], limit: float) -> None:
        """Warms up with at least one interval end and two steps per replica, and up to 20 steps within ``limit``."""
        begin = time.perf_counter()
        least = max(INTERVAL + 1 if self.contender.algorithm.policy != "fixed" else 3, 2 * len(self.replicas))
        if not self.needs_grads:
            least = 2 * len(self.replicas)
        try:
            while self.steps < max(WARM_UP, least) and (self.steps < least or time.perf_counter() - begin < limit):
                self.step(grads)
            synchronize(self.device)
        except Exception as error:
            self.drop(error)
        self.warm_up = time.perf_counter() - begin

    def turn(self, grads: Sequence[Sequence[Tensor]], keep_warm: bool) -> None:
        """Takes one sample."""
        for _ in range(2 * keep_warm):  # brings both sets of gradients into the caches
            self.step(grads)
        if self.device.type == "cuda":
            self._time_device(grads)
            for _ in range(2 * keep_warm):
                self.step(grads)
        i = self.steps % len(self.replicas)
        self._set_grads(i, grads)
        replica = self.replicas[i]
        synchronize(self.device)
        in_updates = update_clock.seconds
        begin = time.perf_counter()
        replica.step()
        returned = time.perf_counter()
        in_updates = update_clock.seconds - in_updates
        synchronize(self.device)
        end = time.perf_counter()
        self.steps += 1
        if self.device.type == "cuda":
            self.host.append(returned - begin)
            self.wall.append(end - begin)
        else:
            self.seconds.append(end - begin)
            if in_updates > 0:
                self.host.append(end - begin - in_updates)
        self.threads.append(placement_of_threads() if self.device.type == "cpu" else "")

    def _time_device(self, grads: Sequence[Sequence[Tensor]]) -> None:
        i = self.steps % len(self.replicas)
        self._set_grads(i, grads)
        self.seconds.append(device_seconds(self.replicas[i].step, 1.5 * self.host[-1] if self.host else 0.002))
        self.steps += 1

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row for each placement of the threads, the most frequent first; one row if there are no samples."""
        counts = Counter(self.threads).most_common() or [("", 0)]
        kept = [threads for threads, count in counts if count >= LEAST_OF_PLACEMENT or threads == counts[0][0]]
        return [self._row(threads) for threads in kept]

    def _row(self, threads: str) -> dict[str, Any]:
        c = self.contender

        def of(samples: list[float]) -> list[float]:  # none, or one a turn
            return [rounded(s) for s, at in zip(samples, self.threads, strict=bool(samples)) if at == threads]

        bandwidth = c.name in ("copy", "triad")
        return {
            "threads": threads,
            "name": c.name,
            "family": c.family,
            "policy": "" if bandwidth else c.algorithm.policy,
            "algorithm": "" if bandwidth else str(c.algorithm),
            "why_not": self.why_not,
            "bytes": bandwidth_bytes(c.name, self.device)
            if bandwidth
            else bytes_of(c, self.dtype, self.state) * c.elements(self.numel),
            "numel": 0 if bandwidth else c.elements(self.numel),
            "warm_up": round(self.warm_up, 3),
            "launches": self.launches,
            "state_bytes": self.state,
            "seconds": of(self.seconds),
            "wall": of(self.wall),
            "host": of(self.host),
        }


def bytes_of(contender: Contender, dtype: torch.dtype, state: float | None) -> int:
    """Returns the bytes per parameter that a step has to move.

    torch's optimizers and torch-optimi keep their state in the parameters' dtype, so they move fewer bytes than ours if
    that is a 16-bit one.

    Args:
        state: the measured bytes of state per parameter; None if they were not measured.
    """
    if contender.family in ("torch", "compiled", "optimi") and contender.algorithm.policy == "fixed" and state:
        return 3 * dtype.itemsize + 2 * round(state)
    return contender.algorithm.streams.bytes(dtype)


def device_seconds(launch: Callable[[], Any], ahead: float = 0.002) -> float:
    """Returns the device time of ``launch`` in seconds, without waiting for the host.

    The stream is kept busy until the host has launched all kernels.

    Args:
        launch: the function to time; called once.
        ahead: the host's time for it, in seconds, for which the stream is kept busy; at most 0.05.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((min(0.05, ahead) + 1e-4) * 2e9))  # in cycles; the clock has at most 2 GHz
    begin.record()
    launch()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def run_case(
    contenders: Sequence[Contender],
    shapes: ShapeList,
    dtype: torch.dtype,
    device: torch.device,
    sampling: Sampling,
    say: Callable[[str], None] = lambda _: None,
    caches: bool = True,
) -> list[dict[str, Any]]:
    """Measures all contenders on one list of shapes.

    Args:
        caches: whether shapes that fit into a cache are measured both cold and warm.

    Returns:
        A dict for each of ``contenders``, each state of the caches and each placement of the threads, see
        ``docs/benchmarks.md``.
    """
    working_set = shapes.numel * max(c.algorithm.streams.bytes(dtype) for c in contenders)
    threshold = 500e6 if device.type == "cuda" else 3 * cache_bytes(device)
    if working_set >= threshold or len(shapes.shapes) > MOST_TENSORS_COLD or not caches:
        states = {"large" if working_set >= threshold else "as it comes": 1}
    else:
        smallest = shapes.numel * min(c.algorithm.streams.bytes(dtype) for c in contenders)
        copies = math.ceil(3 * cache_bytes(device) / smallest) + 1
        states = {"cold": copies, "warm": 1} if copies <= MOST_COPIES else {"as it comes": 1}
    rows = []
    for cache, copies in states.items():
        found = _run(contenders, shapes, dtype, device, sampling, copies, cache == "warm", say)
        rows += [{"cache": cache, **row} for row in found]
    return rows


def _run(
    contenders: Sequence[Contender],
    shapes: ShapeList,
    dtype: torch.dtype,
    device: torch.device,
    sampling: Sampling,
    copies: int,
    keep_warm: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    left = 0.9 * available_memory(device)
    element = shapes.numel * dtype.itemsize
    sets = max(copies, 2) if max(copies, 2) * element < 0.15 * left else 1
    entries = [Entry(c, shapes.numel, dtype, device) for c in contenders]
    left -= sets * element
    grads = [shapes.tensors(device, dtype) for _ in range(sets)] if left > 0 else []
    for entry in entries:
        replicas = 1 if entry.contender.name in ("copy", "triad") else copies
        needed = entry.contender.bytes(dtype) * entry.contender.elements(shapes.numel) * replicas
        if entry.contender.name in ("copy", "triad"):
            needed = bandwidth_bytes(entry.contender.name, device)
        if needed > left:
            entry.drop(f"not enough memory: needs {needed / 1e9:.1f} GB, {max(left, 0) / 1e9:.1f} GB are left")
        elif replicas > 1 and "compile" in entry.contender.name:
            entry.drop(f"not measured cold: each of {replicas} sets of tensors would be compiled anew")
        if entry.why_not:
            say(f"{entry.contender.name}: {entry.why_not}")
            continue
        entry.set_up(grads[0], replicas, grads)
        left -= needed if not entry.why_not else 0
        if not entry.why_not:
            entry.warm(grads, sampling.seconds / 10)
        say(f"{entry.contender.name}: {entry.why_not or f'warmed up in {entry.warm_up:.1f} s'}")
    running = [e for e in entries if not e.why_not]
    _take_turns(running, grads, sampling, keep_warm)
    for entry in running:
        _profile(entry, grads, sampling)
    rows = [row for entry in entries for row in entry.rows()]
    del entries, running, grads
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _take_turns(running: list[Entry], grads: Sequence[Sequence[Tensor]], sampling: Sampling, keep_warm: bool) -> None:
    """Samples the contenders in rounds. A slow contender takes part in fewer rounds, spread over all of them.

    Each round has another order, since a slow contender leaves cold caches and idle threads to the next one.
    """
    sample_counts = {}
    for entry in running:
        begin = time.perf_counter()
        entry.step(grads)
        synchronize(entry.device)
        cost = (time.perf_counter() - begin) * (2 + 4 * keep_warm if entry.device.type == "cuda" else 1 + 2 * keep_warm)
        share = sampling.seconds / len(running)
        is_main = entry.contender.family in ("ours", "ceiling") or entry.contender.name == "torch fused"
        least = sampling.least_of_main if is_main else sampling.least
        sample_counts[id(entry)] = min(sampling.samples, max(least, int(share / max(cost, 1e-9))))
    rounds = max(sample_counts.values(), default=0)
    turns = {id(e): {i * rounds // sample_counts[id(e)] for i in range(sample_counts[id(e)])} for e in running}
    generator = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            taking_part = [entry for entry in running if r in turns[id(entry)]]
            generator.shuffle(taking_part)
            for entry in taking_part:
                entry.turn(grads, keep_warm)
    finally:
        gc.enable()


def _profile(entry: Entry, grads: Sequence[Sequence[Tensor]], sampling: Sampling) -> None:
    """Records state bytes and launches, after the samples."""
    if not entry.needs_grads:
        return
    entry.state = state_bytes(entry.replicas[0], entry.numel)
    slow = min(entry.seconds) > 1 or len(entry.params[0]) > 2500
    if sampling.profile and not slow and not (entry.device.type == "cpu" and "compile" in entry.contender.name):
        entry.launches = count_launches(lambda: entry.step(grads), entry.device)


def like(tensor: Tensor) -> Tensor:
    """Returns a copy with the alignment of the original. It is a view only if the original is misaligned."""
    offset = tensor.data_ptr() % 64 // tensor.element_size()
    if offset == 0:
        return tensor.clone(memory_format=torch.contiguous_format)
    flat = torch.empty(tensor.numel() + offset, device=tensor.device, dtype=tensor.dtype)[offset:]
    return flat.view(tensor.shape).copy_(tensor)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounded(seconds: float) -> float:
    """Rounds to four digits, and to at least 10 ns: timers have no more precision."""
    return float(f"{max(seconds, 1e-8):.4g}")
