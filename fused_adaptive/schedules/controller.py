"""What AALR and ASLR have in common: they own ``param_group["lr"]``, and hear of training through one number."""

from __future__ import annotations

import math
import weakref
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..engine.handles import driven
from .lr import read_lrs, write_lrs

_MISSING: Any = object()


class Controller:
    """A learning-rate scheduler driven by a metric: ``step(metric)`` once an epoch.

    Args:
        optimizer: any ``torch.optim`` optimizer, or a trainer's handle of one, which is looked into. Its groups keep
            the ratios of their rates to the first group's.
        process_group: whose ranks decide together, on the mean of their metrics; None: the default group, where
            ``torch.distributed`` is initialised. For ranks that train apart, pass a group of the one rank.
        takes_over: another scheduler had this optimizer before, and will not be stepped again.

    Raises:
        TypeError: if ``optimizer`` is not an optimizer.
        ValueError: if the first group's lr is 0, so that there are no ratios to it.
        RuntimeError: if a scheduler or another controller drives the optimizer; also from ``step``.
    """

    def __init__(self, optimizer: Optimizer, process_group: Any = None, takes_over: bool = False) -> None:
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
            metric: its loss, a number or a tensor of one element without a graph; NaN and infinities are allowed.

        Raises:
            TypeError, ValueError: if it is missing or no such number. RuntimeError: if something else has changed the
                learning rate. Then nothing has changed.
        """
        value = self._number(metric)
        self._check_owner()
        self._adopt_groups()
        self._decide(self._agree(value))
        self.last_epoch += 1

    def get_last_lr(self) -> list[float]:
        """The learning rate of every group, as this controller last set it."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on bit for bit: numbers, strings, lists, dicts and tensors.

        It loads with ``weights_only=True``. Tensors are shared, not copied, as in ``torch.optim``: save it, or
        deep-copy it, before training goes on.
        """
        self._adopt_groups()
        return {"last_epoch": self.last_epoch, "ratios": list(self._ratios), **self._state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where ``state_dict`` was taken, and sets the groups' rates accordingly.

        Raises:
            KeyError, ValueError: if it is of another class or of other param groups. Then nothing has changed.
        """
        groups = len(self.optimizer.param_groups)
        if len(state_dict["ratios"]) != groups:
            raise ValueError(
                f"the state of {self._name} is of {len(state_dict['ratios'])} param groups, the optimizer has {groups}"
            )
        rate = self._load(state_dict)
        self.last_epoch = state_dict["last_epoch"]
        self._ratios = list(state_dict["ratios"])
        self._set_lr(rate)

    def remove(self) -> None:
        """Lets the optimizer go: its rates stay as they are, and another scheduler may have it."""
        self.optimizer._lr_owner = None  # type: ignore[attr-defined]

    # ---- what a subclass defines ----

    def _decide(self, metric: float) -> None:
        """Takes the epoch's metric, the same on every rank."""
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state_dict: dict[str, Any]) -> float:
        """Takes over the subclass's part; returns the first group's rate."""
        raise NotImplementedError

    # A copy drives its own copy of the optimizer, whose copies know of no controller.

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._claim()

    # ---- rates ----

    def _set_lr(self, rate: float) -> None:
        write_lrs(self.optimizer.param_groups, [rate * ratio for ratio in self._ratios])
        self._last_lr = read_lrs(self.optimizer.param_groups)  # a float32 tensor rounds

    def _adopt_groups(self) -> None:
        """A group that was added since joins with its ratio to the first one."""
        added = read_lrs(self.optimizer.param_groups[len(self._ratios) :])
        self._ratios += [lr / self._last_lr[0] for lr in added]
        self._last_lr += added

    # ---- metrics ----

    def _number(self, metric: Any, what: str = "metric") -> float:
        if metric is _MISSING or metric is None:
            self._refuse()
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
        except (TypeError, ValueError):
            raise TypeError(f"the {what} must be a number, got {metric!r}") from None

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"{self._name}.step needs the epoch's loss: step(loss). SequentialLR and ChainedScheduler pass none, so "
            "they cannot drive it; let a warm-up end first, and build ASLR with takes_over=True"
        )

    _update_lr = _initial_step = _refuse  # what SequentialLR calls in place of step()

    def _agree(self, value: float) -> float:
        """The mean over the ranks: NaN on one is NaN on all, so that all take the same branch."""
        group = self._process_group
        if not (dist.is_available() and dist.is_initialized()) or (size := dist.get_world_size(group)) <= 1:
            return value
        on_host = "gloo" in dist.get_backend(group)
        device = torch.device("cpu") if on_host else self.optimizer.param_groups[0]["params"][0].device
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=group)
        return total.item() / size

    # ---- who owns the learning rate ----

    def _check_free(self) -> None:
        owner = owner_of(self.optimizer)
        if owner is not None:
            raise RuntimeError(
                f"this optimizer is driven by {type(owner).__name__} already: call its remove() first, or build the "
                "optimizer anew"
            )

    def _claim(self) -> None:
        """Last in the constructors: what fails before holds no claim."""
        self.optimizer._lr_owner = weakref.ref(self)  # type: ignore[attr-defined]

    def _check_scheduler(self) -> None:
        if not self._takes_over and is_scheduled(self.optimizer):
            raise RuntimeError(
                f"a torch.optim.lr_scheduler drives this optimizer, and {self._name} owns its learning rate: use one "
                f"of them. {self._remedy()}"
            )

    def _remedy(self) -> str:
        return "If that scheduler is done (a warm-up), pass takes_over=True and do not step it again"

    def _check_owner(self) -> None:
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
    """The controller that drives the optimizer."""
    reference = getattr(driven(optimizer), "_lr_owner", None)
    return None if reference is None else reference()


def is_scheduled(optimizer: Optimizer) -> bool:
    """Whether a ``torch.optim.lr_scheduler`` was ever attached. ReduceLROnPlateau leaves no such trace."""
    wrapped = hasattr(vars(optimizer).get("step"), "_wrapped_by_lr_sched")
    return wrapped or any("initial_lr" in group for group in optimizer.param_groups)
