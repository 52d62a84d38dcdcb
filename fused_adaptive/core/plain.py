"""Numbers as they come, from numpy, YAML and configuration libraries, made the plain numbers that go on disk."""

from __future__ import annotations

import operator
import sys
from typing import Any

from torch import Tensor


def plain_number(what: str, value: Any) -> Any:
    """An int or a float; a tensor stays, since schedules and captured graphs fill it in place.

    Args:
        what: how messages call it, ``"lr"``.
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
    """Raises TypeError for what is no int, and for a bool."""
    value = plain(value)
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{what} must be an int, got {value!r}")


def plain_flag(what: str, value: Any) -> Any:
    """A bool, or None; numpy's as Python's. Raises TypeError for a string, which would count as True."""
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{what} must be True or False, got {value!r}, a string")
    return plain(value)


def plain(value: Any) -> Any:
    """Scalars and arrays of numpy as numbers and tuples, inside of dicts, lists and tuples too; all else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return value
    if isinstance(value, numpy.ndarray):
        return value.item() if value.size == 1 else tuple(value.tolist())
    if isinstance(value, numpy.longdouble):  # whose item() is another
        return float(value)
    if isinstance(value, numpy.generic):
        return value.item()
    if type(value) is dict:
        made: Any = {key: plain(entry) for key, entry in value.items()}
        return made if any(made[key] is not value[key] for key in value) else value
    if type(value) in (list, tuple):
        made = type(value)(plain(entry) for entry in value)
        return made if any(a is not b for a, b in zip(made, value, strict=True)) else value
    return value


def make_plain(group: dict[str, Any]) -> None:
    """What schedules by hand have put into a param group becomes what checkpoints load with ``weights_only=True``."""
    for name, value in group.items():
        if name != "params":
            group[name] = plain(value)
