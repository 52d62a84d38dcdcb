"""The learning-rate range test finds useful rates, and changes nothing."""

from __future__ import annotations

import copy
import math
import random

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import fused_adaptive as fa
from fused_adaptive.schedules import RangeTest

from .common import Net, StepsInGroup, epoch, one_thread, same, values  # noqa: F401


def loader(batches: int = 7) -> list:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(32, 4, generator=generator) for _ in range(batches)]
    return [(x, x.sum(1, keepdim=True)) for x in inputs]


OPTIMIZERS = {
    "ours": lambda p: fa.SGD(p, lr=torch.tensor(0.3), momentum=0.9, policy=fa.ActiveLR(interval=3)),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.3),
    "steps in the group": lambda p: StepsInGroup(p, lr=0.3),
    "AdamW": lambda p: torch.optim.AdamW([{"params": list(p), "lr": 0.3}], lr=1.0),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_everything_is_restored(build, trained):
    model = Net()
    optimizer = build(model.parameters())
    if trained:
        epoch(model, optimizer, 0)
    model.eval()
    rate, grads = optimizer.param_groups[0]["lr"], [p.grad for p in model.parameters()]
    before = copy.deepcopy((values(model), optimizer.state_dict(), torch.get_rng_state()))
    test = fa.lr_range_test(model, optimizer, loader(), nn.functional.mse_loss, steps=12, max_lr=0.5)
    assert len(test.lrs) == 12
    assert same((values(model), optimizer.state_dict(), torch.get_rng_state()), before)
    assert not model.training
    assert optimizer.param_groups[0]["lr"] is rate
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    model.train()
    epoch(model, optimizer, 1)  # training can continue


def test_everything_is_restored_when_a_step_raises():
    model = Net()
    optimizer = fa.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy((values(model), optimizer.state_dict()))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fa.lr_range_test(model, optimizer, [*loader(3), (torch.ones(2, 5), torch.ones(2, 1))], nn.functional.mse_loss)
    assert same((values(model), optimizer.state_dict()), before)


class Augmented(torch.utils.data.Dataset):
    """Draws from the generators that data sets draw from."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(4) + random.random() + np.random.rand(), torch.ones(1)


@pytest.mark.parametrize("seeded", ["loader", "sampler"])
def test_random_numbers_continue_as_before(seeded):
    generator, data = torch.Generator().manual_seed(3), Augmented()
    if seeded == "loader":
        batches = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    else:
        sampler = torch.utils.data.RandomSampler(data, generator=generator)
        batches = torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)

    def draw() -> list:
        return [random.random(), np.random.rand(), torch.rand(1), torch.rand(1, generator=generator), *batches]

    model = Net()
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), generator.get_state()
    expected = draw()
    setters = random.setstate, np.random.set_state, torch.set_rng_state, generator.set_state
    for set_state, state in zip(setters, before, strict=True):
        set_state(state)  # pyright: ignore
    fa.lr_range_test(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, nn.functional.mse_loss, steps=5)
    assert same(draw(), expected)


def test_a_logger_does_not_see_the_test():
    written = []

    class Writer:
        def add_scalar(self, *what):
            written.append(what)

    model = Net()
    optimizer = fa.ActiveSGD(model.parameters(), lr=0.1, interval=2)
    logger = fa.log_learning_rates(optimizer, Writer())
    fa.lr_range_test(model, optimizer, loader(), nn.functional.mse_loss, steps=5, max_lr=0.1)
    assert (logger.steps, written) == (0, [])
    epoch(model, optimizer, 0, steps=2)
    assert (logger.steps, len(written)) == (2, 3)


def test_buffers_that_a_forward_pass_replaces_or_adds_are_restored():
    class Replaces(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = self.seen + 1
            self.register_buffer("cache", x)
            return self.layers(x)

    model = Replaces()
    before, seen = values(model), model.seen
    fa.lr_range_test(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader(), nn.functional.mse_loss, steps=3, max_lr=0.1
    )
    assert same(values(model), before)
    assert model.seen is seen


def test_parameters_of_the_loss_are_restored():
    model, scale = Net(), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    scale.grad = grad = torch.ones(())
    fa.lr_range_test(model, optimizer, loader(), lambda y, t: (scale * (y - t)).square().mean(), steps=3, max_lr=0.1)
    assert scale.item() == grad.item() == 1
    assert scale.grad is grad


def test_finds_the_rates_at_which_a_quadratic_falls_and_diverges():
    """Gradient descent on a noisy ``λ/2·p²`` with λ = 10 diverges above lr = 2/λ."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.full((1, 1), math.sqrt(10)), torch.full((1, 1), noise)) for noise in (0.1, -0.1, -0.1, 0.1)]
    loss = lambda y, t: nn.functional.mse_loss(y, t) / 2  # noqa: E731
    test = fa.lr_range_test(model, optimizer, batches, loss, min_lr=1e-4, max_lr=10.0, steps=200, scale="exponential")
    assert len(test.lrs) < 200, "it stops when it diverges"
    assert test.lrs == sorted(test.lrs)
    assert test.lrs[1] / test.lrs[0] == pytest.approx(test.lrs[-1] / test.lrs[-2])
    low, high = test.bounds()
    assert 1e-4 < low < 0.02
    assert 0.15 < high < 0.6
    assert test.suggestion == pytest.approx(math.sqrt(low * high))
    linear = fa.lr_range_test(model, optimizer, batches, loss, min_lr=1e-4, max_lr=0.1, steps=50)
    assert linear.lrs[-1] == pytest.approx(0.1)
    assert linear.lrs[2] - linear.lrs[1] == pytest.approx(linear.lrs[1] - linear.lrs[0])
    assert linear.suggestion == pytest.approx(sum(linear.bounds()) / 2)


