"""What the native library does with Python's objects where Python itself would take several times as long.

Such calls are no operators of torch: ``ctypes`` calls the functions of ``csrc/bindings/python.cpp``, with the
interpreter's lock held. Free-threaded Python has no such lock, and does it itself.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import library


@functools.cache
def gradients_reader() -> Callable[[int, list[Tensor], list[Tensor]], int] | None:
    """A function that gives a native plan its gradients, or None where torch.Tensor has no table of DLPack's functions,
    and on free-threaded Python.

    Its arguments are the plan's number, its parameters and their state (``plan_check``'s ``held``), and a list to which
    the gradients are appended. It returns what ``plan_check`` does, plus 4 for each parameter without a gradient; -2 if
    one of the tensors is of a kind that only ``plan_check`` can look at.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or library.FREE_THREADED:
        return None
    # A prototype of its own: the attributes of ctypes.pythonapi belong to all packages of the process.
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    table = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    if table is None or ctypes.c_uint32.from_address(table).value != 1:  # the major version that python.cpp knows
        return None
    read = _function(0, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, *[ctypes.py_object] * 3)
    return lambda plan, *others: read(plan, table, Tensor.is_neg, *others)


@functools.cache
def same_objects() -> Callable[[dict[Any, Any], list[Any]], int] | None:
    """A function that tells whether a dict of dicts holds the very objects of :func:`objects_of`; None without the
    native library, or with one that has no such function, and on free-threaded Python.
    """
    if library.FREE_THREADED or library.why_not() or not hasattr(torch.ops.fused_adaptive, "python_calls"):
        return None
    return _function(1, ctypes.c_int, ctypes.py_object, ctypes.py_object)


@functools.cache
def same_items() -> Callable[[list[Any], list[Any]], int] | None:
    """A function that tells whether two lists hold the same objects; None as for :func:`same_objects`."""
    if same_objects() is None:
        return None
    return _function(2, ctypes.c_int, ctypes.py_object, ctypes.py_object)


def objects_of(states: Mapping[Any, Any]) -> list[Any]:
    """The objects in a dict of dicts, in order: of each entry its key and value, followed by those of the value."""
    found: list[Any] = []
    for key, values in states.items():
        found += [key, values]
        if isinstance(values, dict):
            found += [item for pair in values.items() for item in pair]
    return found


def _function(number: int, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)(torch.ops.fused_adaptive.python_calls()[number])
