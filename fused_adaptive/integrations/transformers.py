"""Callbacks for Hugging Face's ``Trainer``: end intervals at each epoch's end, step AALR or ASLR after evaluation."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback  # pyright: ignore[reportMissingImports]

from ..schedules import AALR, ASLR
from . import unwrap


class EndIntervalCallback(TrainerCallback):
    """Ends the optimizer's interval at the end of each epoch, before the epoch's checkpoint: for ``interval=None``.

    ``Trainer(…, callbacks=[EndIntervalCallback()])``.

    Raises:
        TypeError: from ``train()``, if the optimizer is not of this package.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        unwrap(optimizer).end_interval()


class ControllerCallback(TrainerCallback):
    """Steps AALR or ASLR with the loss of each evaluation during training.

    The Trainer requires a scheduler, which it steps after each batch and saves. Pass the :class:`IdleScheduler` of the
    same controller: ``Trainer(…, optimizers=(optimizer, IdleScheduler(controller)),
    callbacks=[ControllerCallback(controller)])``.

    Between two steps it hears one evaluation at most. Those before the first step (``eval_on_start``) and outside of
    ``train()`` leave it and the model alone, and so do those without the metric, such as the other datasets of a dict.

    Args:
        controller: the controller that drives the Trainer's optimizer.
        metric: the key of the loss in the evaluation's metrics. Default ``"eval_loss"``; with a dict of datasets
            ``"eval_<name>_loss"``.

    Raises:
        ValueError: from ``train()``, if its evaluations do not report the metric.
    """

    def __init__(self, controller: AALR | ASLR, metric: str = "eval_loss") -> None:
        self.controller, self.metric = controller, metric
        self._trained = False  # steps have been taken that the controller has not heard of, and none is under way
        self._evaluated = False  # the Trainer has, of its own accord, in this training
        self._reported: set[str] = set()  # the keys of this training's evaluations

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trained = self._evaluated = False
        self._reported.clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An exception, such as Ctrl-C, ends a training without on_train_end. It mostly comes in the middle of a step.
        self._trained = False
        # A dict's datasets are evaluated one by one; only now all have been.
        if self._evaluated:
            self._check_metric()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trained = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trained = False
        if self._reported:
            self._check_metric()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Other callbacks may call evaluate() for other data. The Trainer's own evaluation logs its first dataset while
        # this is still set; in on_evaluate it no longer is.
        self._evaluated = self._evaluated or control.should_evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self._reported.update(metrics)
        if self._trained and self.metric in metrics:
            self._trained = False
            self.controller.step(metrics[self.metric])

    def _check_metric(self) -> None:
        if self.metric not in self._reported:
            raise ValueError(
                f"ControllerCallback: no evaluation has reported {self.metric!r}, so the controller cannot step. "
                f"Pass metric= one of the keys that were reported: {', '.join(sorted(self._reported))}"
            )


class IdleScheduler:
    """A scheduler for the Trainer that saves and loads a controller. Its ``step()`` does nothing."""

    def __init__(self, controller: AALR | ASLR) -> None:
        self.controller = controller

    def step(self, *args: Any) -> None:
        """Does nothing, since :class:`ControllerCallback` steps the controller after evaluations."""

    def __getattr__(self, name: str) -> Any:
        if name == "controller" or name.startswith("__"):  # copy and pickle look for these before there is a controller
            raise AttributeError(name)
        return getattr(self.controller, name)
