"""Learning rates in TensorBoard, or in anything that has its ``add_scalar``."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..core.eager import eager
from ..core.plain import plain_int
from ..engine.handles import unwrap
from ..engine.rates import to_host
from ..optimizers.base import AdaptiveOptimizer
from ..policies import Policy, from_plain


class Writer(Protocol):
    """What ``torch.utils.tensorboard.SummaryWriter`` and its likes have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


def log_learning_rates(
    optimizer: AdaptiveOptimizer,
    writer: Writer,
    *,
    tag: str = "learning_rate",
    every: int | None = None,
    start: int = 0,
) -> RateLogger:
    """Writes minimum, mean and maximum of ``lr·γ`` of each param group, whenever an interval has ended.

    The tags are ``learning_rate/0/min``, ``learning_rate/0/mean`` and so on, with the position of the group; the step
    is the number of ``optimizer.step()`` calls so far. The device is read once an interval, in one transfer, and not
    in between: the host counts. (Where counts live on a GPU, they are read as well, and after AMP has skipped steps
    once more.)

    Args:
        optimizer: one of this package's, or a trainer's handle of one.
        writer: has ``add_scalar(tag, value, step)``.
        tag: what the tags begin with.
        every: writes after so many steps instead; needed where no policy has intervals (FixedLR, Hypergradient).
        start: the number of steps before, for a run that was resumed.

    Returns:
        A handle: ``remove()`` ends it, ``write()`` writes here and now.

    Raises:
        ValueError: if no policy has intervals and ``every`` is not given, or it is below 1.
        TypeError: if ``every`` or ``start`` is no int, the writer has no ``add_scalar``, or the optimizer is another
            package's.
    """
    return RateLogger(optimizer, writer, tag, every, start)


class RateLogger:
    """The handle of :func:`log_learning_rates`, which see."""

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
        self._counts: dict[Policy, int] = {}  # of each policy, the count of its running interval when it was last read
        self._unread: dict[Policy, int] = {}  # steps since then
        optimizer._shared.after_step.append(self._after_step)
        optimizer._shared.after_end_interval.append(self._after_end)

    def remove(self) -> None:
        """Writes no more."""
        shared = self._optimizer._shared
        shared.after_step = [own for own in shared.after_step if own != self._after_step]
        shared.after_end_interval = [own for own in shared.after_end_interval if own != self._after_end]

    def write(self) -> None:
        """Writes the rates as they are now."""
        for i, rates in enumerate(self._optimizer.learning_rates()):
            for name, value in rates.items():
                self._writer.add_scalar(f"{self._tag}/{i}/{name}", value, self.steps)

    def _after_end(self) -> None:
        self._counts.clear()
        self._unread.clear()
        if self._every is None:
            self.write()

    @eager
    def _after_step(self) -> None:
        self.steps += 1
        if self._every is not None:
            ended = [self.steps % self._every == 0]
        else:
            ended = [self._has_ended(policy) for policy in dict.fromkeys(_policies(self._optimizer))]
        if any(ended):
            self.write()

    def _has_ended(self, policy: Policy) -> bool:
        """Whether the step that was just taken was the last of its interval. Ends by hand are not its business."""
        if policy.counter is None or policy.interval is None:
            return False
        before, self._unread[policy] = self._counts.get(policy), self._unread.get(policy, 0) + 1
        counter = self._counter(policy)
        if counter is None:
            return False
        if not _is_on_host(counter) and before is not None and before + self._unread[policy] < policy.interval:
            return False  # skipped steps could only put its end off
        count = int(to_host([counter.double().reshape(1)])[0][0])
        steps = self._unread[policy]
        self._counts[policy], self._unread[policy] = count, 0
        if before is None:
            return count == 0
        # A step that AMP skipped leaves the count; so does one that ends an interval of one step.
        return count < before or (count == before == 0 and steps >= policy.interval)

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
