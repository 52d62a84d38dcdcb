"""AALR: doubles the learning rate while the loss falls; otherwise halves it and restores the best model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import Adagrad, Optimizer

from ..core.plain import plain, plain_flag, plain_number
from ..core.ranks import reshard
from ..engine.handles import driven, with_inner
from . import snapshots
from .controller import Controller

#: AALR gives up after this many halvings of the first rate: no model learns at such a rate, in any precision.
_HALVINGS = 40

RESTORE_INITIAL, RESTORE_BEST, SAVE = "restore_initial", "restore_best", "save"
_ACTIONS = (RESTORE_INITIAL, RESTORE_BEST, SAVE, "")


@dataclass(frozen=True)
class Rules:
    """The settings that do not change during training; see :class:`AALR`."""

    initial_loss: float
    initial_lr: float = 0.1
    patience: int = 10
    check_offset: int = 0
    eager_nonfinite: bool = True


@dataclass(frozen=True)
class Progress:
    """The state of the algorithm.

    Args:
        lr: the rate of the next epoch.
        best: the lowest loss so far, ``L*``.
        phase: 1 (search for a first rate) or 2.
        good: the number of consecutive good epochs, in phase 1.
        window: the number of epochs between checks, the paper's ``p``, in phase 2.
        waited: the number of epochs in the current window, in phase 2.
        second: whether the current window is the second one at this rate, in phase 2.
    """

    lr: float
    best: float
    phase: int = 1
    good: int = 0
    window: int = 1
    waited: int = 0
    second: bool = False


def advance(now: Progress, loss: float, rules: Rules) -> tuple[Progress, str]:
    """Performs one epoch of [AALR, Algorithm 1].

    Returns:
        The next state, and what to do with the model: ``SAVE``, ``RESTORE_INITIAL``, ``RESTORE_BEST`` or "".
    """
    return _explore(now, loss, rules) if now.phase == 1 else _search(now, loss, rules)


def _explore(now: Progress, loss: float, rules: Rules) -> tuple[Progress, str]:
    if loss > now.best or not math.isfinite(loss):
        # The pseudo-code keeps the discarded model's L*, which would halve the rate forever.
        return Progress(lr=now.lr / 2, best=rules.initial_loss), RESTORE_INITIAL
    if now.good + 1 < rules.patience:
        return replace(now, best=loss, good=now.good + 1), ""
    return Progress(lr=now.lr * 2, best=loss, phase=2), SAVE


def _search(now: Progress, loss: float, rules: Rules) -> tuple[Progress, str]:
    bad = not math.isfinite(loss)
    lower = replace(now, lr=now.lr / 2, window=2 * now.window, waited=0, second=False)
    if bad and rules.eager_nonfinite:
        return lower, RESTORE_BEST
    if now.waited + 1 < now.window + rules.check_offset:
        return replace(now, waited=now.waited + 1), ""
    if bad:
        return lower, RESTORE_BEST
    if loss < now.best:
        return Progress(lr=now.lr * 2, best=loss, phase=2), SAVE
    if not now.second:
        return replace(now, waited=0, second=True), ""
    return lower, ""


class AALR(Controller):
    """Automated Adaptive Learning Rate: a schedule that needs no tuning and restores its best model on divergence.

    Source: "A Simple Dynamic Learning Rate Tuning Algorithm for Automated Training of DNNs", ICLR 2020 submission,
    Algorithm 1. *Phase 1* halves the rate and restores the initial model until ``patience`` consecutive epochs have
    been good. *Phase 2* checks the loss after ``p`` epochs and, if it is not a new lowest loss, again after ``p`` more.
    A new lowest loss doubles the rate; two failed checks halve it and double ``p``. A loss that is not finite halves
    the rate and restores the best model. Restoring a model drops the state of the optimizer and of the policies,
    gains included, and of an optimizer inside, as in ZeroRedundancyOptimizer. Of what other packages keep elsewhere,
    only a tensor ``param_group["step"]`` is reset.

    Args:
        optimizer: any ``torch.optim`` optimizer. AALR sets the lr of its groups, which keep their ratios to the first
            group's.
        model: holds all parameters of the optimizer. Construct AALR before training: this is the initial model.
        initial_loss: the loss of the untrained model, finite, on the same scale as the epochs' losses. Required.
        lr: the first rate of the first group. Default 0.1.
        patience: the number of consecutive good epochs that ends phase 1. Default 10.
        check_offset: phase 2 checks after ``p + check_offset`` epochs: 0 (default) follows the paper's pseudo-code, 1
            its text.
        eager_nonfinite: whether a loss that is not finite ends its window at once. Default True; False waits for the
            check.
        snapshot: where to keep the copy of the model: ``"device"`` (default; the memory of the parameters' devices),
            ``"pinned"`` (host memory), or the path of a file, which must be this controller's alone. There is one copy
            at any time, of the size of parameters and buffers.
        process_group: the ranks that decide together, on their mean loss. Default: the default group if
            ``torch.distributed`` is initialized.

    Attributes:
        action: what the last ``step`` did to the model: ``"save"``, ``"restore_initial"``, ``"restore_best"`` or "".
        progress: the state of the algorithm, a :class:`Progress`.

    Raises:
        TypeError, ValueError: for invalid arguments, for a model without parameters or without those of the optimizer,
            and from ``step`` for a metric that is not a number.
        MemoryError, OSError: if there is no room for the snapshot, at construction or, with a file, in ``step``. The
            previous snapshot and all state have not changed then.
        RuntimeError: if another scheduler or controller drives the optimizer; from ``step`` after 40 halvings without
            a lower loss, with the last good model restored, and if something else has written to the snapshot's file.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: Module,
        *,
        initial_loss: float,
        lr: float = 0.1,
        patience: int = 10,
        check_offset: int = 0,
        eager_nonfinite: bool = True,
        snapshot: str | os.PathLike[str] = "device",
        process_group: Any = None,
    ) -> None:
        optimizer = driven(optimizer)
        lr = float(plain_number("AALR: lr", lr))
        patience, check_offset = plain(patience), plain(check_offset)
        eager_nonfinite = plain_flag("AALR: eager_nonfinite", eager_nonfinite)
        _check(lr, patience, check_offset)
        _check_model(model, optimizer)
        super().__init__(optimizer, process_group)
        loss = self._agree(self._number(initial_loss, "initial_loss"))
        if not math.isfinite(loss):
            raise ValueError(
                f"AALR: initial_loss must be finite, got {loss} (the mean over the ranks): evaluate the untrained "
                "model; if its loss is not finite, mend model or data first"
            )
        self.model = model
        self.rules = Rules(loss, lr, patience, check_offset, eager_nonfinite)
        self.progress = Progress(lr=lr, best=loss)
        self.action = ""
        self._snapshot = snapshots.make(snapshot, self._tensors())
        self._claim()
        self._set_lr(lr)

    def restore_best(self) -> None:
        """Restores the last checkpoint of the model and resets the optimizer's state.

        Call it at the end of training, since the last epoch may have tried too high a rate.

        Raises:
            RuntimeError: in phase 1, which has no checkpoint, and if something else has written to the snapshot's file.
        """
        if self.progress.phase == 1:
            raise RuntimeError("AALR is in phase 1 and has no checkpoint yet: the model is the best one there is")
        self._restore()

    def _restore(self) -> None:
        snapshots.restore_(self._tensors(), self._snapshot.load())
        reset(self.optimizer)

    def _remedy(self) -> str:
        return (
            "A warm-up before it has no meaning: phase 1 starts from the untrained model at a rate of its own; build "
            "model and optimizer anew"
        )

    def _tensors(self) -> snapshots.Tensors:
        return snapshots.tensors_of(self.model)

    def _adopt_groups(self) -> None:
        _check_model(self.model, self.optimizer)
        super()._adopt_groups()

    def _decide(self, metric: float) -> None:
        progress, action = advance(self.progress, metric, self.rules)
        exhausted = progress.lr < self.rules.initial_lr * 0.5**_HALVINGS
        # All that can fail comes before self changes, so that a failed step can be repeated.
        if action == SAVE:
            self._snapshot.save(self._tensors())
        elif action or exhausted:
            self._restore()
        if exhausted:
            raise RuntimeError(
                f"AALR: at lr = {self.progress.lr:g}, after {_HALVINGS} halvings, the loss is {metric} and still no "
                f"better than {self.progress.best}: the rate is not the cause; look at the data, the loss and the "
                "initial model. The model is restored, the rate has not changed"
            )
        self.progress, self.action = progress, action
        self._set_lr(progress.lr)

    def _state(self) -> dict[str, Any]:
        return {
            "rules": asdict(self.rules),
            "progress": asdict(self.progress),
            "action": self.action,
            "snapshot": dict(self._snapshot.load()),
        }

    def _load(self, state_dict: Mapping[str, Any]) -> float:
        progress = Progress(**state_dict["progress"])
        rules = Rules(**state_dict["rules"])
        action, saved = state_dict["action"], state_dict["snapshot"]
        _check(rules.initial_lr, rules.patience, rules.check_offset)
        if not (progress.lr > 0 and math.isfinite(progress.lr) and math.isfinite(progress.best)):
            raise self._damaged(f"{progress}")
        if action not in _ACTIONS:
            raise self._damaged(f"its action is {action!r}")
        snapshots.check_fit(self._tensors(), saved)
        self._snapshot.save(saved)
        self.progress, self.rules, self.action = progress, rules, action
        return progress.lr


