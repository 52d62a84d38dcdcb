"""Rates are logged for TensorBoard once per interval, with one transfer."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_adaptive as fa
from fused_adaptive.engine import rates
from fused_adaptive.training import logging as rate_logging

from ..common.breaking import broken, fails
from ..common.cases import Gradients, parameters, train


class Recorder:
    """A writer that records values, and counts transfers of gains."""

    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, tag, value, step):
        assert isinstance(value, float)
        self.written.append((tag, value, step))

    def steps(self) -> list[int]:
        return sorted({step for _, _, step in self.written})


@pytest.fixture
def transfers(monkeypatch):
    sizes = []
    to_host = rates.to_host

    def counted(values):
        sizes.append(len({v.device for v in values}))
        return to_host(values)

    monkeypatch.setattr(rates, "to_host", counted)
    return sizes


def adamw(policy, **arguments):
    return fa.AdamW(parameters(torch.float32), lr=0.01, policy=policy, **arguments)


@pytest.mark.feature("log_learning_rates: one transfer an interval")
def test_rates_are_written_at_the_ends_of_intervals_with_one_transfer_each(transfers):
    writer, optimizer = Recorder(), adamw(fa.ActiveLR(interval=3))
    fa.log_learning_rates(optimizer, writer)
    for step in range(10):
        train(optimizer, 1, start=step)
        if (step + 1) % 3 == 0:
            rates_now = optimizer.learning_rates()[0]
            transfers.pop()  # the transfer of this comparison
            assert writer.written[-3:] == [(f"learning_rate/0/{k}", rates_now[k], step + 1) for k in rates.KEYS]
    assert writer.steps() == [3, 6, 9]
    assert transfers == [1, 1, 1]


class NoGainIsRead(TorchDispatchMode):
    """Fails if a number that is not a count is read on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_read = func is torch.ops.aten._local_scalar_dense.default
        assert not (is_read and args[0].is_floating_point()), "a gain was read"
        return func(*args, **(kwargs or {}))


def nothing_is_read_between_the_ends() -> bool:
    optimizer = adamw(fa.ActiveLR(interval=3))
    nothing = type("Nothing", (), {"name": "nothing", "step": staticmethod(lambda *_: None)})
    train(optimizer, 1)
    logger = fa.log_learning_rates(optimizer, Recorder())
    optimizer._step_backend = nothing  # type: ignore[assignment]
    with NoGainIsRead():
        for _ in range(5):  # counts do not change, so no interval ends
            optimizer.step()
    return logger.steps == 5


def test_steps_within_an_interval_read_nothing():
    assert nothing_is_read_between_the_ends()
    after_step = rate_logging.RateLogger._after_step

    def with_a_look(self):
        optimizer = self._optimizer
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["element_gain"].sum().item()
        after_step(self)

    with broken(rate_logging.RateLogger, "_after_step", with_a_look):
        assert fails(nothing_is_read_between_the_ends)


def test_intervals_of_two_policies_and_groups():
    writer = Recorder()
    params = parameters(torch.float32)
    both = (fa.TrainableLR(interval=2), fa.ActiveLR(interval=3))
    optimizer = fa.AdamW([{"params": params[:2], "policy": both}, {"params": params[2:], "policy": None, "lr": 0.5}])
    fa.log_learning_rates(optimizer, writer, tag="rate", start=100)
    train(optimizer, 6)
    assert writer.steps() == [102, 103, 104, 106]
    assert {tag for tag, _, _ in writer.written} == {f"rate/{i}/{k}" for i in (0, 1) for k in rates.KEYS}
    assert {value for tag, value, _ in writer.written if tag.startswith("rate/1")} == {0.5}


@pytest.mark.parametrize("on_host", [True, False])
def test_skipped_steps_delay_the_end_of_an_interval(on_host, monkeypatch):
    monkeypatch.setattr(rate_logging, "_is_on_host", lambda counter: on_host)
    writer = Recorder()
    optimizer = adamw(fa.ActiveLR(interval=3), fused=True)
    fa.log_learning_rates(optimizer, writer)
    for step in range(12):
        Gradients().set(optimizer.param_groups[0]["params"], step)
        optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
        optimizer.found_inf = torch.tensor(float(step in (3, 7)))  # type: ignore[attr-defined]
        optimizer.step()
    assert writer.steps() == [3, 7, 11]


def test_counts_on_a_gpu_are_read_once_per_interval(monkeypatch):
    monkeypatch.setattr(rate_logging, "_is_on_host", lambda counter: False)
    reads = []
    to_host = rate_logging.to_host
    monkeypatch.setattr(rate_logging, "to_host", lambda values: reads.append(1) or to_host(values))
    writer, optimizer = Recorder(), adamw(fa.ActiveLR(interval=4))
    fa.log_learning_rates(optimizer, writer)
    train(optimizer, 21)
    assert writer.steps() == [4, 8, 12, 16, 20]
    assert len(reads) == 1 + 5  # the first step reads the position in the interval


