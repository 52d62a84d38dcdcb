"""Hugging Face's Trainer: a small GPT-2 on text equals the plain loop bit for bit, also when saved and resumed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_adaptive as fa

from .common import needs, plain_loop, same, values

pytestmark = [needs("transformers"), needs("accelerate"), pytest.mark.filterwarnings("ignore")]
feature = pytest.mark.feature("Hugging Face Trainer")
every_backend = pytest.mark.parametrize("backend", [n for n, why in fa.backends.available(["cpu"]).items() if not why])

TEXT = (Path(__file__).parents[2] / "LICENSE").read_bytes()
LENGTH, BATCH, EPOCH, EPOCHS = 16, 8, 5, 3  # 5 steps an epoch
CLIP = 0.4


def dataset() -> list[dict[str, Tensor]]:
    rows = [torch.tensor(list(TEXT[i : i + LENGTH])) for i in range(0, BATCH * EPOCH * LENGTH, LENGTH)]
    return [{"input_ids": row, "labels": row} for row in rows]


def gpt2() -> nn.Module:
    transformers = import_module("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 128, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **no_dropout, bos_token_id=0, eos_token_id=0))


def recorded(model: nn.Module) -> list[dict[str, Any]]:
    """Records the arguments of the model's calls: batches in the Trainer's order."""
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, __, arguments: calls.append(dict(arguments)), with_kwargs=True)
    return calls


def trainer(model: nn.Module, folder: Path, accumulate: int = 1, **arguments: Any) -> Any:
    transformers = import_module("transformers")
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.01,
        weight_decay=0.1,
        warmup_steps=2,
        max_grad_norm=CLIP,
        save_steps=4,  # in the middle of an interval
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    return transformers.Trainer(model, settings, train_dataset=dataset(), **arguments)


def linear(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return import_module("transformers").get_linear_schedule_with_warmup(optimizer, 2, EPOCHS * EPOCH)


def plain(
    build: Callable[[nn.Module], fa.AdaptiveOptimizer],
    calls: list[dict[str, Any]],
    clip: float | None = CLIP,
    accumulate: int = 1,
) -> list[Tensor]:
    """Trains in a plain loop over the Trainer's batches. Intervals without a length end with the epochs."""
    model = gpt2()
    optimizer = build(model)
    by_hand = fa.policies.from_plain(optimizer.param_groups[0]["policy"])[0].interval is None
    return plain_loop(
        model,
        optimizer,
        linear(optimizer),
        calls,
        lambda call: model(**call).loss,
        clip=clip,
        epoch=EPOCH,
        at_epoch_end=optimizer.end_interval if by_hand else lambda: None,
        accumulate=accumulate,
    )


POLICIES = {
    "active": fa.ActiveLR(interval=3),
    "both": (fa.TrainableLR(interval=2), fa.ActiveLR(interval=3)),
    "tlr": fa.TrainableLR(interval=4, granularity="tensor", source="preconditioned"),
}


@feature
@every_backend
@pytest.mark.parametrize("policy", ["active", *(pytest.param(p, marks=pytest.mark.heavy) for p in ("both", "tlr"))])
def test_with_optimizers(policy, backend, tmp_path):
    """``optimizers=(optimizer, scheduler)`` with at least two interval ends, clipping, and a warm-up."""

    def build(model: nn.Module) -> fa.AdaptiveOptimizer:
        groups = fa.param_groups(model, 0.1)
        return fa.AdamW(groups, lr=0.01, policy=POLICIES[policy], backend=backend)

    def start() -> tuple[nn.Module, Any]:
        model = gpt2()
        optimizer = build(model)
        return model, trainer(model, tmp_path, optimizers=(optimizer, linear(optimizer)))

    model, of_model = start()
    calls = recorded(model)
    of_model.train()
    assert len(calls) == EPOCHS * EPOCH
    assert same(values(model), plain(build, calls))
    assert not same(values(model), plain(build, calls, clip=None))
    resumed, of_resumed = start()
    later = recorded(resumed)
    of_resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(later) == EPOCHS * EPOCH - 4
    assert same(values(model), values(resumed))


