"""The number of optimizer steps in an epoch, for ``interval=``."""

from __future__ import annotations

from collections.abc import Sized

from ..core.plain import plain_int


def steps_per_epoch(loader: Sized, accumulate: int = 1) -> int:
    """Returns the number of optimizer steps in one pass over ``loader``.

    Args:
        loader: an object whose length is its number of batches, such as a ``DataLoader``.
        accumulate: the number of batches whose gradients are accumulated into one step. A remainder at the end of the
            epoch counts as a step, as in common trainers; if your loop drops it, use ``len(loader) // accumulate``.

    Raises:
        TypeError: for a loader without a length (an ``IterableDataset``). Use ``interval=None`` for it and call
            ``optimizer.end_interval()`` at the end of each epoch. Also for an ``accumulate`` that is no int.
        ValueError: for an empty loader, or ``accumulate`` below 1.
    """
    accumulate = plain_int("steps_per_epoch: accumulate", accumulate)
    try:
        batches = len(loader)
    except TypeError as error:
        raise TypeError(
            f"{type(loader).__name__} has no length: use interval=None and call optimizer.end_interval() at the end "
            "of each epoch"
        ) from error
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if batches == 0:
        raise ValueError("the loader is empty: an interval needs at least one step")
    return -(-batches // accumulate)