def test_intervals_of_one_step_and_after_loading_a_checkpoint():
    writer, optimizer = Recorder(), adamw(fa.ActiveLR(interval=1))
    fa.log_learning_rates(optimizer, writer)
    train(optimizer, 3)
    assert writer.steps() == [1, 2, 3]
    saved = adamw(fa.ActiveLR(interval=3))
    train(saved, 2)
    writer, resumed = Recorder(), adamw(fa.ActiveLR(interval=3))
    resumed.load_state_dict(saved.state_dict())
    fa.log_learning_rates(resumed, writer, start=2)
    train(resumed, 4, start=2)
    assert writer.steps() == [3, 6]


def test_ends_by_hand_and_removal():
    writer, optimizer = Recorder(), adamw(fa.ActiveLR(interval=None))
    logger = fa.log_learning_rates(optimizer, writer)
    train(optimizer, 3)
    assert not writer.written
    optimizer.end_interval()
    assert writer.steps() == [3]
    logger.write()
    assert len(writer.written) == 6
    logger.remove()
    train(optimizer, 1, start=3)
    optimizer.end_interval()
    assert len(writer.written) == 6
    assert "end_interval" not in vars(optimizer)


def test_an_end_by_hand_shifts_the_following_ends():
    writer, optimizer = Recorder(), adamw(fa.ActiveLR(interval=3))
    fa.log_learning_rates(optimizer, writer)
    train(optimizer, 1)
    optimizer.end_interval()
    train(optimizer, 4, start=1)
    assert writer.steps() == [1, 4]


def test_a_restarted_interval_has_not_ended():
    writer, optimizer = Recorder(), adamw(fa.ActiveLR(interval=4))
    fa.log_learning_rates(optimizer, writer)
    train(optimizer, 3)
    optimizer.restart_interval()
    train(optimizer, 6, start=3)
    assert writer.steps() == [7]


def test_a_step_that_is_skipped_after_an_end_by_hand_ends_nothing():
    writer, optimizer = Recorder(), adamw(fa.ActiveLR(interval=3), fused=True)
    fa.log_learning_rates(optimizer, writer)
    train(optimizer, 1)
    optimizer.end_interval()
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    train(optimizer, 1, start=1)
    assert writer.steps() == [1]


def test_rates_are_written_every_n_steps_without_intervals():
    optimizer = adamw(fa.Hypergradient(1e-4))
    with pytest.raises(ValueError, match="pass every="):
        fa.log_learning_rates(optimizer, Recorder())
    with pytest.raises(ValueError, match="at least 1"):
        fa.log_learning_rates(optimizer, Recorder(), every=0)
    writer = Recorder()
    fa.log_learning_rates(optimizer, writer, every=4)
    train(optimizer, 9)
    assert writer.steps() == [4, 8]


def test_rates_of_tensors_and_groups_need_one_transfer(transfers):
    optimizer = fa.AdamW(
        [{"params": [p], "lr": torch.tensor(0.01)} for p in parameters(torch.float32)],
        policy=fa.TrainableLR(interval=2, granularity="tensor"),
    )
    train(optimizer, 6)
    rates_of_groups = optimizer.learning_rates(per_tensor=True)
    assert transfers == [1]
    for group, rate in zip(optimizer.param_groups, rates_of_groups, strict=True):
        gain = optimizer.state[group["params"][0]]["gain"].item()
        if group["params"][0].numel():
            assert rate["tensors"][0]["mean"] == float(group["lr"]) * gain


@pytest.mark.parametrize("writer", [print, None, type("Wandb", (), {"log": print})()])
def test_a_writer_without_add_scalar_is_refused_at_once(writer):
    optimizer = adamw(fa.ActiveLR(interval=3))
    with pytest.raises(TypeError, match=r"writer must have add_scalar\(tag, value, step\).*wrap it in an object"):
        fa.log_learning_rates(optimizer, writer)
    assert not optimizer._shared.after_step


def test_a_writer_that_fails_does_not_fail_the_step_or_other_loggers():
    class Full:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            raise OSError("disk full")

    optimizer, writer = adamw(fa.ActiveLR(interval=2)), Recorder()
    fa.log_learning_rates(optimizer, Full(), every=1)
    logger = fa.log_learning_rates(optimizer, writer, every=1)
    with pytest.warns(UserWarning, match="the rates are not logged: OSError: disk full"):
        train(optimizer, 3)
    assert logger.steps == 3
