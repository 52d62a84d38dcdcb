"""Changes of an optimizer between two steps, as data, and a training with such changes."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fused_adaptive as fa
from fused_adaptive.schedules.aalr import reset

from ..common.cases import POLICIES, Gradients, parameters

Optimizer = fa.AdaptiveOptimizer
ACTIVE, TUPLE = fa.ActiveLR(interval=3), POLICIES["tlr-times-active"]


def groups_of(seed: int = 0) -> list[dict[str, Any]]:
    params = parameters(shapes=[(3,), (2, 2), (1,), (3,), (), (4,)], seed=seed)
    return [{"params": params[:4]}, {"params": params[4:], "lr": 0.02}]


def adamw() -> Optimizer:
    return fa.AdamW(groups_of(), lr=0.01, weight_decay=0.1, policy=ACTIVE)


def sgd(**arguments: Any) -> Callable[[], Optimizer]:
    return lambda: fa.SGD(groups_of(), lr=0.05, weight_decay=0.1, **arguments)


@dataclass(frozen=True)
class Change:
    """``visible``: whether a reference step with participants from before the change gives wrong results."""

    make: Callable[[Optimizer], Any]
    visible: bool = True
    build: Callable[[], Optimizer] = adamw


def first(o: Optimizer, index: int = 0) -> torch.Tensor:
    return o.param_groups[0]["params"][index]


def new_parameter() -> torch.Tensor:
    return torch.ones(2, dtype=torch.float64, requires_grad=True)


def set_in_group(**values: Any) -> Callable[[Optimizer], Any]:
    return lambda o: o.param_groups[0].update(values)


def set_in_state(name: str, change: Callable[[Any], Any], index: int = 0) -> Callable[[Optimizer], Any]:
    def make(o: Optimizer) -> None:
        o.state[first(o, index)][name] = change(o.state[first(o, index)][name])

    return make


def swap_states(o: Optimizer) -> None:
    p, q = first(o, 0), first(o, 3)
    o.state[p], o.state[q] = o.state[q], o.state[p]


def swap_keys(o: Optimizer) -> None:
    """Swaps the last two keys; the values keep their positions."""
    a, b = list(o.state)[-2:]
    o.state[b], o.state[a] = o.state.pop(a), o.state.pop(b)


def swap_entries(o: Optimizer) -> None:
    state = o.state[first(o)]
    state["exp_avg"], state["grad_sum"] = state["grad_sum"], state["exp_avg"]


def rename_the_last_entry(o: Optimizer) -> None:
    state = o.state[first(o)]
    name, value = state.popitem()
    state[f"old_{name}"] = value


def replace_state(o: Optimizer) -> None:
    o.state = defaultdict(dict, {p: dict(state) for p, state in o.state.items()})


def replace_state_deeply(o: Optimizer) -> None:
    o.state = defaultdict(dict, {p: copy.deepcopy(state) for p, state in o.state.items()})


CHANGES: dict[str, Change] = {
    # param groups
    "add_param_group": Change(lambda o: o.add_param_group({"params": [new_parameter()]})),
    "group appended": Change(lambda o: o.param_groups.append({**o.param_groups[0], "params": [new_parameter()]})),
    "group removed": Change(lambda o: o.param_groups.pop()),
    "groups reordered": Change(lambda o: o.param_groups.reverse(), visible=False),
    "group replaced": Change(lambda o: o.param_groups.__setitem__(0, {**o.param_groups[0], "lr": 0.3})),
    "groups replaced": Change(lambda o: setattr(o, "param_groups", [{**g, "lr": 0.3} for g in o.param_groups])),
    "params appended": Change(lambda o: o.param_groups[0]["params"].append(new_parameter())),
    "params removed": Change(lambda o: o.param_groups[0]["params"].pop(1)),
    "params exchanged": Change(lambda o: o.param_groups[0]["params"].__setitem__(1, new_parameter())),
    "params list replaced": Change(lambda o: set_in_group(params=o.param_groups[0]["params"][1:])(o)),
    # structure
    "amsgrad": Change(set_in_group(amsgrad=True)),
    "amsgrad of AdaBelief": Change(set_in_group(amsgrad=True), build=lambda: fa.AdaBelief(groups_of(), policy=ACTIVE)),
    "rectify": Change(set_in_group(rectify=False), False, lambda: fa.AdaBelief(groups_of(), policy=ACTIVE)),
    "nesterov": Change(set_in_group(nesterov=True), build=sgd(momentum=0.9, policy=fa.Hypergradient(1e-3))),
    "momentum set": Change(set_in_group(momentum=0.9), False, sgd()),
    "momentum cleared": Change(set_in_group(momentum=0), build=sgd(momentum=0.9, policy=fa.Hypergradient(1e-3))),
    "maximize": Change(set_in_group(maximize=True), False),
    "decoupled": Change(set_in_group(decoupled_weight_decay=False), False),
    "capturable": Change(set_in_group(capturable=True), False),
    "fused": Change(set_in_group(fused=True), False),
    # policies
    "policy": Change(set_in_group(policy=fa.ActiveLR(interval=2, high=0.5))),
    "policy of another class": Change(set_in_group(policy=fa.Hypergradient(1e-3))),
    "policy removed": Change(set_in_group(policy=None)),
    "policies": Change(set_in_group(policy=TUPLE)),
    "policy in place": Change(lambda o: o.param_groups[0]["policy"].update(interval=2)),
    "policies in place": Change(lambda o: o.param_groups[0]["policy"][1].update(high=0.5), build=sgd(policy=TUPLE)),
    # state
    "state cleared": Change(lambda o: o.state.clear()),
    "state cleared, plain SGD": Change(lambda o: o.state.clear(), False, sgd()),
    "state cleared, momentum": Change(lambda o: o.state.clear(), build=sgd(momentum=0.9)),
    "state reset": Change(reset),
    "state of one deleted": Change(lambda o: o.state.pop(first(o, 1))),
    "state of one emptied": Change(lambda o: o.state[first(o, 1)].clear()),
    "state of one copied": Change(lambda o: o.state.update({first(o): copy.deepcopy(o.state[first(o)])})),
    "states swapped": Change(swap_states),
    "keys swapped": Change(swap_keys, build=lambda: fa.AdamW(parameters(shapes=[(3,), (3,)]), policy=ACTIVE)),
    "state replaced": Change(replace_state, visible=False),
    "state replaced by a deep copy": Change(replace_state_deeply),
    "entry replaced": Change(set_in_state("exp_avg", torch.ones_like), visible=False),
    "entry of one element replaced": Change(set_in_state("exp_avg", torch.ones_like, 2), visible=False),
    "entry replaced by an equal one": Change(set_in_state("step", torch.clone), visible=False),
    "buffer replaced": Change(set_in_state("momentum_buffer", torch.ones_like), False, sgd(momentum=0.9)),
    "buffer deleted": Change(lambda o: o.state[first(o)].pop("momentum_buffer"), False, sgd(momentum=0.9)),
    "entry deleted": Change(lambda o: o.state[first(o)].pop("exp_avg")),
    "last entry deleted": Change(lambda o: o.state[first(o)].popitem()),
    "entry renamed": Change(rename_the_last_entry),
    "entries swapped": Change(swap_entries, visible=False),
    "entry added": Change(lambda o: o.state[first(o)].update(mine=torch.ones(2)), visible=False),
    "foreign state": Change(lambda o: o.state.update({"mine": {"a": 1}}), visible=False),
}
#: Changes that make a new optimizer: participants are dropped and not compared.
ANEW: dict[str, Callable[[Optimizer], Optimizer | None]] = {
    "load_state_dict": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "setstate": lambda o: o.__setstate__(o.__getstate__()),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
}


#: Changes that can fail after some of the others.
ONLY_AT_FIRST = ("policy in place", "states swapped")


class Run:
    """A training whose optimizer keeps its participants between steps, or does not."""

    def __init__(self, optimizer: Optimizer, keeps: bool, missing: float = 0.0) -> None:
        self.optimizer, self.keeps = optimizer, keeps
        self.gradients, self.steps = Gradients(missing=missing), 0
        self.seen = self.params()
        self.rates: list[Any] = []

    def params(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def forget(self) -> None:
        if not self.keeps:
            self.optimizer._participants = None

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.gradients.set(self.params(), self.steps)
            self.forget()
            self.optimizer.step()
            self.steps += 1
            self.forget()
            if self.steps % 4 == 0:
                self.optimizer.end_interval()
            self.rates.append(self.optimizer.learning_rates(per_tensor=True))

    def result(self) -> tuple[Any, ...]:
        """Returns everything to compare as plain values."""
        o, known = self.optimizer, {id(p) for p in self.seen}
        params = [*self.seen, *(p for p in self.params() if id(p) not in known)]
        states = [(str(k) if isinstance(k, str) else k.shape, plain(v)) for k, v in o.state.items()]
        groups = [{k: plain(v) for k, v in group.items() if k != "params"} for group in o.param_groups]
        return plain(params), states, groups, self.rates


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, dict):
        return {name: plain(v) for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value
