"""Functions of the native library that work on Python objects, where Python would take several times as long.

They are not operators of torch: ``ctypes`` calls the functions of ``csrc/bindings/python.cpp`` with the interpreter
lock held. Free-threaded Python has no such lock, so it runs the Python code instead.
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
    """Returns a function that passes gradients to a native plan.

    Its arguments are the plan's number, the plan's parameters and their state (``held`` of ``plan_check``), and a list
    to which it appends the gradients. It returns the result of ``plan_check``, plus 4 for each parameter without a
    gradient; or -2 if only ``plan_check`` can handle one of the tensors.

    Returns None if torch.Tensor has no table of DLPack functions, and on free-threaded Python.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None or library.FREE_THREADED:
        return None
    # A separate prototype, since all packages of the process share the attributes of ctypes.pythonapi.
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    table = prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    if table is None or ctypes.c_uint32.from_address(table).value != 1:  # the major version that python.cpp supports
        return None
    read = _function(0, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, *[ctypes.py_object] * 3)
    return lambda plan, *others: read(plan, table, Tensor.is_neg, *others)


@functools.cache
def same_objects() -> Callable[[dict[Any, Any], list[Any]], int] | None:
    """Returns a function that compares a dict of dicts with a list of :func:`objects_of`, by identity.

    Returns None without a native library that has this function, and on free-threaded Python.
    """
    if library.FREE_THREADED or library.why_not() or not hasattr(torch.ops.fused_adaptive, "python_calls"):
        return None
    return _function(1, ctypes.c_int, ctypes.py_object, ctypes.py_object)


@functools.cache
def same_items() -> Callable[[list[Any], list[Any]], int] | None:
    """Returns a function that compares two lists by identity of their items; None as in :func:`same_objects`."""
    if same_objects() is None:
        return None
    return _function(2, ctypes.c_int, ctypes.py_object, ctypes.py_object)


def objects_of(states: Mapping[Any, Any]) -> list[Any]:
    """Lists the objects in a dict of dicts, in order: each key and value, then the keys and values in the value."""
    found: list[Any] = []
    for key, values in states.items():
        found += [key, values]
        if isinstance(values, dict):
            found += [item for pair in values.items() for item in pair]
    return found


def _function(number: int, result: Any, *arguments: Any) -> Any:
    return ctypes.PYFUNCTYPE(result, *arguments)(torch.ops.fused_adaptive.python_calls()[number])
