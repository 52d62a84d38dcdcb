"""For Lightning's ``Trainer``: intervals that end with the epoch, and controllers that hear of validations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports]

from ..optimizers.base import AdaptiveOptimizer
from ..schedules import AALR, ASLR


class EndIntervalCallback(Callback):
    """Ends the interval of every optimizer of this package at the end of each epoch: for ``interval=None``.

    ``Trainer(…, callbacks=[EndIntervalCallback()])``. It comes before the epoch's checkpoint. TypeError from ``fit()``
    if there is no such optimizer.
    """

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        adaptive = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, AdaptiveOptimizer)]
        if not adaptive:
            raise TypeError("EndIntervalCallback: none of the trainer's optimizers is fused_adaptive's")
        for optimizer in adaptive:
            optimizer.end_interval()


class ControllerCallback(Callback):
    """Makes a controller for the first optimizer, tells it each validation's loss, and saves it with the checkpoint.

    The module logs the loss in ``validation_step`` and has no scheduler in ``configure_optimizers``.

    Args:
        make: from the optimizer, the controller: ``ControllerCallback(fa.ASLR)``, or a function that returns
            ``AALR(optimizer, model, …)``.
        monitor: the name under which the loss is logged. Default ``"val_loss"``.
    """

    def __init__(self, make: Callable[[Any], AALR | ASLR], monitor: str = "val_loss") -> None:
        self.monitor = monitor
        self._make, self._saved = make, None
        self._controller: AALR | ASLR | None = None

    @property
    def controller(self) -> AALR | ASLR:
        """There from the beginning of ``fit()`` on."""
        assert self._controller is not None, "fit() has not begun"
        return self._controller

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._controller = self._make(trainer.optimizers[0])
        if self._saved is not None:
            self._controller.load_state_dict(self._saved)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.controller.step(trainer.callback_metrics[self.monitor])

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict
