"""Columns of the tables that the kernels read, and bits of flags."""

from __future__ import annotations

import triton.language as tl

from ...core.declarations import POLICIES, ROLES, SOURCES, Hyper, Rule


def _column(role: str) -> tl.constexpr:
    return tl.constexpr(list(ROLES).index(role))


def _argument(name: str) -> tl.constexpr:
    return tl.constexpr(1 + Rule._fields.index(name))


# Row of `tensors`, int64, one per parameter: the address of the tensor of each role, then other properties. Addresses
# are on the device; if counts are on the host, their addresses are those of mirrors.
PARAM = _column("param")
STATE0 = _column("state0")
STATE1 = _column("state1")
STATE2 = _column("state2")
ELEMENT_GAIN = _column("element_gain")
GRAD_SUM = _column("grad_sum")
SIGN_PREV = _column("grad_sign_prev")
MEAN_SUM = _column("grad_mean_sum")
PREVIOUS = _column("previous")
START = _column("interval_start")
GAIN = _column("gain")
LR_SUM = _column("lr_sum")
LR_LAST = _column("lr_last")
STEP = _column("step")
MU_PRODUCT = _column("mu_product")
ACTIVE_STEP = _column("active_step")
ACTIVE_APPLIED = _column("active_applied")
TLR_STEP = _column("tlr_step")
TLR_APPLIED = _column("tlr_applied")
TLR_APPLIED_PREV = _column("tlr_applied_prev")
DIRECTION_VALID = _column("direction_valid")
NUMEL = tl.constexpr(len(ROLES))
INDEX = tl.constexpr(len(ROLES) + 1)  # position over all param groups
GROUP = tl.constexpr(len(ROLES) + 2)
ACTIVE = tl.constexpr(len(ROLES) + 3)  # row of its ActiveLR in `rules`; -1: none
SCALAR = tl.constexpr(len(ROLES) + 4)  # row of its TrainableLR or Hypergradient; -1: none
TRAITS = tl.constexpr(len(ROLES) + 5)
TENSOR_FIELDS = tl.constexpr(32)

# Bits of TRAITS.
STEP_IS_DOUBLE = tl.constexpr(1)
ADAPTS = tl.constexpr(2)
MAXIMIZES = tl.constexpr(4)
ALIGNED = tl.constexpr(8)  # every address is a multiple of 16
STORES_DIRECTION = tl.constexpr(16)
STATE_IS_DOUBLE = tl.constexpr(32)
RECTIFIES = tl.constexpr(64)
AT_FIVE = tl.constexpr(128)  # rectifies if ρ >= 5, not only if ρ > 5
COUPLES = tl.constexpr(256)
HAS_MOMENTS = tl.constexpr(512)
PRODUCT_IS_FLOAT = tl.constexpr(1024)  # mu_product is rounded to float32, also where its mirror is a float64

# Row of `hypers`, float64, one per param group.
LR = tl.constexpr(Hyper._fields.index("lr"))
WEIGHT_DECAY = tl.constexpr(Hyper._fields.index("weight_decay"))
BETA1 = tl.constexpr(Hyper._fields.index("beta1"))
BETA2 = tl.constexpr(Hyper._fields.index("beta2"))
EPS = tl.constexpr(Hyper._fields.index("eps"))
MOMENTUM = tl.constexpr(Hyper._fields.index("momentum"))
DAMPENING = tl.constexpr(Hyper._fields.index("dampening"))
MU_DECAY = tl.constexpr(Hyper._fields.index("mu_decay"))
LR_REF = tl.constexpr(Hyper._fields.index("lr_ref"))
LR_SCALE = tl.constexpr(Hyper._fields.index("lr_scale"))
HYPER_FIELDS = tl.constexpr(len(Hyper._fields))

# Row of `rules`, float64, one per policy: its kind, then its arguments.
KIND = tl.constexpr(0)
INTERVAL = _argument("interval")
PER_TENSOR = _argument("per_tensor")
LOWEST = _argument("lowest")
HIGHEST = _argument("highest")
INCREMENT = _argument("increment")
HIGH = _argument("high")
LOW = _argument("low")
HOLDS = _argument("holds")
GROWTH = _argument("c")
SOURCE = _argument("source")
ETA = _argument("eta")
HYPER_LR = _argument("hyper_lr")
RULE_FIELDS = tl.constexpr(1 + len(Rule._fields))

