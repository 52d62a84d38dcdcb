"""Converts numbers of numpy, YAML and configuration libraries to plain Python numbers."""

from __future__ import annotations

import operator
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

from torch import Tensor


def plain_number(what: str, value: Any) -> Any:
    """Converts a number to an int or a float. A tensor is kept, since schedules and captured graphs fill it in place.

    Args:
        what: name in error messages, such as ``"lr"``.
        value: a number of any library, or a tensor.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Tensor) or type(value) is float or type(value) is int:
        return value
    if isinstance(value, (str, bytes)):
        raise TypeError(
            f"{what} must be a number, got {value!r}, a string. YAML reads 1e-3 as a string: write 1.0e-3 there, or "
            "convert it with float()"
        )
    value = plain(value)
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number, got {value!r}") from None


def plain_int(what: str, value: Any) -> int:
    """Converts an integer to an int. Raises TypeError for anything else, and for a bool."""
    value = plain(value)
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{what} must be an int, got {value!r}")


def plain_flag(what: str, value: Any) -> Any:
    """Converts a bool of numpy to Python's. Raises TypeError for a string, which would count as True."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{what} must be True or False, got {value!r}, a string")
    return plain(value)


def plain(value: Any) -> Any:
    """Converts scalars and arrays of numpy, decimals and fractions to numbers and tuples, also inside containers.

    Returns everything else unchanged.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return value.item() if value.size == 1 else tuple(value.tolist())
    if numpy is not None and isinstance(value, numpy.generic):
        return float(value) if isinstance(value, numpy.longdouble) else value.item()  # whose item() is one again
    if isinstance(value, (Decimal, Fraction)):
        return float(value)
    if type(value) is dict:
        converted: Any = {key: plain(entry) for key, entry in value.items()}
        return converted if any(converted[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple):
        converted = type(value)(plain(entry) for entry in value)
        return converted if any(a is not b for a, b in zip(converted, value, strict=True)) else value
    return value


def make_plain(group: dict[str, Any]) -> None:
    """Converts the entries of a param group to types that checkpoints load with ``weights_only=True``.

    Schedules written by hand may set numbers of numpy.
    """
    for name, value in group.items():
        if name != "params":
            group[name] = plain(value)