def reset(optimizer: Optimizer) -> None:
    """Resets backbone and policy state, that of an optimizer inside included. Keeps hyperparameters, lr included."""
    for one in with_inner(optimizer):
        _reset(one)


def _reset(optimizer: Optimizer) -> None:
    initial = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for p in list(optimizer.state):
        # Older versions of Adagrad create their state only in the constructor.
        if isinstance(optimizer, Adagrad) and id(p) in initial:
            optimizer.state[p]["step"].zero_()
            optimizer.state[p]["sum"].fill_(initial[id(p)]["initial_accumulator_value"])
        else:
            del optimizer.state[p]
    for group in optimizer.param_groups:
        group.pop("idle_calls", None)
        if isinstance(step := group.get("step"), Tensor):  # torch-optimi counts there
            step.zero_()


def _check(lr: float, patience: int, check_offset: int) -> None:
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"AALR: lr must be finite and > 0, got {lr}")
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
        raise ValueError(f"AALR: patience must be an int of at least 1, got {patience!r}")
    if check_offset not in (0, 1):
        raise ValueError(
            f"AALR: check_offset must be 0 (the paper's pseudo-code) or 1 (its text), got {check_offset!r}"
        )


def _check_model(model: Module, optimizer: Optimizer) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"AALR: model must be a torch.nn.Module, got {type(model).__name__}")
    reshard(model)
    held = {id(p) for p in model.parameters()}
    if not held:
        raise ValueError("AALR: the model has no parameters, so there is nothing to train or to go back to")
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in held:
                raise ValueError(
                    f"AALR: a parameter of shape {tuple(p.shape)} in param group {i} is not the model's, so a snapshot "
                    "of the model could not restore it: pass the model (or a Module holding all models) that the "
                    "optimizer trains"
                )
