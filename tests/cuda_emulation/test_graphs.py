"""Captures of the emulated CUDA executor: arguments of replays, lifetime of memory, and the last block's fence."""

from __future__ import annotations

import pytest
import torch

import fused_adaptive as fa

from . import build
from .driver import Emulated

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


class Captured:
    """ActiveAdamW on the emulated device. Eager steps and replays have gradients at different addresses.

    Args:
        patches: patches of the library's sources.
        weight_decay: if 0, decay is coupled: a decay that is set later goes into the gradient.
    """

    def __init__(self, patches: list[tuple[str, str, str]] | None = None, weight_decay: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.randn(n, generator=generator).requires_grad_() for n in (100, 40990)]
        self.optimizer = fa.ActiveAdamW(
            self.params, lr=0.01, interval=3, weight_decay=weight_decay, backend="reference", capturable=True
        )
        self.optimizer.param_groups[0]["decoupled_weight_decay"] = weight_decay != 0
        library = build.library(patches or [], small=True)
        self.emulated = Emulated(self.optimizer, on_device=True, library=library)
        self.buffers = {kind: [torch.zeros_like(p, requires_grad=False) for p in self.params] for kind in "er"}
        self.graph = -1

    def fill(self, kind: str, step: int) -> None:
        generator = torch.Generator().manual_seed(1 + step)
        for p, buffer in zip(self.params, self.buffers[kind], strict=True):
            p.grad = buffer.copy_(torch.randn(p.shape, generator=generator))

    def capture(self) -> None:
        lib = self.emulated.lib
        lib.emulation_capture(1)
        try:
            self.emulated.step()
        finally:
            self.graph = lib.emulation_capture(0)

    def run(self, kinds: str, captured: bool) -> list[torch.Tensor]:
        """Takes one step for each letter: e, eager, or r, a replay. Without a graph, all are eager."""
        for step, kind in enumerate(kinds):
            self.fill(kind, step)
            if kind == "r" and captured:
                if self.graph < 0:
                    self.capture()
                self.emulated.lib.emulation_replay(self.graph)
            else:
                self.emulated.step()
        return [v.detach().clone() for p in self.params for v in (p, *self.optimizer.state[p].values())]


BELIEVED = ("cuda/executor.cpp", "if (was_captured_ || found_grads_ != grads_)", "if (found_grads_ != grads_)")


@pytest.mark.parametrize(
    "patches",
    [[], pytest.param([BELIEVED], marks=pytest.mark.heavy)],
    ids=["as it is", "what was sent is believed"],
)
def test_eager_steps_between_replays_use_their_own_gradients(patches):
    runs = [Captured(patches).run("ererereer", captured) for captured in (False, True)]
    assert all(map(torch.equal, *runs)) == (not patches)


def test_tables_of_a_graph_are_kept_when_the_executor_builds_new_ones():
    """Decay changes between steps, also from coupled to decoupled, so that the executor builds new tables."""
    results = []
    for captured in (False, True):
        own = Captured(weight_decay=0.0)
        own.run("er", captured)
        before = own.emulated.lib.emulation_memory()
        own.optimizer.param_groups[0]["weight_decay"] = 0.1
        own.fill("e", 2)
        own.emulated.step()
        more = own.emulated.lib.emulation_memory() - before
        assert more > 0 if captured else more == 0
        own.optimizer.param_groups[0]["weight_decay"] = 0.0
        results.append(own.run("rer", captured))
    assert all(map(torch.equal, *results))


def test_all_device_memory_is_freed():
    own = Captured()
    lib, before = own.emulated.lib, own.emulated.lib.emulation_memory()
    own.run("erer", True)
    assert lib.emulation_memory() > before
    del own.emulated
    assert lib.emulation_memory() == before


def test_blocks_are_counted_after_a_fence():
    """The thread that counts executes the fence, after a barrier of the whole block."""
    own = Captured()
    own.emulated.lib.emulation_unfenced()
    own.run("eee", False)
    assert own.emulated.lib.emulation_unfenced() == 0


@pytest.mark.heavy
def test_a_fence_before_the_barrier_is_noticed():
    barrier = "FA_SHARED(bool, last);\n  __syncthreads();"
    early = [("cuda/device.cuh", barrier, barrier.replace("__sync", "__threadfence();\n  __sync"))]
    late = [("cuda/device.cuh", "__threadfence();\n    last =", "last =")]
    own = Captured([*early, *late])
    own.emulated.lib.emulation_unfenced()
    own.run("e", False)
    assert own.emulated.lib.emulation_unfenced() > 0
