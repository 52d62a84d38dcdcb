"""Lightning: equal to the plain loop bit for bit, saving and resuming, and the callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_adaptive as fa

from ..common.cases import BACKENDS
from .common import digits, needs, perceptron, plain_loop, same, values

pytestmark = [needs("lightning"), pytest.mark.filterwarnings("ignore")]
feature = pytest.mark.feature("Lightning Trainer")

EPOCH, EPOCHS, CLIP = 5, 3, 0.3  # checkpoints at the end of an epoch are in the middle of intervals of 2 and 3

POLICIES = {
    "both": (fa.TrainableLR(interval=2), fa.ActiveLR(interval=3)),
    "by epoch": fa.ActiveLR(interval=None),
}


def build(model: nn.Module, backend: str, policy: Any) -> tuple[fa.AdaptiveOptimizer, Any]:
    optimizer = fa.AdamW(fa.param_groups(model, 0.1), lr=0.01, policy=policy, backend=backend)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=EPOCH * EPOCHS + 1)


def module(optimizers: Callable[[nn.Module], Any]) -> Any:
    lightning = import_module("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = perceptron()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return optimizers(self.model)

    return Module()


def trainer(folder: Path, callbacks: Iterable[Any], clip: float | None = CLIP, **arguments: Any) -> Any:
    lightning = import_module("lightning")
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_epochs=1, save_top_k=-1
    )
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        gradient_clip_val=clip,
        callbacks=[*callbacks, checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **arguments,
    )


def loader(shift: int = 0) -> torch.utils.data.DataLoader:
    """Batches of digits, with labels that are wrong by ``shift``."""
    return torch.utils.data.DataLoader([(x, (y + shift) % 10) for x, y in digits(EPOCH)], batch_size=None)


def fit(
    folder: Path,
    backend: str,
    policy: Any = None,
    clip: float | None = CLIP,
    resume: Path | None = None,
    callbacks: tuple[Any, ...] = (),
    optimizer: Any = None,
) -> list[Tensor]:
    def optimizers(model: nn.Module) -> Any:
        if optimizer is not None:
            return optimizer(model)
        made, scheduler = build(model, backend, policy)
        return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    trained = module(optimizers)
    trainer(folder, callbacks, clip).fit(trained, loader(), ckpt_path=resume)
    return values(trained.model)


def plain(backend: str, policy: Any) -> list[Tensor]:
    model = perceptron()
    optimizer, scheduler = build(model, backend, policy)
    ends = isinstance(policy, fa.ActiveLR)
    return plain_loop(
        model,
        optimizer,
        scheduler,
        digits(EPOCH) * EPOCHS,
        lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        clip=CLIP,
        epoch=EPOCH,
        at_epoch_end=optimizer.end_interval if ends else lambda: None,
        order=[p for group in optimizer.param_groups for p in group["params"]],  # Lightning's order
    )


@feature
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_plain_loop_bit_for_bit_also_when_resumed(policy, backend, tmp_path):
    from fused_adaptive.integrations.lightning import EndIntervalCallback

    policy = POLICIES[policy]
    callbacks = (EndIntervalCallback(),) if isinstance(policy, fa.ActiveLR) else ()
    expected = plain(backend, policy)
    assert same(fit(tmp_path, backend, policy, callbacks=callbacks), expected)
    resumed = fit(tmp_path, backend, policy, callbacks=callbacks, resume=tmp_path / "step=5.ckpt")
    assert same(resumed, expected)
    assert not same(fit(tmp_path / "other", backend, policy, clip=None, callbacks=callbacks), expected)
    if callbacks:
        assert not same(fit(tmp_path / "more", backend, policy), expected)


def test_the_callback_needs_an_optimizer_of_this_package(tmp_path):
    from fused_adaptive.integrations.lightning import EndIntervalCallback

    with pytest.raises(TypeError, match="none of the trainer's optimizers"):
        fit(
            tmp_path,
            "reference",
            callbacks=(EndIntervalCallback(),),
            optimizer=lambda model: torch.optim.AdamW(model.parameters()),
        )


def aslr(optimizer: Any) -> fa.ASLR:
    return fa.ASLR(optimizer, seed=3)


def controlled(folder: Path, make: Callable[[Any], Any] = aslr, **arguments: Any) -> tuple[Any, Any, Any]:
    """A module, a Trainer that drives it with a controller, and the callback with the controller."""
    from fused_adaptive.integrations.lightning import ControllerCallback

    callback = ControllerCallback(make)
    of_module = module(lambda model: fa.AdamW(model.parameters(), lr=0.5))
    return of_module, trainer(folder, [callback], **arguments), callback


def late() -> Any:
    """A strategy that loads checkpoints after ``on_fit_start``, as those for FSDP, DeepSpeed and DTensor do."""
    strategies = import_module("lightning").pytorch.strategies
    late = type("Late", (strategies.SingleDeviceStrategy,), {"restore_checkpoint_after_setup": True})
    return late("cpu")


@pytest.mark.parametrize("strategy", [lambda: "auto", late], ids=["early", "late"])
def test_a_controller_gets_validation_results_and_is_saved(strategy, tmp_path):
    def run(resume: Path | None = None) -> tuple[list[Tensor], dict[str, Any]]:
        of_module, of_trainer, callback = controlled(tmp_path, strategy=strategy())
        of_trainer.fit(of_module, loader(), loader(), ckpt_path=resume, weights_only=False)
        return values(of_module.model), callback.controller.state_dict()

    params, state = run()
    assert state["last_epoch"] == EPOCHS
    resumed, resumed_state = run(tmp_path / "step=5.ckpt")
    assert same(params, resumed)
    assert str(state) == str(resumed_state)


def test_a_loss_that_is_not_logged_is_named_with_those_that_are(tmp_path):
    of_module, of_trainer, callback = controlled(tmp_path)
    callback.monitor = "loss"
    with pytest.raises(ValueError, match=r"has not logged 'loss'.*one of: val_loss$"):
        of_trainer.fit(of_module, loader(), loader())


def test_validation_outside_of_fit_leaves_the_controller_and_the_model_alone(tmp_path):
    make = lambda optimizer: fa.AALR(optimizer, of_module.model, initial_loss=9.0, lr=0.001)  # noqa: E731
    of_module, of_trainer, callback = controlled(tmp_path, make)
    of_trainer.validate(of_module, loader(), verbose=False)
    of_trainer.save_checkpoint(tmp_path / "untrained.ckpt")
    of_trainer.fit(of_module, loader(), loader())
    trained, state = values(of_module.model), str(callback.controller.state_dict())
    of_trainer.validate(of_module, loader(shift=1), verbose=False)
    assert same(values(of_module.model), trained)
    assert str(callback.controller.state_dict()) == state


def test_validation_of_a_checkpoint_does_not_load_the_controller(tmp_path):
    of_module, of_trainer, callback = controlled(tmp_path)
    of_trainer.fit(of_module, loader(), loader())
    state = str(callback.controller.state_dict())
    of_trainer.validate(of_module, loader(), ckpt_path=tmp_path / "step=5.ckpt", verbose=False)
    assert str(callback.controller.state_dict()) == state
    fresh, of_fresh, later = controlled(tmp_path)
    of_fresh.validate(fresh, loader(), ckpt_path=tmp_path / "step=5.ckpt", verbose=False)
    of_fresh.fit(fresh, loader(), loader())
    assert later.controller.last_epoch == EPOCHS


@pytest.mark.parametrize("strategy", [lambda: "auto", late], ids=["early", "late"])
def test_each_fit_has_a_controller_of_its_own_and_loads_only_its_own_checkpoint(strategy, tmp_path):
    of_module, of_trainer, callback = controlled(tmp_path, strategy=strategy())
    of_trainer.fit(of_module, loader(), loader())
    first = callback.controller
    resumed = {"ckpt_path": tmp_path / "step=5.ckpt", "weights_only": False}
    of_trainer.fit(of_module, loader(), loader(), **resumed)
    assert callback.controller is not first
    assert callback.controller.last_epoch == EPOCHS
    of_trainer.fit_loop.max_epochs = EPOCHS + 1
    of_trainer.fit(controlled(tmp_path)[0], loader(), loader())
    assert callback.controller.last_epoch == 1
