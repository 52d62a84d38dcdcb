"""The native backend with its CUDA side emulated, in tests of all backends, in a separate process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from . import build

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler"),
]

SUITES = {
    "parity": ("tests/parity/test_parity.py", "float64_reference and native and float32"),
    "golden": ("tests/golden/test_golden.py", "trajectory and native"),
    "oracle": ("tests/parity/test_oracle.py", "agrees and native"),
    "changes": ("tests/engine/test_participants.py", "native and (seen or many_changes)"),
    "masters": ("tests/core/test_masters.py", "native"),
    "momentum": ("tests/engine/test_first_momentum.py", "native and not inductor"),
    "clipping": ("tests/engine/test_clipping.py", "native"),
    "graphs": ("tests/gpu/test_graphs.py", "native"),
    "compiled": ("tests/engine/test_compile.py", "native and aot_eager or skipped or draws"),
    # CUDA kernels take gradients of the parameter's dtype (others are converted before), so not "low_precision".
    "operators": (
        "tests/backends/test_native.py",
        "not instruction_sets and not threads and not memory and not cannot_hold and not low_precision",
    ),
}


#: Features in README's table that the suites cover.
FEATURES = {
    "golden": ["golden trajectories in float64"],
    "masters": ["exact float32 masters of bfloat16 parameters", "stochastic rounding of bfloat16 parameters"],
    "clipping": ["max_grad_norm= and skip_nonfinite=, inside of the step"],
    "graphs": ["a captured CUDA graph, through interval ends"],
    "compiled": ["torch.compile(fullgraph=True), no recompiles with a tensor lr"],
    "changes": ["intermittent gradients, groups and policies that change"],
    "operators": [
        "empty tensors",
        "channels_last, strided and misaligned tensors",
        "no copy of the parameters in a step",
    ],
}


def marked(name: str) -> Any:
    features = [pytest.mark.feature(f, backend="native-cuda", emulated=True) for f in FEATURES.get(name, ())]
    return pytest.param(name, marks=features)


@pytest.mark.parametrize("name", [marked(name) for name in SUITES])
def test_suite(name):
    file, chosen = SUITES[name]
    plugin = ("-p", "tests.cuda_emulation.extension", "-p", "no:cacheprovider")
    # test_kernels.py runs every kernel; of the product of cases, those of `make test` are enough here.
    thinned = ["-m", "not heavy"] if name == "parity" else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugin, file, "-k", chosen, *thinned]
    done = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
