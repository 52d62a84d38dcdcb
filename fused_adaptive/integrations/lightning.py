"""Callbacks for Lightning's ``Trainer``: end intervals at the end of each epoch, step AALR or ASLR after validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports]

from ..optimizers.base import AdaptiveOptimizer
from ..schedules import AALR, ASLR


class EndIntervalCallback(Callback):
    """Ends the interval of every optimizer of this package at the end of each epoch: for ``interval=None``.

    ``Trainer(…, callbacks=[EndIntervalCallback()])``. It runs before the epoch's checkpoint is saved.

    Raises:
        TypeError: from ``fit()``, if no optimizer is of this package.
    """

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        adaptive = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, AdaptiveOptimizer)]
        if not adaptive:
            raise TypeError("EndIntervalCallback: none of the trainer's optimizers is fused_adaptive's")
        for optimizer in adaptive:
            optimizer.end_interval()


class ControllerCallback(Callback):
    """Creates AALR or ASLR for the first optimizer, steps it after each validation of ``fit()`` and saves it.

    The module must log the loss in ``validation_step`` and return no scheduler from ``configure_optimizers``. Each
    ``fit()`` creates a controller; ``trainer.validate()`` and the sanity check leave it and the model alone.

    Args:
        make: returns the controller for an optimizer, such as ``fa.ASLR`` or a function that returns
            ``AALR(optimizer, model, …)``.
        monitor: the name under which the loss is logged. Default ``"val_loss"``.

    Raises:
        ValueError: from ``fit()``, if the module does not log ``monitor``.
    """

    def __init__(self, make: Callable[[Any], AALR | ASLR], monitor: str = "val_loss") -> None:
        self.monitor = monitor
        self._make = make
        self._fitting = True  # no trainer.validate(), test() or predict() is under way
        self._controller: AALR | ASLR | None = None
        self._saved: dict[str, Any] | None = None  # a checkpoint's state, until there is a controller to load it

    @property
    def controller(self) -> AALR | ASLR:
        """The controller; available once ``fit()`` has started."""
        assert self._controller is not None, "fit() has not begun"
        return self._controller

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._fitting = stage == "fit"
        if self._fitting:
            self._controller = None  # it drove the optimizer of an earlier fit()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._controller = self._make(trainer.optimizers[0])
        if self._saved is not None:
            self._controller.load_state_dict(self._saved)
            self._saved = None

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._fitting and not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            if self.monitor not in metrics:
                raise ValueError(
                    f"ControllerCallback: the module has not logged {self.monitor!r}, so the controller cannot step. "
                    f"Log it in validation_step, or pass monitor= one of: {', '.join(sorted(metrics))}"
                )
            self.controller.step(metrics[self.monitor])

    def state_dict(self) -> dict[str, Any]:
        return {} if self._controller is None else self._controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._fitting:
            return  # trainer.validate(ckpt_path=…) loads the state of callbacks too
        if self._controller is None:
            self._saved = state_dict
        else:  # the strategies for FSDP, DeepSpeed and DTensor load checkpoints after on_fit_start
            self._controller.load_state_dict(state_dict)
