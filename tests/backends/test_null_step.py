"""The null step accesses every array once. With a mask other than 0, each accessed element changes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.step.algorithms import BACKBONES, POLICIES, Algorithm

from ..common.cases import KERNELS
from ..cuda_emulation import build

ALGORITHMS = [a for b in BACKBONES for p in POLICIES if not (a := Algorithm(b, p)).why_not()]
STREAMS = sorted({(s.written, s.grads, s.read) for s in (a.streams for a in ALGORITHMS)})
#: Smaller than a vector, larger than a chunk of one thread, and not divisible by a vector.
SIZES = (1, 7, 16384 * 5 + 13)
native = pytest.mark.skipif("native" not in KERNELS, reason="the native library is not built")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
every_streams = pytest.mark.parametrize("streams", STREAMS, ids=str)


def arrays(numel: int, dtype: torch.dtype, streams: tuple[int, int, int]) -> tuple[Tensor, list[list[Tensor]]]:
    written, grads, read = streams
    groups = [[torch.randn(numel) for _ in range(n)] for n in (written, grads, read)]
    groups[1] = [g.to(dtype) for g in groups[1]]
    return torch.randn(numel).to(dtype), groups


def words(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def expected(param: Tensor, groups: list[list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Returns the results with all bits of the mask set."""
    p, reads = words(param).clone(), torch.ones(len(param), dtype=torch.int32)
    for g in groups[1]:
        p ^= words(g)
    for r in groups[2]:
        reads ^= words(r)
    return p, [words(w) ^ reads for w in groups[0]]


@native
@every_streams
@every_dtype
def test_cpu_kernel_accesses_every_element(streams, dtype):
    for numel in SIZES:
        param, groups = arrays(numel, dtype, streams)
        before = [words(t).clone() for t in (param, *groups[0])]
        torch.ops.fused_adaptive.null_step(param, *groups)
        assert all(torch.equal(words(t), b) for t, b in zip((param, *groups[0]), before, strict=True))
        wanted, written = expected(param, groups)
        torch.ops.fused_adaptive.null_step(param, *groups, 2**32 - 1)
        assert torch.equal(words(param), wanted)
        assert all(torch.equal(words(w), e) for w, e in zip(groups[0], written, strict=True))


@native
def test_bad_arguments_are_refused():
    param, groups = arrays(8, torch.float32, (2, 1, 0))
    null_step = torch.ops.fused_adaptive.null_step
    with pytest.raises(RuntimeError, match=r"no step writes 2 arrays and reads 2 \+ 1"):
        null_step(param, groups[0], groups[1] * 2, [torch.zeros(8)])
    with pytest.raises(RuntimeError, match="as many elements"):
        null_step(param, groups[0], [torch.zeros(7)], [])
    with pytest.raises(RuntimeError, match="in its dtype"):
        null_step(param, groups[0], [torch.zeros(8, dtype=torch.bfloat16)], [])
    with pytest.raises(RuntimeError, match="param must be float32"):
        null_step(param.double(), groups[0], groups[1], [])


def is_right_emulated(path: Path, streams: tuple[int, int, int], dtype: torch.dtype, order: int = 0) -> bool:
    library = ctypes.CDLL(str(path))
    library.emulation_null.restype = ctypes.c_bool
    library.emulation_configure(order, 2, 2)
    right = True
    for numel in (3, 8192 * 5 + 13):
        param, groups = arrays(numel, dtype, streams)
        wanted, written = expected(param, groups)
        lists = [((ctypes.c_void_p * max(1, len(g)))(*(t.data_ptr() for t in g)), len(g)) for g in groups]
        right &= library.emulation_null(
            ctypes.c_void_p(param.data_ptr()),
            *(argument for pair in lists for argument in pair),
            param.element_size(),
            ctypes.c_int64(numel),
            ctypes.c_uint32(2**32 - 1),
        )
        right &= torch.equal(words(param), wanted)
        right &= all(torch.equal(words(w), e) for w, e in zip(groups[0], written, strict=True))
    return right


compiles = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@compiles
@every_streams
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_emulated_cuda_kernel_accesses_every_element(streams, dtype):
    assert is_right_emulated(build.library(small=True), streams, dtype)


WITHOUT_A_DRIVER = """
import ctypes, sys, torch
from tests.cuda_emulation import build
from tests.backends.test_null_step import is_right_emulated

ctypes.CDLL(sys.argv[1])
assert is_right_emulated(build.library(small=True), (2, 1, 0), torch.float32)
"""


@compiles
def test_a_cuda_build_of_torch_without_a_driver_is_not_asked_for_its_stream(tmp_path):
    source, library = tmp_path / "torch_cuda.cpp", tmp_path / "libtorch_cuda.so"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    name = f"-Wl,-soname,{library.name}"
    subprocess.run([str(build.compiler()), "-shared", "-fPIC", name, str(source), "-o", str(library)], check=True)
    command = [sys.executable, "-c", WITHOUT_A_DRIVER, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=build.ROOT)
    assert done.returncode == 0, done.stderr


@compiles
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("e < count; e += kThreads) {", "e < wide; e += kThreads) {"),  # skips the elements after the last vector
        ("p[i] ^ (grads &", "p[i] ^ (g[0][i] &"),  # skips the second pass over gradients
        ("k < kWritten; ++k) store(w[k]", "k < kWritten - 1; ++k) store(w[k]"),
    ],
)
def test_a_kernel_that_skips_elements_is_noticed(old, new):
    broken = build.library([("cuda/null.cu", old, new)], small=True)
    assert not is_right_emulated(broken, (2, 2, 2), torch.bfloat16)


def test_triton_kernel_accesses_every_element():
    pytest.importorskip("triton")
    code = f"""
import torch
from bench.step.null_triton import null_step
from tests.backends.test_null_step import arrays, expected, words
for streams in {[s for s in STREAMS if s[0] <= 4]}:
    for dtype in (torch.float32, torch.bfloat16):
        param, groups = arrays(4099, dtype, streams)
        wanted, written = expected(param, groups)
        null_step(param, *groups, -1)
        assert torch.equal(words(param), wanted), streams
        assert all(torch.equal(words(w), e) for w, e in zip(groups[0], written)), streams
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@every_streams
@every_dtype
def test_cuda_kernel_accesses_every_element_on_a_gpu(streams, dtype):
    param, groups = arrays(8192 * 300 + 16, dtype, streams)
    wanted, written = expected(param, groups)
    param, groups = param.cuda(), [[t.cuda() for t in g] for g in groups]
    torch.ops.fused_adaptive.null_step(param, *groups, 2**32 - 1)
    assert torch.equal(words(param).cpu(), wanted)
    assert all(torch.equal(words(w).cpu(), e) for w, e in zip(groups[0], written, strict=True))
