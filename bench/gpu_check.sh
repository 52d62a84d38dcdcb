#!/usr/bin/env bash
# What only a GPU can tell, in two calls of under 8 minutes, each on a machine that may be bare: gpu_check.sh 1 builds and
# tests (parity of native and Triton, graphs, no waiting, a first timing); gpu_check.sh 2 has sanitizers and huge tensors.
# Needs torch with CUDA, nvcc and pytest; installs nothing. OUT is where results go, PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m bench.gpu.check "${1:?say which call: 1 or 2}" --out "${OUT:-build/gpu_check}"
