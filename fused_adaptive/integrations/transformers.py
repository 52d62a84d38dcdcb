"""For Hugging Face's ``Trainer``: intervals that end with the epoch, and controllers that hear of evaluations."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback  # pyright: ignore[reportMissingImports]

from ..schedules import AALR, ASLR
from . import unwrap


class EndIntervalCallback(TrainerCallback):
    """Ends the optimizer's interval at the end of each epoch, before the epoch's checkpoint: for ``interval=None``.

    ``Trainer(…, callbacks=[EndIntervalCallback()])``. TypeError from ``train()`` if the optimizer is not this
    package's.
    """

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        unwrap(optimizer).end_interval()


class ControllerCallback(TrainerCallback):
    """Tells AALR or ASLR each evaluation's loss.

    The Trainer insists on a scheduler, which it steps after each batch and saves: give it the :class:`IdleScheduler`
    of the same controller, ``Trainer(…, optimizers=(optimizer, IdleScheduler(controller)),
    callbacks=[ControllerCallback(controller)])``.

    Args:
        controller: of the Trainer's optimizer.
        metric: the entry of the evaluation's metrics. Default ``"eval_loss"``.
    """

    def __init__(self, controller: AALR | ASLR, metric: str = "eval_loss") -> None:
        self.controller, self.metric = controller, metric

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.controller.step(metrics[self.metric])


class IdleScheduler:
    """A scheduler for the Trainer that saves and loads a controller, and whose ``step()`` does nothing."""

    def __init__(self, controller: AALR | ASLR) -> None:
        self.controller = controller

    def step(self, *args: Any) -> None:
        """Nothing: the controller is stepped after evaluations."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.controller, name)
