"""Tables that Python, C++ and Triton must agree on, declared only here.

Triton's tables are built from them. The native library has its own tables, which are compared with :func:`text` when it
is loaded: an entry that exists on one side only is an error with a remedy, instead of a number in the wrong place.
"""

from __future__ import annotations

from typing import NamedTuple


class Role(NamedTuple):
    """Use of one of a parameter's tensors in the kernels.

    Args:
        dtype: ``"parameter"``: the parameter's; ``"state"``: float64 for float64 parameters, else float32; ``"step"``:
            float32, or float64 if that is torch's default; else the dtype's name.
        shaped: whether it has the shape of the parameter; else it has one element.
    """

    dtype: str
    shaped: bool = True


#: The order numbers the roles. ``state0`` … ``state2`` belong to the backbone, in the order of :data:`STATE_NAMES`.
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
    "mu_product": Role("step", shaped=False),
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

#: State entries whose role has another name.
ALIASES = {"grad_mean_prev": "previous", "direction_prev": "previous"}

#: State of each backbone, in the order of its update rule's arguments.
STATE_NAMES = {
    "SGD": ("momentum_buffer",),
    "AdamW": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "RAdam": ("exp_avg", "exp_avg_sq"),
    "NAdam": ("exp_avg", "exp_avg_sq"),
    "AdaBelief": ("exp_avg", "exp_avg_var", "max_exp_avg_var"),
}


def role_of(backbone: str, name: str) -> str:
    """Returns the role of an entry of a parameter's state."""
    order = STATE_NAMES[backbone]
    return f"state{order.index(name)}" if name in order else ALIASES.get(name, name)


class Structure(NamedTuple):
    """Compile-time structure of a backbone.

    Args:
        states: how many of ``state0`` … ``state2`` it has.
        is_lazy: whether the first update creates the state.
        stores_direction: whether Hypergradient must store the last direction, which does not follow from the state.
    """

    states: int
    is_lazy: bool = False
    stores_direction: bool = False


#: The order numbers the structures.
STRUCTURES = {
    "SgdPlain": Structure(0, stores_direction=True),
    "SgdMomentum": Structure(1, is_lazy=True),
    "SgdNesterov": Structure(1, is_lazy=True, stores_direction=True),
    "AdamWPlain": Structure(2),
    "AdamWAmsgrad": Structure(3),
    "RAdamPlain": Structure(2),
    "NAdamPlain": Structure(2, stores_direction=True),
    "AdaBeliefPlain": Structure(2),
    "AdaBeliefAmsgrad": Structure(3),
    "AdaBeliefRectify": Structure(2),
    "AdaBeliefRectifyAmsgrad": Structure(3),
}


class Hyper(NamedTuple):
    """Hyperparameters of a param group, as numbers.

    Args:
        lr_ref: reference rate of the group.
        lr_scale: largest reference rate of the groups that share the group's scalar gain.
        mu_decay: factor of one step in the warm-up of NAdam's momentum.
    """

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    dampening: float
    mu_decay: float
    lr_ref: float
    lr_scale: float


class Rule(NamedTuple):
    """Arguments of a policy, as numbers; NaN means None.

    Args:
        interval: 0 if only ``end_interval()`` ends an interval.
        per_tensor: 1 if each tensor has its own gain.
        lowest, highest: bounds of gains.
        holds: ActiveLR: 1 for ``on_zero="hold"``.
        source: TrainableLR: index in :data:`SOURCES`.
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


#: Policies that have kernels. The order numbers them.
POLICIES = ("ActiveLR", "TrainableLR", "Hypergradient")
SOURCES = ("displacement", "gradient", "preconditioned")

#: Results of a plan's checks: a step can be taken; a gradient cannot be used as it is; the plan has to be rebuilt.
#: The order numbers them.
READINESS = ("ready", "gradients", "stale")


def text() -> str:
    """Returns all tables, one per line, in the format of the native library's own tables."""
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
    """Describes how ``other``, the text of a library, differs from :func:`text`; "" if it does not."""
    for ours, theirs in zip(text().splitlines(), other.splitlines(), strict=False):
        here, there = set(ours.split()), set(theirs.split())
        if ours != theirs:
            more, fewer = sorted(there - here), sorted(here - there)
            return f"its {ours.split()[0]} differ from the package's (only there: {more}, only here: {fewer})"
    return "" if text() == other else "its tables differ from the package's"
