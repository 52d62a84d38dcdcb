"""Functions of torch that the CUDA code uses, in processes with a fake libtorch_cuda.so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import build

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a libtorch_cuda.so of its own"),
]

ENTRY = """
#include <exception>
#include <string>

#include "cuda/runtime.h"

extern "C" __attribute__((visibility("default"))) const char* ask(void** stream) {
  static std::string error;
  try {
    *stream = fused_adaptive::cuda::current_stream(0);
    return "";
  } catch (const std::exception& caught) {
    error = caught.what();
    return error.c_str();
  }
}
"""

ASK = """
import ctypes, sys, torch

if sys.argv[2:]:
    ctypes.CDLL(sys.argv[2])
library, stream = ctypes.CDLL(sys.argv[1]), ctypes.c_void_p()
library.ask.restype = ctypes.c_char_p
print(library.ask(ctypes.byref(stream)).decode() or hex(stream.value))
"""


def library() -> Path:
    from . import extension

    texts = build.sources("rules/*", "plan/*.h", "bindings/torch_cuda.cpp", "cuda/*.h")
    texts["emulation/cuda_runtime.h"] = (build.HERE / "cuda_runtime.h").read_text()
    return build.cached({**texts, "entry.cpp": ENTRY}, extension.flags())


GETTER = (
    'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) {{ *stream = (void*)0x1234; return {}; }}'
)


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        (None, "this torch does not tell its current CUDA stream"),
        ("int another;", "this torch does not tell its current CUDA stream"),
        (GETTER.format(1), "check the driver with nvidia-smi"),
        (GETTER.format(0), "0x1234"),
    ],
    ids=["no library", "no getter", "no driver", "a stream"],
)
def test_the_stream_is_torchs_or_an_error_is_raised(source, answer, tmp_path):
    """It is never the default stream, on which work would not wait for torch's."""
    arguments = [str(library())]
    if source is not None:
        file, made = tmp_path / "source.cpp", tmp_path / "libtorch_cuda.so"
        file.write_text(source + "\n")
        named = ["-shared", "-fPIC", f"-Wl,-soname,{made.name}", "-o", str(made)]
        subprocess.run([str(build.compiler()), *named, str(file)], check=True)
        arguments.append(str(made))
    command = [sys.executable, "-c", ASK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=build.ROOT)
    assert done.returncode == 0, done.stderr
    assert answer in done.stdout
