"""The keyword arguments that all optimizers share: shown by ``inspect.signature``, and no others taken."""

from __future__ import annotations

import inspect

import pytest
import torch

import fused_adaptive as fa
from fused_adaptive.optimizers.options import OF_GROUPS, OF_OPTIMIZER, Options

PLAIN = [fa.SGD, fa.Adam, fa.AdamW, fa.RAdam, fa.NAdam, fa.AdaBelief]
NAMESAKES = [(fa.SGD, torch.optim.SGD), (fa.Adam, torch.optim.Adam), (fa.AdamW, torch.optim.AdamW)]


def positional(cls: type) -> list[str]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [name for name, p in inspect.signature(cls).parameters.items() if p.kind == kind]


def test_every_option_has_a_default():
    assert {*OF_GROUPS, *OF_OPTIMIZER} == set(Options.__annotations__)


@pytest.mark.parametrize("cls", PLAIN)
def test_signatures_show_the_options_with_their_defaults(cls):
    shown = inspect.signature(cls).parameters
    assert {name: shown[name].default for name in Options.__annotations__} == {**OF_GROUPS, **OF_OPTIMIZER}
    assert all(p.kind != inspect.Parameter.VAR_KEYWORD for p in shown.values())


@pytest.mark.parametrize(("ours", "theirs"), [*NAMESAKES, (fa.RAdam, torch.optim.RAdam), (fa.NAdam, torch.optim.NAdam)])
def test_positional_arguments_are_those_of_torch(ours, theirs):
    assert positional(ours) == positional(theirs)


@pytest.mark.parametrize("cls", [*PLAIN, fa.ActiveAdamW])
def test_an_unknown_argument_is_named(cls):
    arguments = {"interval": 2} if cls is fa.ActiveAdamW else {}
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        cls([torch.zeros(2, requires_grad=True)], momentun=0.9, **arguments)
