"""What Python, C++ and Triton have to agree on, declared here alone.

Triton's tables are made of it. The native library has its own tables, which are compared with :func:`text` when it is
loaded: what is added on one side only is an error with a remedy, never a number in the wrong place.
"""

from __future__ import annotations

from typing import NamedTuple


class Role(NamedTuple):
    """What a tensor of a parameter is to the kernels.

    Args:
        dtype: ``"parameter"`` its own; ``"state"`` float64 for float64 parameters, else float32; ``"step"`` float32, or
            float64 where that is torch's default; else the dtype's name.
        shaped: like the parameter; else of one element.
    """

    dtype: str
    shaped: bool = True


#: In the order of their numbers. ``state0`` … ``state2`` are the backbone's, in the order of :data:`STATE_NAMES`.
ROLES = {
    "param": Role("parameter"),
    "state0": Role("state"),
    "state1": Role("state"),
    "state2": Role("state"),
    "element_gain": Role("state"),
    "grad_sum": Role("state"),
    "grad_sign_prev": Role("int8"),
    "grad_mean_sum": Role("state"),
    "previous": Role("state"),
    "interval_start": Role("state"),
    "master_low": Role("int16"),
    "step": Role("step", shaped=False),
    "gain": Role("float64", shaped=False),
    "lr_sum": Role("float64", shaped=False),
    "lr_last": Role("float64", shaped=False),
    "active_step": Role("int64", shaped=False),
    "active_applied": Role("int64", shaped=False),
    "tlr_step": Role("int64", shaped=False),
    "tlr_applied": Role("int64", shaped=False),
    "tlr_applied_prev": Role("int64", shaped=False),
    "direction_valid": Role("int64", shaped=False),
    "rounding_step": Role("int64", shaped=False),
}

#: The names in a parameter's state that play a role of another name.
ALIASES = {"grad_mean_prev": "previous", "direction_prev": "previous"}

#: A backbone's state in the order that its rule takes it.
STATE_NAMES = {
    "SGD": ("momentum_buffer",),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "AdaBelief": ("exp_avg", "exp_avg_var", "max_exp_avg_var"),
}


def role_of(backbone: str, name: str) -> str:
    """The role of an entry of a parameter's state."""
    order = STATE_NAMES[backbone]
    return f"state{order.index(name)}" if name in order else ALIASES.get(name, name)


class Structure(NamedTuple):
    """A backbone's compile-time structure.

    Args:
        states: how many of ``state0`` … ``state2`` it has.
        is_lazy: its state is made by the first update.
        stores_direction: Hypergradient cannot tell the last direction from the state.
    """

    states: int
    is_lazy: bool = False
    stores_direction: bool = False


#: In the order of their numbers.
STRUCTURES = {
    "SgdPlain": Structure(0, stores_direction=True),
    "SgdMomentum": Structure(1, is_lazy=True),
    "SgdNesterov": Structure(1, is_lazy=True, stores_direction=True),
    "AdamWPlain": Structure(2),
    "AdamWAmsgrad": Structure(3),
    "RAdamPlain": Structure(2),
    "AdaBeliefPlain": Structure(2),
    "AdaBeliefAmsgrad": Structure(3),
    "AdaBeliefRectify": Structure(2),
    "AdaBeliefRectifyAmsgrad": Structure(3),
}


class Hyper(NamedTuple):
    """The numbers of a param group.

    Args:
        lr_ref: the group's reference rate.
        lr_scale: the largest one of the groups under the group's scalar gain.
    """

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    dampening: float
    lr_ref: float
    lr_scale: float


class Rule(NamedTuple):
    """A policy's arguments as numbers; NaN stands for None.

    Args:
        interval: 0: only ``end_interval()`` ends one.
        per_tensor: 1 where each tensor has a gain of its own.
        lowest, highest: of gains.
        holds: ActiveLR, 1 for ``on_zero="hold"``.
        source: TrainableLR, the place in :data:`SOURCES`.
    """

    interval: float
    per_tensor: float
    lowest: float
    highest: float
    increment: float
    high: float
    low: float
    holds: float
    c: float
    source: float
    eta: float
    hyper_lr: float


#: The policies that kernels know, in the order of their numbers.
POLICIES = ("ActiveLR", "TrainableLR", "Hypergradient")
SOURCES = ("displacement", "gradient", "preconditioned")

#: What a plan's checks come to, in the order of their numbers: a step can be taken; a gradient cannot be used as it
#: is; the plan has to be built anew.
READINESS = ("ready", "gradients", "stale")


def text() -> str:
    """All of it, a line a table, as the native library tells its own."""
    structures = [
        f"{name}:{s.states}{':lazy' * s.is_lazy}{':stores' * s.stores_direction}" for name, s in STRUCTURES.items()
    ]
    tables = {
        "roles": [f"{name}:{role.dtype}{':shaped' * role.shaped}" for name, role in ROLES.items()],
        "structures": structures,
        "hyper": Hyper._fields,
        "rule": Rule._fields,
        "policies": POLICIES,
        "sources": SOURCES,
        "readiness": READINESS,
    }
    return "".join(f"{name} {' '.join(entries)}\n" for name, entries in tables.items())


def difference(other: str) -> str:
    """Where the text of a library differs from :func:`text`, in words; "" if it does not."""
    for own, its in zip(text().splitlines(), other.splitlines(), strict=False):
        here, there = set(own.split()), set(its.split())
        if own != its:
            more, fewer = sorted(there - here), sorted(here - there)
            return f"its {own.split()[0]} differ from the package's (only there: {more}, only here: {fewer})"
    return "" if text() == other else "its tables differ from the package's"
