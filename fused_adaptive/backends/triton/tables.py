"""Tables of a plan on the device: addresses of tensors, chunks, rules, and scratch memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...core import declarations
from ...core.declarations import ROLES
from ...core.view import CHUNK, ParamView
from ...policies import ActiveLR, Hypergradient, Policy, TrainableLR
from .. import plans
from . import fields, math
from .counts import COUNTERS

#: Columns of a tensor's row, by the roles of plans.collect_state.
COLUMNS = {role: column for column, role in enumerate(ROLES)}
KINDS = {ActiveLR: fields.ACTIVE_LR, TrainableLR: fields.TRAINABLE_LR, Hypergradient: fields.HYPERGRADIENT}
SOURCES = {"displacement": fields.DISPLACEMENT, "gradient": fields.GRADIENT, "preconditioned": fields.PRECONDITIONED}


@dataclass(frozen=True)
class Structure:
    """Backbone in the kernels: its functions, its number of state arrays, and the traits that select its scalars."""

    update: Any
    direction: Any
    states: int
    traits: int


_MOMENTS = fields.HAS_MOMENTS.value
_RECTIFIES = _MOMENTS | fields.RECTIFIES.value
_AT_FIVE = _RECTIFIES | fields.AT_FIVE.value

_RULES: dict[str, tuple[Any, Any, int]] = {
    "SgdPlain": (math.sgd_plain, None, 0),
    "SgdMomentum": (math.sgd_momentum, math.momentum, 0),
    "SgdNesterov": (math.sgd_nesterov, None, 0),
    "AdamWPlain": (math.adam, math.quotient, _MOMENTS),
    "AdamWAmsgrad": (math.adam_amsgrad, math.quotient_of_max, _MOMENTS),
    "RAdamPlain": (math.adam, math.quotient, _RECTIFIES),
    "NAdamPlain": (math.nadam, None, _MOMENTS),
    "AdaBeliefPlain": (math.belief, math.quotient, _MOMENTS),
    "AdaBeliefAmsgrad": (math.belief_amsgrad, math.quotient_of_max, _MOMENTS),
    "AdaBeliefRectify": (math.belief, math.quotient, _AT_FIVE),
    "AdaBeliefRectifyAmsgrad": (math.belief_amsgrad, math.quotient_of_max, _AT_FIVE),
}
STRUCTURES = {
    name: Structure(update, direction, declarations.STRUCTURES[name].states, traits)
    for name, (update, direction, traits) in _RULES.items()
}

#: Storage type of parameters and type of the arithmetic, by dtype. bfloat16 is loaded as its bits.
STORED = {
    torch.float64: (tl.float64, tl.float64),
    torch.float32: (tl.float32, tl.float32),
    torch.bfloat16: (tl.uint16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
}


@dataclass(frozen=True)
class Kind:
    """Properties that the tensors of one update launch share."""

    structure: Structure
    adds_mean: bool
    scales: bool
    stores: bool
    coupled: bool
    dtype: torch.dtype

    @property
    def arrays(self) -> int:
        """Number of arrays that a step reads."""
        return 2 + self.structure.states + 2 * self.scales + self.adds_mean

    def constants(self) -> dict[str, Any]:
        """Returns the compile-time arguments of kernels.update except sizes."""
        stored, computed = STORED[self.dtype]
        return {
            "UPDATE": self.structure.update,
            "STATES": self.structure.states,
            "ADDS_MEAN": self.adds_mean,
            "SCALES": self.scales,
            "STORES": self.stores,
            "COUPLED": self.coupled,
            "STORED": stored,
            "TYPE": computed,
        }


@dataclass
class Measurement:
    """One launch of the inner products of a policy."""

    chunks: Tensor
    first_partial: int
    dtype: torch.dtype
    structure: Structure


@dataclass
class Unit:
    """Policy with inner products, and the tables of its kernels."""

    policy: Policy
    rule: Tensor
    groups: Tensor
    shares: Tensor
    measurements: list[Measurement] = field(default_factory=list)


def chunks_of(members: Sequence[int], numels: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """Returns the chunks of some tensors: tensor, first element, number of elements."""
    return [(m, base, min(size, numels[m] - base)) for m in members for base in range(0, numels[m], size)]


class Tables:
    """Copy of a plan on the device. It changes only with the plan, except for mirrors and scratch memory.

    Args:
        views: parameters of one device.
        params: tensors that are updated: the parameters, or dense copies of them.
        bound: state by role and member, see plans.collect_state.
        members: positions in ``views`` of the tensors of each policy.
        coupled: by member, whether decay is added to the gradient; false without decay, since the parameter could be
            infinite.
        mirrors: copies on the device of counts on the host, one row per tensor.
        on_device: whether counters are on the device.
        chunk_size: elements of a chunk of an update, by dtype.
    """

    def __init__(
        self,
        views: Sequence[ParamView],
        params: Sequence[Tensor],
        bound: Mapping[str, Mapping[int, Tensor]],
        members: Mapping[Policy, Sequence[int]],
        coupled: Sequence[bool],
        mirrors: Tensor,
        on_device: bool,
        chunk_size: Mapping[torch.dtype, int],
    ) -> None:
        self.device = params[0].device
        self._numels = [p.numel() for p in params]
        count = len(views)
        self.grads = self._zeros(count)
        self.scalars = self._zeros(count * fields.SCALAR_FIELDS.value, torch.float64)
        self.flags = self._zeros(count, torch.int32)
        self.mirrors = mirrors
        self.one = torch.ones(1, dtype=torch.float64, device=self.device)
        self.single_one, self.single_zero = self.one.float(), self._zeros(1, torch.float32)
        self.policies = [policy for policy in members if type(policy) in KINDS and not policy.naive]
        self.structures = [STRUCTURES[plans.structure(view.backbone.name, view.group)] for view in views]
        rows = self._rows(views, params, bound, members, coupled, on_device)
        self.tensors = self._table(rows)
        self.rules = self._table([[KINDS[type(p)].value, *plans.rule_of(p)] for p in self.policies] or [[0.0]])
        kinds: dict[Kind, list[int]] = {}
        for i, (p, row) in enumerate(zip(params, rows, strict=True)):
            kinds.setdefault(self._kind(i, p.dtype, row, coupled[i]), []).append(i)
        chunks = {kind: chunks_of(own, self._numels, chunk_size[kind.dtype]) for kind, own in kinds.items()}
        self.buckets = [(kind, self._table(own)) for kind, own in chunks.items() if own]
        units = [self._unit(i, members[p], params) for i, p in enumerate(self.policies) if not isinstance(p, ActiveLR)]
        self.units = units
        partials = max([m.first_partial + len(m.chunks) for u in units for m in u.measurements], default=0)
        shares = max([len(u.shares) for u in units], default=0)
        self.partials = self._zeros(2 * partials, torch.float64)
        self.group_sums = self._zeros(2 * max([len(u.groups) for u in units], default=0), torch.float64)
        self.outcomes = self._zeros(shares * fields.OUTCOME_FIELDS.value, torch.float64)

    def memory(self) -> list[Tensor]:
        """Returns its own tensors on the device, including those of which other tensors are views."""
        own = [value for value in vars(self).values() if isinstance(value, Tensor)]
        own += [chunks for _, chunks in self.buckets]
        own += [t for unit in self.units for t in (unit.groups, unit.shares, *(m.chunks for m in unit.measurements))]
        return own

    def _zeros(self, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(max(size, 1), dtype=dtype, device=self.device)

    def _table(self, rows: Sequence[Sequence[float]]) -> Tensor:
        is_float = any(isinstance(entry, float) for entry in rows[0]) if rows else False
        dtype = torch.float64 if is_float else torch.int64
        return torch.tensor(rows or [[0]], dtype=dtype).to(self.device)

    def _rows(
        self,
        views: Sequence[ParamView],
        params: Sequence[Tensor],
        bound: Mapping[str, Mapping[int, Tensor]],
        members: Mapping[Policy, Sequence[int]],
        coupled: Sequence[bool],
        on_device: bool,
    ) -> list[list[int]]:
        groups = {id(group): i for i, group in enumerate({id(s.group): s.group for s in views}.values())}
        rows = [[0] * fields.TENSOR_FIELDS.value for _ in views]
        for role, tensors in bound.items():
            mirrored = role in COUNTERS and not on_device
            for i, tensor in tensors.items():
                rows[i][COLUMNS[role]] = self.mirror(i, role) if mirrored else tensor.data_ptr()
        for i, (view, p, row) in enumerate(zip(views, params, rows, strict=True)):
            traits = self.structures[i].traits
            step = bound.get("step", {}).get(i)
            if step is None or not on_device:  # SGD has no step: 0 in its mirror says that there is no buffer yet
                row[fields.STEP.value] = self.mirror(i, "step")
                traits |= fields.STEP_IS_DOUBLE.value
            elif step.dtype == torch.float64:
                traits |= fields.STEP_IS_DOUBLE.value
            product = bound.get("mu_product", {}).get(i)
            if product is not None and product.dtype == torch.float32:
                traits |= fields.PRODUCT_IS_FLOAT.value
            row[fields.GAIN.value] = row[fields.GAIN.value] or self.one.data_ptr()
            row[fields.PARAM.value] = p.data_ptr()
            row[fields.NUMEL.value] = p.numel()
            row[fields.INDEX.value] = view.index
            row[fields.GROUP.value] = groups[id(view.group)]
            row[fields.ACTIVE.value] = row[fields.SCALAR.value] = -1
            aligned = all(address % 16 == 0 for address in row[: fields.START.value + 1])
            for condition, trait in (
                (any(policy.adapts for policy in view.policies), fields.ADAPTS),
                (view.group["maximize"], fields.MAXIMIZES),
                (aligned, fields.ALIGNED),
                (p.dtype == torch.float64, fields.STATE_IS_DOUBLE),
                (coupled[i], fields.COUPLES),
            ):
                traits |= trait.value if condition else 0
            row[fields.TRAITS.value] = traits
        for number, policy in enumerate(self.policies):
            place = fields.ACTIVE if isinstance(policy, ActiveLR) else fields.SCALAR
            for i in members[policy]:
                rows[i][place.value] = number
                if isinstance(policy, Hypergradient) and i in bound.get("previous", {}):
                    rows[i][fields.TRAITS.value] |= fields.STORES_DIRECTION.value
        return rows

    def mirror(self, member: int, counter: str) -> int:
        """Returns the address of the device copy of a host counter. The copy of ``step`` is a float64."""
        return self.mirrors.data_ptr() + 8 * (member * len(COUNTERS) + COUNTERS.index(counter))

    def _kind(self, member: int, dtype: torch.dtype, row: Sequence[int], coupled: bool) -> Kind:
        return Kind(
            self.structures[member],
            adds_mean=row[fields.MEAN_SUM.value] != 0,
            scales=row[fields.ACTIVE.value] >= 0,
            stores=bool(row[fields.TRAITS.value] & fields.STORES_DIRECTION.value),
            coupled=coupled,
            dtype=dtype,
        )

    def _unit(self, number: int, members: Sequence[int], params: Sequence[Tensor]) -> Unit:
        policy = self.policies[number]
        parted: dict[Any, list[int]] = {}
        for i in members:
            slopes = isinstance(policy, Hypergradient)
            parted.setdefault((params[i].dtype, self.structures[i] if slopes else None), []).append(i)
        measurements, first_partial, partial = [], {}, 0
        for (dtype, structure), own in parted.items():
            chunks = chunks_of(own, self._numels, CHUNK)
            counts = [-(-self._numels[i] // CHUNK) for i in own]
            first_partial |= dict(zip(own, accumulate([partial, *counts[:-1]]), strict=True))
            if chunks:
                measurements.append(Measurement(self._table(chunks), partial, dtype, structure))
            partial += len(chunks)
        groups, shares, size = [], [], fields.GROUP_SIZE.value
        for i in members:
            chunks = -(-self._numels[i] // CHUNK)
            shares.append((i, len(groups), -(-chunks // size)))
            groups += [(first_partial[i] + begin, min(size, chunks - begin)) for begin in range(0, chunks, size)]
        return Unit(policy, self.rules[number], self._table(groups), self._table(shares), measurements)
