"""Models under torch's own wrappers: part of distributed_script.py."""

CHECKS = {}
