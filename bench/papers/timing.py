"""Times that can be compared on a machine that has other work: all contenders by turns, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

Run = dict[str, Any]


def by_turns(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> Run:
    """Times each contender once a round, the order turning by one each.

    Returns:
        ``ratio`` of each to the first, the median of the rounds' ratios, and with ``low`` and ``high`` their quartiles;
        ``ms``, medians; ``load``, the machine's average load when it ended. Ratios are what can be trusted.
    """
    names = list(contenders)
    for contender in contenders.values():
        contender()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - began)
    ratios = {name: sorted(a / b for a, b in zip(seconds[name], seconds[names[0]], strict=True)) for name in names}
    rounded: Callable[[float], float] = lambda value: float(f"{value:.4g}")  # noqa: E731
    return {
        "ratio": {name: rounded(median(found)) for name, found in ratios.items()},
        "low": {name: rounded(found[len(found) // 4]) for name, found in ratios.items()},
        "high": {name: rounded(found[3 * len(found) // 4]) for name, found in ratios.items()},
        "ms": {name: rounded(1e3 * median(found)) for name, found in seconds.items()},
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 2),
    }
