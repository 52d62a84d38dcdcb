#!/usr/bin/env bash
# What only a GPU can tell, in one call of under 8 minutes on a machine that may be bare: builds, tests (parity of native
# and Triton, graphs, no waiting, huge tensors) beside the sanitizers, then a first timing and the counters of ncu.
# Needs torch with CUDA, nvcc and pytest; installs nothing. OUT is where results go, PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m bench.gpu.check --out "${OUT:-build/gpu_check}" "$@"