def test_draws_a_plot():
    matplotlib.use("Agg")
    test = RangeTest(
        lrs=[1e-3 * 2**i for i in range(10)], losses=[2, 2, 1.8, 1.5, 1.2, 1, 0.9, 1, 2, 5], scale="linear"
    )
    axes = test.plot()
    assert axes.get_xlabel() == "learning rate"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any(label.startswith("suggestion") for label in labels)
    plt.close(axes.figure)


def test_a_loss_that_never_falls_has_no_suggestion():
    with pytest.raises(ValueError, match="never falls"):
        RangeTest(lrs=[1e-3, 1e-2], losses=[1.0, 2.0]).bounds()


@pytest.mark.parametrize(
    "arguments", [{"min_lr": 0.0}, {"min_lr": 1.0, "max_lr": 0.1}, {"max_lr": math.inf}, {"steps": 1}, {"scale": "log"}]
)
def test_bad_arguments(arguments):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="lr_range_test needs 0 < min_lr < max_lr"):
        fa.lr_range_test(model, optimizer, loader(), nn.functional.mse_loss, **arguments)


def test_an_empty_loader_and_a_controlled_optimizer_are_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="yields no batch"):
        fa.lr_range_test(model, optimizer, iter(()), nn.functional.mse_loss)
    controller = fa.ASLR(optimizer)
    with pytest.raises(RuntimeError, match="before you build it"):
        fa.lr_range_test(model, optimizer, loader(), nn.functional.mse_loss)
    assert controller.center == 0.1


def test_a_buffer_that_cannot_be_restored_is_refused_before_anything_moves():
    model = nn.Linear(4, 1)
    with torch.inference_mode():
        model.register_buffer("scale", torch.ones(()))
    before = values(model)
    optimizer, batch = torch.optim.SGD(model.parameters(), lr=0.1), (torch.ones(8, 4), torch.ones(8, 1))
    with pytest.raises(RuntimeError, match=r"'scale' was made in torch\.inference_mode\(\)"):
        fa.lr_range_test(model, optimizer, [batch], nn.functional.mse_loss, steps=4)
    assert same(values(model), before)


def test_a_plot_of_a_loss_that_never_falls_has_no_suggestion():
    """Here the first smoothed loss is below the first loss, by a rounding."""
    matplotlib.use("Agg")
    loss = 1.6914923853808896
    test = RangeTest([1e-4, 1e-3, 1e-2], [loss, loss + 1, loss + 2], "exponential")
    assert test.smoothed()[0] < loss
    axes = test.plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["loss", "smoothed"]
    plt.close(axes.figure)


def test_a_model_without_parameters_is_refused_before_anything_changes():
    head = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    model = nn.Identity()
    model.eval()
    before = values(head)
    batches = iter(loader())
    with pytest.raises(ValueError, match="lr_range_test: Identity has no parameters to train"):
        fa.lr_range_test(model, optimizer, batches, lambda y, t: nn.functional.mse_loss(head(y), t))
    assert same(values(head), before)
    assert not model.training
    assert len(list(batches)) == 7