@feature
@every_backend
def test_with_optimizer_cls_and_intervals_that_end_with_the_epoch(backend, tmp_path):
    """``optimizer_cls_and_kwargs=(class, arguments)``, and the callback that ends the interval."""
    from fused_adaptive.integrations.transformers import EndIntervalCallback

    arguments = {"interval": None, "lr": 0.01, "backend": backend}

    def start(*callbacks: Any) -> tuple[nn.Module, Any]:
        model = gpt2()
        choice = {"optimizer_cls_and_kwargs": (fa.ActiveAdamW, arguments), "callbacks": list(callbacks)}
        return model, trainer(model, tmp_path, **choice)

    model, of_model = start(EndIntervalCallback())
    calls = recorded(model)
    of_model.train()
    names = of_model.get_decay_parameter_names(model)

    def build(model: nn.Module) -> fa.AdaptiveOptimizer:
        named = list(model.named_parameters())
        decays = [p for name, p in named if name in names], [p for name, p in named if name not in names]
        groups = [{"params": params, "weight_decay": wd} for params, wd in zip(decays, (0.1, 0.0), strict=True)]
        return fa.ActiveAdamW(groups, **arguments)

    assert same(values(model), plain(build, calls))
    without, of_without = start()
    of_without.train()
    assert not same(values(model), values(without))
    resumed, of_resumed = start(EndIntervalCallback())
    of_resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(values(model), values(resumed))


def test_gradient_accumulation(tmp_path):
    model = gpt2()
    build = lambda model: fa.ActiveAdamW(model.parameters(), lr=0.01, interval=2)  # noqa: E731
    optimizer = build(model)
    calls = recorded(model)
    trainer(model, tmp_path, accumulate=2, optimizers=(optimizer, linear(optimizer))).train()
    assert len(calls) == 2 * EPOCHS * EPOCH
    assert same(values(model), plain(build, calls, accumulate=2))


def test_the_callback_refuses_an_optimizer_of_another_package(tmp_path):
    from fused_adaptive.integrations.transformers import EndIntervalCallback

    with pytest.raises(TypeError, match="is no optimizer of fused_adaptive"):
        trainer(gpt2(), tmp_path, callbacks=[EndIntervalCallback()]).train()


def controlled(
    folder: Path,
    kind: Callable[[Any, nn.Module], Any] = lambda optimizer, _: fa.ASLR(optimizer, jitter=False),
    metric: str = "eval_loss",
    evaluate_on: Any = None,
    **settings: Any,
) -> tuple[Any, Any, list[Any]]:
    """A Trainer with a controller, which evaluates after each of three epochs; the controller; the costs it hears."""
    transformers = import_module("transformers")
    from fused_adaptive.integrations.transformers import ControllerCallback, IdleScheduler

    model = gpt2()
    optimizer = fa.AdamW(model.parameters(), lr=0.01)
    controller = kind(optimizer, model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        **{"num_train_epochs": EPOCHS, "eval_strategy": "epoch", "save_strategy": "no", **settings},
    )
    pair, callback = (optimizer, IdleScheduler(controller)), ControllerCallback(controller, metric)
    data = {"train_dataset": dataset(), "eval_dataset": evaluate_on or dataset()[:BATCH]}
    of_model = transformers.Trainer(model, arguments, **data, optimizers=pair, callbacks=[callback])
    heard: list[Any] = []
    step = controller.step
    controller.step = lambda cost: (heard.append(cost), step(cost))
    return of_model, controller, heard


def logged(of_model: Any, metric: str) -> list[Any]:
    return [entry[metric] for entry in of_model.state.log_history if metric in entry]


def aalr(optimizer: Any, model: nn.Module) -> fa.AALR:
    return fa.AALR(optimizer, model, initial_loss=9.0, lr=0.001)


def unlike_the_training() -> list[dict[str, Tensor]]:
    """Data with a loss at which AALR goes back to the untrained model."""
    return [{**row, "labels": 127 - row["labels"]} for row in dataset()[:BATCH]]


