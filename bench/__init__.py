"""Measurements: the demo (``python -m bench.demo``) and the benchmarks."""
