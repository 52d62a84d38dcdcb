"""The base class of AALR and ASLR, which set ``param_group["lr"]`` from one metric per epoch."""

from __future__ import annotations

import math
import weakref
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import Optimizer

from ..core import ranks
from ..core.plain import plain_flag
from ..engine.handles import driven
from ..optimizers.base import AdaptiveOptimizer
from .lr import read_lrs, write_lrs

_MISSING: Any = object()


class Controller:
    """A learning-rate scheduler driven by a metric: call ``step(metric)`` once per epoch.

    Args:
        optimizer: any ``torch.optim`` optimizer, or a trainer's handle of one, which is unwrapped. Its groups keep the
            ratios of their rates to the first group's.
        process_group: the ranks that decide together, on the mean of their metrics. None: the default group if
            ``torch.distributed`` is initialized. For ranks that train independently, pass a group of the one rank.
        takes_over: whether another scheduler has driven the optimizer before and is not stepped again.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer.
        ValueError: if the first group's lr is not finite and > 0, since no ratios to it exist.
        RuntimeError: if a scheduler or another controller drives the optimizer; also from ``step``, as after
            ``remove()``.
    """

    def __init__(self, optimizer: Optimizer, process_group: Any = None, takes_over: bool = False) -> None:
        takes_over = plain_flag(f"{self._name}: takes_over", takes_over)
        optimizer = self.optimizer = driven(optimizer)
        self.last_epoch = 0
        self._process_group = process_group
        self._takes_over = takes_over
        self._check_scheduler()
        self._check_free()
        lrs = read_lrs(optimizer.param_groups)
        if not (lrs[0] > 0 and math.isfinite(lrs[0])):
            raise ValueError(
                f"the lr of param group 0 is {lrs[0]}: {self._name} scales all groups by it; give it a rate > 0"
            )
        self._ratios = [lr / lrs[0] for lr in lrs]
        self._last_lr = lrs

    @property
    def _name(self) -> str:
        return type(self).__name__

    # ---- the interface of torch.optim.lr_scheduler ----

    def step(self, metric: Any = _MISSING) -> None:
        """Ends an epoch.

        Args:
            metric: the epoch's loss, a number or a tensor of one element without a graph. NaN and infinities are
                allowed.

        Raises:
            TypeError, ValueError: if the metric is missing or not such a number. Nothing has changed then.
            RuntimeError: if something else has changed the learning rate, or the controller was removed. Nothing has
                changed then.
        """
        if metric is _MISSING or metric is None:
            self._refuse()
        value = self._number(metric)
        self._check_owner()
        self._adopt_groups()
        self._decide(self._agree(value))
        self.last_epoch += 1

    def get_last_lr(self) -> list[float]:
        """Returns the learning rate of every group, as this controller last set it."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that is needed to resume bit for bit: numbers, strings, lists, dicts and tensors.

        It loads with ``weights_only=True``. Tensors are shared, not copied, as in ``torch.optim``: save or deep-copy
        it before training continues.
        """
        self._adopt_groups()
        return {"last_epoch": self.last_epoch, "ratios": list(self._ratios), **self._state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of ``state_dict`` and sets the groups' rates accordingly.

        Raises:
            KeyError, ValueError: if it is of another class or of other param groups. Nothing has changed then.
        """
        groups = len(self.optimizer.param_groups)
        if len(state_dict["ratios"]) != groups:
            raise ValueError(
                f"the state of {self._name} is of {len(state_dict['ratios'])} param groups, the optimizer has {groups}"
            )
        last_epoch, ratios = int(state_dict["last_epoch"]), [float(ratio) for ratio in state_dict["ratios"]]
        rate = self._load(state_dict)
        self.last_epoch, self._ratios = last_epoch, ratios
        self._set_lr(rate)

    def remove(self) -> None:
        """Releases the optimizer for another scheduler. Its rates do not change. Does nothing the second time."""
        if self._drives():
            self.optimizer._lr_owner = None  # type: ignore[attr-defined]

    # ---- methods that a subclass defines ----

    def _decide(self, metric: float) -> None:
        """Handles the epoch's metric, which is the same on every rank."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state_dict: dict[str, Any]) -> float:
        """Loads the subclass's part of the state and returns the first group's rate."""
        raise NotImplementedError

    def _damaged(self, what: str) -> ValueError:
        """Returns the error for a state with values that this class never saves."""
        return ValueError(f"the state of {self._name} is damaged, load another checkpoint: {what}")

    # A copy of the controller claims its own copy of the optimizer, which has dropped the reference to the original. A
    # shallow copy leaves the optimizer to the original.

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if owner_of(self.optimizer) is None:
            self._claim()

    # ---- rates ----

    def _set_lr(self, rate: float) -> None:
        write_lrs(self.optimizer.param_groups, [rate * ratio for ratio in self._ratios])
        self._last_lr = read_lrs(self.optimizer.param_groups)  # read back, since a float32 tensor rounds

    def _adopt_groups(self) -> None:
        """Records the ratios of groups that were added since the last call."""
        added = read_lrs(self.optimizer.param_groups[len(self._ratios) :])
        self._ratios += [lr / self._last_lr[0] for lr in added]
        self._last_lr += added

    # ---- metrics ----

    def _number(self, metric: Any, what: str = "metric") -> float:
        if isinstance(metric, Tensor):
            if metric.requires_grad:
                raise TypeError(
                    f"the {what} is a tensor with a graph, which would keep the whole epoch's activations: pass "
                    "loss.item() or loss.detach()"
                )
            if metric.numel() != 1:
                raise ValueError(f"the {what} must be one number, got a tensor of shape {tuple(metric.shape)}")
        try:
            if isinstance(metric, (bool, str)):
                raise TypeError
            return float(metric)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # torch raises RuntimeError for a complex number
            raise TypeError(f"the {what} must be a number, got {metric!r}") from None

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"{self._name}.step needs the epoch's loss: step(loss). SequentialLR and ChainedScheduler pass none, so "
            "they cannot drive it; let a warm-up end first, and build ASLR with takes_over=True"
        )

    _update_lr = _initial_step = _refuse  # SequentialLR calls these instead of step()

    def _agree(self, value: float) -> float:
        """Returns the mean over the ranks. NaN on one rank gives NaN on all, so that all take the same branch."""
        return ranks.mean(value, self._process_group, self.optimizer.param_groups[0]["params"][0].device)

    # ---- ownership of the learning rate ----

    def _check_free(self) -> None:
        owner = owner_of(self.optimizer)
        if owner is not None:
            raise RuntimeError(
                f"this optimizer is driven by {type(owner).__name__} already: call its remove() first, or build the "
                "optimizer anew"
            )

    def _claim(self) -> None:
        """Registers this controller with the optimizer. Constructors call it last, so that a failed one claims none."""
        if isinstance(self.optimizer, AdaptiveOptimizer):
            self.optimizer._random_rates = None  # of an ASLR that was freed without remove()
        self.optimizer._lr_owner = weakref.ref(self)  # type: ignore[attr-defined]

    def _drives(self) -> bool:
        return owner_of(self.optimizer) is self

    def _check_scheduler(self) -> None:
        if not self._takes_over and is_scheduled(self.optimizer):
            raise RuntimeError(
                f"a torch.optim.lr_scheduler drives this optimizer, and {self._name} owns its learning rate: use one "
                f"of them. {self._remedy()}"
            )

    def _remedy(self) -> str:
        return "If that scheduler is done (a warm-up), pass takes_over=True and do not step it again"

    def _check_owner(self) -> None:
        if not self._drives():
            raise RuntimeError(
                f"this {self._name} does not drive its optimizer any more: remove() was called, or it is a shallow "
                "copy; build a new one"
            )
        self._check_scheduler()
        now = read_lrs(self.optimizer.param_groups)
        for i, (lr, expected) in enumerate(zip(now, self._last_lr, strict=False)):
            if lr != expected:
                raise RuntimeError(
                    f"the lr of param group {i} is {lr}, but {self._name} had set {expected}: something else writes it "
                    "(another scheduler, or a checkpoint loaded without this controller's). Leave lr to "
                    f"{self._name}, or load its state_dict too"
                )


def owner_of(optimizer: Optimizer) -> Controller | None:
    """Returns the controller that drives the optimizer, or None."""
    reference = getattr(driven(optimizer), "_lr_owner", None)
    return None if reference is None else reference()


def is_scheduled(optimizer: Optimizer) -> bool:
    """Checks whether a ``torch.optim.lr_scheduler`` was ever attached. ReduceLROnPlateau cannot be detected."""
    wrapped = hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched")
    return wrapped or any("initial_lr" in group for group in optimizer.param_groups)
