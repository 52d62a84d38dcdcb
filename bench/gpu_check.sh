#!/usr/bin/env bash
# Everything that only a GPU can tell, in one go and under 8 minutes: build, parity, sanitizers, graphs, a first timing.
# Needs torch with CUDA, nvcc and pytest; installs nothing. OUT is where results go, PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m bench.gpu_check --out "${OUT:-build/gpu_check}"
