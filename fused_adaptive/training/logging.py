"""Logging of learning rates to TensorBoard or any other writer with ``add_scalar``."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..core.eager import eager
from ..core.plain import plain_int
from ..core.warning import warn
from ..engine.handles import unwrap
from ..engine.rates import to_host
from ..optimizers.base import AdaptiveOptimizer
from ..policies import Policy, from_plain


class Writer(Protocol):
    """The interface of ``torch.utils.tensorboard.SummaryWriter`` and similar writers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


def log_learning_rates(
    optimizer: AdaptiveOptimizer,
    writer: Writer,
    *,
    tag: str = "learning_rate",
    every: int | None = None,
    start: int = 0,
) -> RateLogger:
    """Logs minimum, mean and maximum of ``lr·γ`` of each param group at the end of each interval.

    The tags are ``learning_rate/0/min``, ``learning_rate/0/mean`` and so on, with the index of the group; the step is
    the number of ``optimizer.step()`` calls so far. The device is read once per interval, in one transfer; between
    intervals the host counts the steps. (If the step counts are on a GPU, they are read too, and once more after AMP
    has skipped steps.)

    Args:
        optimizer: an optimizer of this package, or a trainer's handle of one.
        writer: has ``add_scalar(tag, value, step)``.
        tag: the prefix of the tags. Default ``"learning_rate"``.
        every: logs after this many steps instead. Required if no policy has intervals (FixedLR, Hypergradient).
            Default None.
        start: the number of steps before this run, for a resumed run. Default 0.

    Returns:
        A handle: ``remove()`` stops the logging, ``write()`` logs immediately.

    Raises:
        ValueError: if no policy has intervals and ``every`` is not given, or if ``every`` is below 1.
        TypeError: if ``every`` or ``start`` is not an int, the writer has no ``add_scalar``, or the optimizer is of
            another package.
    """
    return RateLogger(optimizer, writer, tag, every, start)


class RateLogger:
    """The handle that :func:`log_learning_rates` returns."""

    def __init__(self, optimizer: AdaptiveOptimizer, writer: Writer, tag: str, every: int | None, start: int) -> None:
        optimizer = unwrap(optimizer)
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                "log_learning_rates: writer must have add_scalar(tag, value, step), as TensorBoard's SummaryWriter, "
                f"got {type(writer).__name__}: wrap it in an object with that method"
            )
        every = None if every is None else plain_int("log_learning_rates: every", every)
        if every is not None and every < 1:
            raise ValueError(f"log_learning_rates: every must be at least 1, got {every}")
        if every is None and not any(policy.counter for policy in _policies(optimizer)):
            raise ValueError(
                "log_learning_rates: no policy of this optimizer has intervals; pass every=, a number of steps"
            )
        self.steps = plain_int("log_learning_rates: start", start)
        self._optimizer, self._writer, self._tag, self._every = optimizer, writer, tag, every
        self._counts: dict[Policy, int] = {}  # the policy's step count in its running interval, when last read
        self._unread: dict[Policy, int] = {}  # the number of steps since the count was read
        optimizer._shared.after_step.append(self._after_step)
        optimizer._shared.after_end_interval.append(self._after_end)

    def remove(self) -> None:
        """Stops the logging."""
        shared = self._optimizer._shared
        shared.after_step = [listener for listener in shared.after_step if listener != self._after_step]
        shared.after_end_interval = [listener for listener in shared.after_end_interval if listener != self._after_end]

    def write(self) -> None:
        """Logs the current rates."""
        for i, rates in enumerate(self._optimizer.learning_rates()):
            for name, value in rates.items():
                self._writer.add_scalar(f"{self._tag}/{i}/{name}", value, self.steps)

    def _after_end(self) -> None:
        self._counts = dict.fromkeys(_policies(self._optimizer), 0)
        self._unread.clear()
        if self._every is None:
            self._write_if_possible()

    @eager
    def _after_step(self) -> None:
        self.steps += 1
        if self._every is not None:
            ended = [self.steps % self._every == 0]
        else:
            ended = [self._has_ended(policy) for policy in dict.fromkeys(_policies(self._optimizer))]
        if any(ended):
            self._write_if_possible()

    def _write_if_possible(self) -> None:
        """Logs the current rates. Warns if that fails, since the step that called it has updated the parameters."""
        try:
            self.write()
        except Exception as error:
            warn(f"log_learning_rates: the rates are not logged: {type(error).__name__}: {error}")

    def _has_ended(self, policy: Policy) -> bool:
        """Checks whether the last step ended an interval. ``end_interval()`` calls are handled by ``_after_end``."""
        if policy.counter is None or policy.interval is None:
            return False
        before, self._unread[policy] = self._counts.get(policy), self._unread.get(policy, 0) + 1
        counter = self._counter(policy)
        if counter is None:
            return False
        if not _is_on_host(counter) and before is not None and before + self._unread[policy] < policy.interval:
            return False  # too few steps; skipped steps only delay the end
        count = int(to_host([counter.double().reshape(1)])[0][0])
        steps = self._unread[policy]
        self._counts[policy], self._unread[policy] = count, 0
        # The count is 0 after the last step of an interval, and also if AMP has skipped the first one.
        return count == 0 and (before != 0 or steps >= policy.interval)

    def _counter(self, policy: Policy) -> Tensor | None:
        for group in self._optimizer.param_groups:
            if policy in from_plain(group["policy"]):
                for p in group["params"]:
                    state = self._optimizer.state.get(p, {})
                    if policy.counter in state:
                        return state[policy.counter]
        return None


def _policies(optimizer: AdaptiveOptimizer) -> list[Policy]:
    return [policy for group in optimizer.param_groups for policy in from_plain(group["policy"])]


def _is_on_host(counter: Tensor) -> bool:
    return counter.device.type == "cpu"
