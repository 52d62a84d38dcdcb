"""What stands where in the tables that the kernels read: columns, and bits of flags."""

from __future__ import annotations

import triton.language as tl

# A row of `tensors`, int64, a parameter. Addresses are the device's; where the counts live on the host, they are those
# of its mirrors.
PARAM = tl.constexpr(0)
STATE0 = tl.constexpr(1)  # the backbone's, in the order of plans.STATE_NAMES
STATE1 = tl.constexpr(2)
STATE2 = tl.constexpr(3)
ELEMENT_GAIN = tl.constexpr(4)
GRAD_SUM = tl.constexpr(5)
SIGN_PREV = tl.constexpr(6)
MEAN_SUM = tl.constexpr(7)
PREVIOUS = tl.constexpr(8)  # grad_mean_prev or direction_prev
START = tl.constexpr(9)
GAIN = tl.constexpr(10)
LR_SUM = tl.constexpr(11)
LR_LAST = tl.constexpr(12)
STEP = tl.constexpr(13)
ACTIVE_STEP = tl.constexpr(14)
ACTIVE_APPLIED = tl.constexpr(15)
TLR_STEP = tl.constexpr(16)
TLR_APPLIED = tl.constexpr(17)
TLR_APPLIED_PREV = tl.constexpr(18)
DIRECTION_VALID = tl.constexpr(19)
NUMEL = tl.constexpr(20)
INDEX = tl.constexpr(21)  # position over all param groups
GROUP = tl.constexpr(22)
ACTIVE = tl.constexpr(23)  # row of its ActiveLR in `rules`; -1: none
SCALAR = tl.constexpr(24)  # of its TrainableLR or Hypergradient
TRAITS = tl.constexpr(25)
TENSOR_FIELDS = tl.constexpr(32)

# TRAITS.
STEP_IS_DOUBLE = tl.constexpr(1)
ADAPTS = tl.constexpr(2)
MAXIMIZES = tl.constexpr(4)
ALIGNED = tl.constexpr(8)  # every address is a multiple of 16
STORES_DIRECTION = tl.constexpr(16)
STATE_IS_DOUBLE = tl.constexpr(32)
RECTIFIES = tl.constexpr(64)
AT_FIVE = tl.constexpr(128)  # rectified from ρ = 5 on, not only beyond
COUPLES = tl.constexpr(256)
HAS_MOMENTS = tl.constexpr(512)

# A row of `hypers`, float64, a param group: as plans.GroupNumbers gives them.
LR = tl.constexpr(0)
WEIGHT_DECAY = tl.constexpr(1)
BETA1 = tl.constexpr(2)
BETA2 = tl.constexpr(3)
EPS = tl.constexpr(4)
MOMENTUM = tl.constexpr(5)
DAMPENING = tl.constexpr(6)
LR_REF = tl.constexpr(7)
LR_SCALE = tl.constexpr(8)
HYPER_FIELDS = tl.constexpr(9)

# A row of `rules`, float64, a policy: its kind, then what plans.policy_arguments() gives.
KIND = tl.constexpr(0)
INTERVAL = tl.constexpr(1)
PER_TENSOR = tl.constexpr(2)
LOWEST = tl.constexpr(3)
HIGHEST = tl.constexpr(4)
INCREMENT = tl.constexpr(5)  # NaN: none
HIGH = tl.constexpr(6)
LOW = tl.constexpr(7)
HOLDS = tl.constexpr(8)
GROWTH = tl.constexpr(9)  # TrainableLR's c
SOURCE = tl.constexpr(10)
ETA = tl.constexpr(11)  # NaN: none
HYPER_LR = tl.constexpr(12)
RULE_FIELDS = tl.constexpr(13)

ACTIVE_LR = tl.constexpr(0)
TRAINABLE_LR = tl.constexpr(1)
HYPERGRADIENT = tl.constexpr(2)

DISPLACEMENT = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
PRECONDITIONED = tl.constexpr(2)

# A row of `scalars`, float64, a parameter: what all its elements share in a step, written by `prepare`.
S_GRAD_FACTOR = tl.constexpr(0)  # 1/grad_scale, negative when maximizing
S_LR = tl.constexpr(1)
S_DRAW = tl.constexpr(2)
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
S_APPLIED = tl.constexpr(17)  # steps and rates of TrainableLR's interval, as it ends
S_LR_SUM = tl.constexpr(18)
S_LR_SCALE = tl.constexpr(19)
SCALAR_FIELDS = tl.constexpr(20)

# `flags`, int32, a parameter: what it has to do in this step, decided by `prepare`.
STEPS = tl.constexpr(1)  # it has a gradient
WIDE = tl.constexpr(2)  # 16 bytes at a time
FIRST = tl.constexpr(4)  # the momentum buffer does not exist yet
DIVIDES = tl.constexpr(8)
DIVIDES_PREV = tl.constexpr(16)
USES_MAX = tl.constexpr(32)
ADAPTIVE = tl.constexpr(64)  # the decay is clamped
FRESH = tl.constexpr(128)  # ActiveLR's sum is 0
ENDS = tl.constexpr(256)  # ActiveLR's interval ends
HOLDS_ZERO = tl.constexpr(512)  # ActiveLR leaves gains where there is nothing to compare
ADDS = tl.constexpr(1024)  # the gradient goes into grad_mean_sum
DUE = tl.constexpr(2048)  # its inner products are measured
SLOPES = tl.constexpr(4096)  # Hypergradient measures it
ADJUSTS = tl.constexpr(8192)  # ActiveLR's interval ends, and its last step could move the tensor

# `outcomes`, float64, a policy's tensor.
O_NUM = tl.constexpr(0)
O_SQ = tl.constexpr(1)
O_SLOPE = tl.constexpr(2)
O_MEASURED = tl.constexpr(3)
OUTCOME_FIELDS = tl.constexpr(4)

# A row of `chunks`, int64: tensor, first element, number of elements. Of `shares`, int64: tensor, first group, number
# of groups. Of `groups`, int64: first partial sum, number of them.
CHUNK_FIELDS = tl.constexpr(3)
SHARE_FIELDS = tl.constexpr(3)
GROUP_FIELDS = tl.constexpr(2)

# The order of inner products (csrc/gain.h).
LANES = tl.constexpr(1024)
GROUP_SIZE = tl.constexpr(256)