ACTIVE_LR = tl.constexpr(POLICIES.index("ActiveLR"))
TRAINABLE_LR = tl.constexpr(POLICIES.index("TrainableLR"))
HYPERGRADIENT = tl.constexpr(POLICIES.index("Hypergradient"))

DISPLACEMENT = tl.constexpr(SOURCES.index("displacement"))
GRADIENT = tl.constexpr(SOURCES.index("gradient"))
PRECONDITIONED = tl.constexpr(SOURCES.index("preconditioned"))

# Row of `scalars`, float64, one per parameter: numbers that its elements share in a step, written by `prepare`.
S_GRAD_FACTOR = tl.constexpr(0)  # 1/grad_scale, negative when maximizing
S_LR = tl.constexpr(1)
S_RATE_FACTOR = tl.constexpr(2)
S_WEIGHT_DECAY = tl.constexpr(3)
S_DECAY1 = tl.constexpr(4)
S_WEIGHT1 = tl.constexpr(5)
S_DECAY2 = tl.constexpr(6)
S_WEIGHT2 = tl.constexpr(7)
S_EPS = tl.constexpr(8)
S_NUMERATOR = tl.constexpr(9)
S_SCALE = tl.constexpr(10)
S_NUMERATOR_PREV = tl.constexpr(11)  # of the last step
S_SCALE_PREV = tl.constexpr(12)
S_HIGH = tl.constexpr(13)
S_LOW = tl.constexpr(14)
S_LOWEST = tl.constexpr(15)
S_HIGHEST = tl.constexpr(16)
S_APPLIED = tl.constexpr(17)  # applied steps of TrainableLR's interval, with this step
S_LR_SUM = tl.constexpr(18)  # sum of their rates
S_LR_SCALE = tl.constexpr(19)
S_GRAD_NUMERATOR = tl.constexpr(20)
SCALAR_FIELDS = tl.constexpr(21)

# Bits of `flags`, int32, one per parameter, written by `prepare`.
STEPS = tl.constexpr(1)  # the parameter has a gradient
WIDE = tl.constexpr(2)  # accesses of 16 bytes
FIRST = tl.constexpr(4)  # the momentum buffer does not exist yet
DIVIDES = tl.constexpr(8)
DIVIDES_PREV = tl.constexpr(16)
USES_MAX = tl.constexpr(32)
ADAPTIVE = tl.constexpr(64)  # the decay is clamped
FRESH = tl.constexpr(128)  # ActiveLR's sum is 0
ENDS = tl.constexpr(256)  # ActiveLR's interval ends
HOLDS_ZERO = tl.constexpr(512)  # ActiveLR keeps the gain if one of the signs is 0
ADDS = tl.constexpr(1024)  # the gradient is added to grad_mean_sum
DUE = tl.constexpr(2048)  # the policy measures inner products in this step
SLOPES = tl.constexpr(4096)  # Hypergradient measures this parameter
ADJUSTS = tl.constexpr(8192)  # ActiveLR's interval ends, and its last step could move the tensor

# Row of `outcomes`, float64, one per tensor of a policy.
O_NUM = tl.constexpr(0)
O_SQ = tl.constexpr(1)
O_SLOPE = tl.constexpr(2)
O_MEASURED = tl.constexpr(3)
OUTCOME_FIELDS = tl.constexpr(4)

# Row of `chunks`, int64: tensor, first element, number of elements. Row of `shares`, int64: tensor, first group, number
# of groups. Row of `groups`, int64: first partial sum, number of partial sums.
CHUNK_FIELDS = tl.constexpr(3)
SHARE_FIELDS = tl.constexpr(3)
GROUP_FIELDS = tl.constexpr(2)

# Summation order of inner products, see csrc/rules/gain.h.
LANES = tl.constexpr(1024)
GROUP_SIZE = tl.constexpr(256)
