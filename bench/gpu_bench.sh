#!/usr/bin/env bash
# The benchmarks on a fresh GPU machine, in two runs of under 8 minutes each: gpu_bench.sh 1, gpu_bench.sh 2.
# Needs torch with CUDA and nvcc; installs nothing. OUT is where results go, PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m bench.gpu.bench --out "${OUT:-build/gpu_bench}" "${@:?say which run: 1 or 2}"