@pytest.mark.parametrize("metric", ["eval_loss", "eval_runtime"])
def test_a_controller_gets_evaluation_results_and_is_saved(metric, tmp_path):
    of_model, controller, heard = controlled(tmp_path, metric=metric, save_strategy="epoch")
    of_model.train()
    assert len(heard) == EPOCHS
    assert heard == logged(of_model, metric)
    of_resumed, resumed, _ = controlled(tmp_path, metric=metric, save_strategy="epoch")
    of_resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{EPOCH}"))
    if metric == "eval_loss":
        assert resumed.state_dict() == controller.state_dict()


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_evaluations_before_and_after_training_leave_the_controller_and_the_model_alone(strategy, tmp_path):
    of_model, controller, heard = controlled(tmp_path, aalr, eval_strategy=strategy)
    of_model.evaluate(metric_key_prefix="eval" if strategy == "epoch" else "test")
    assert not heard
    of_model.train()
    assert len(heard) == (EPOCHS if strategy == "epoch" else 0)
    trained, state = values(of_model.model), str(controller.state_dict())
    of_model.evaluate(unlike_the_training())
    assert same(values(of_model.model), trained)
    assert str(controller.state_dict()) == state


def test_the_evaluation_at_the_start_is_no_epoch_also_after_a_training_that_was_interrupted(tmp_path):
    transformers = import_module("transformers")

    class Interrupt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    of_model, _, heard = controlled(tmp_path, eval_on_start=True)
    of_model.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        of_model.train()
    of_model.remove_callback(Interrupt)
    of_model.train()
    assert heard == logged(of_model, "eval_loss")[1:]
    assert len(heard) == EPOCHS


def test_a_second_evaluation_without_a_step_in_between_is_not_heard(tmp_path):
    transformers = import_module("transformers")
    of_model, _, heard = controlled(tmp_path)

    class Again(transformers.TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            of_model.evaluate()

    of_model.add_callback(Again)
    of_model.train()
    assert heard == logged(of_model, "eval_loss")[1::2]
    assert len(heard) == EPOCHS


def test_an_evaluation_after_an_interrupted_step_leaves_the_model_alone(tmp_path):
    of_model, _, heard = controlled(tmp_path, aalr)
    steps = iter(range(2 * EPOCH - 1))

    def interrupt(module: nn.Module, arguments: Any) -> None:
        if module.training and next(steps, None) is None:
            raise KeyboardInterrupt

    hook = of_model.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        of_model.train()
    hook.remove()
    trained = values(of_model.model)
    of_model.evaluate(unlike_the_training())
    assert same(values(of_model.model), trained)
    assert len(heard) == 1


def test_of_a_dict_of_datasets_the_controller_gets_the_one_that_the_metric_names(tmp_path):
    sets = {"a": dataset()[:BATCH], "b": unlike_the_training()}
    for name in sets:
        metric = f"eval_{name}_loss"
        of_model, _, heard = controlled(tmp_path, metric=metric, evaluate_on=sets)
        of_model.train()
        assert heard == logged(of_model, metric)
        assert len(heard) == EPOCHS


def test_evaluations_without_the_metric_that_other_callbacks_ask_for_are_skipped(tmp_path):
    transformers = import_module("transformers")
    of_model, _, heard = controlled(tmp_path)

    class Tests(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            of_model.evaluate(metric_key_prefix="test")

    of_model.add_callback(Tests)
    of_model.train()
    assert len(logged(of_model, "test_loss")) == EPOCHS * EPOCH
    assert heard == logged(of_model, "eval_loss")
    assert len(heard) == EPOCHS


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_a_metric_that_no_evaluation_reports_is_refused_before_the_next_step(names, epochs, tmp_path):
    sets = {name: dataset()[:BATCH] for name in names}
    of_model, _, _ = controlled(tmp_path, metric="eval_los", evaluate_on=sets, num_train_epochs=epochs)
    keys = ".*".join(f"eval_{name}_loss" for name in names) or "eval_loss"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"no evaluation has reported 'eval_los'.* Pass metric=.*{keys}"):
            of_model.train()
        assert of_model.state.global_step == EPOCH


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_the_scheduler_for_the_trainer_can_be_copied(copied):
    scheduler = import_module("fused_adaptive.integrations.transformers").IdleScheduler
    optimizer = fa.SGD(gpt2().parameters(), lr=0.1)
    controller = fa.ASLR(optimizer)
    idle = copied(scheduler(controller))
    idle.step()
    assert idle.get_last_lr() == [0.1]
    assert idle.state_dict() == controller.state_dict()
