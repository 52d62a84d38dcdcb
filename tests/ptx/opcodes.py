"""The meaning of PTX opcodes in C++, one row each. An opcode or type without a row is an error.

Types: "i" integers, "b" bits, "f" floats, "p" predicates. ``{0}``, ``{1}`` … are the operands after the result, each
with the C++ type of its column: "t" is the instruction's type, "w" has twice its width.
"""

from __future__ import annotations

from typing import NamedTuple

#: C++ types of PTX types. 16-bit floats are stored as bits.
CPP = {
    **{f"u{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    "f16": "uint16_t",
    "f16x2": "uint32_t",
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
KINDS = {"u": "i", "s": "i", "b": "b", "f": "f", "p": "p"}


class Row(NamedTuple):
    kinds: str
    operands: str
    result: str
    code: str


def rows(*table: tuple[str, str, str, str, str]) -> dict[str, Row]:
    return {name: Row(*row) for names, *row in table for name in names.split()}  # type: ignore[arg-type]


OPERATIONS = rows(
    # opcodes, kinds, operands, result, C++
    ("add", "i", "t t", "t", "{0} + {1}"),
    ("sub", "i", "t t", "t", "{0} - {1}"),
    ("mul.lo", "i", "t t", "t", "{0} * {1}"),
    ("mul.wide", "i", "t t", "w", "wide({0}) * wide({1})"),
    ("mul.hi", "i", "t t", "t", "high_product({0}, {1})"),
    ("mad.lo", "i", "t t t", "t", "{0} * {1} + {2}"),
    ("mad.wide", "i", "t t w", "w", "wide({0}) * wide({1}) + {2}"),
    ("div", "i", "t t", "t", "{0} / {1}"),
    ("rem", "i", "t t", "t", "{0} % {1}"),
    ("add.rn", "f", "t t", "t", "{0} + {1}"),
    ("sub.rn", "f", "t t", "t", "{0} - {1}"),
    ("mul.rn", "f", "t t", "t", "{0} * {1}"),
    ("div.rn", "f", "t t", "t", "{0} / {1}"),
    ("rcp.rn", "f", "t", "t", "1 / {0}"),
    ("rcp.approx.ftz", "f", "t", "t", "approximate_reciprocal({0})"),
    ("sqrt.rn", "f", "t", "t", "square_root({0})"),
    ("fma.rn", "f", "t t t", "t", "fused({0}, {1}, {2})"),
    ("min", "if", "t t", "t", "smaller({0}, {1})"),
    ("max", "if", "t t", "t", "larger({0}, {1})"),
    ("abs", "if", "t", "t", "magnitude({0})"),
    ("neg", "if", "t", "t", "-{0}"),
    ("and", "bp", "t t", "t", "{0} & {1}"),
    ("or", "bp", "t t", "t", "{0} | {1}"),
    ("xor", "bp", "t t", "t", "{0} ^ {1}"),
    ("not", "bp", "t", "t", "inverted({0})"),
    ("shl", "b", "t u32", "t", "shifted_left({0}, {1})"),
    ("shr", "ib", "t u32", "t", "shifted_right({0}, {1})"),
    ("bfe", "i", "t u32 u32", "t", "bit_field({0}, {1}, {2})"),
    ("prmt", "b", "t t t", "t", "permuted({0}, {1}, {2})"),
    ("selp", "ibf", "t t pred", "t", "{2} ? {0} : {1}"),
    # Ordered comparisons of floats are false if an operand is NaN; those with a "u" are true.
    ("setp.eq", "ibf", "t t", "pred", "{0} == {1}"),
    ("setp.ne", "ib", "t t", "pred", "{0} != {1}"),
    ("setp.lt setp.lo", "if", "t t", "pred", "{0} < {1}"),
    ("setp.le setp.ls", "if", "t t", "pred", "{0} <= {1}"),
    ("setp.gt setp.hi", "if", "t t", "pred", "{0} > {1}"),
    ("setp.ge setp.hs", "if", "t t", "pred", "{0} >= {1}"),
    ("setp.equ", "f", "t t", "pred", "!({0} < {1} || {0} > {1})"),
    ("setp.neu", "f", "t t", "pred", "{0} != {1}"),
    ("setp.ltu", "f", "t t", "pred", "!({0} >= {1})"),
    ("setp.leu", "f", "t t", "pred", "!({0} > {1})"),
    ("setp.gtu", "f", "t t", "pred", "!({0} <= {1})"),
    ("setp.geu", "f", "t t", "pred", "!({0} < {1})"),
    ("setp.nan", "f", "t t", "pred", "is_nan({0}) || is_nan({1})"),
    ("setp.num", "f", "t t", "pred", "!is_nan({0}) && !is_nan({1})"),
    # Threads of a warp. "all": the segment of a shuffle, which must be the whole warp. The last operand: its members.
    ("shfl.sync.idx", "b", "t u32 all u32", "t", "shuffled({0}, {1} & 31, {3})"),
    ("shfl.sync.bfly", "b", "t u32 all u32", "t", "shuffled({0}, (ptx::thread() ^ {1}) & 31, {3})"),
    ("redux.sync.max", "i", "t u32", "t", "largest_of_warp({0}, {1})"),
    # Hints for caches.
    ("createpolicy.fractional.L2::evict_first", "b", "unread", "t", "0"),
)

#: (opcode, to, from) → C++. Integer types convert to each other without an entry.
CONVERSIONS = {
    ("cvt", "f64", "f32"): "{0}",
    ("cvt", "f32", "f16"): "from_half({0})",
    ("cvt.rn", "f32", "f64"): "{0}",
    **{("cvt.rn", to, of): "{0}" for to in ("f32", "f64") for of in ("s16", "u16", "s32", "u32", "s64", "u64")},
    ("cvt.rn", "f16", "f32"): "to_half({0})",
    ("cvt.rn", "f16x2", "f32"): "uint32_t{{to_half({0})}} << 16 | to_half({1})",
    ("cvt.rzi", "f64", "f64"): "truncated({0})",
    ("cvt.rni", "f64", "f64"): "rounded({0})",
    ("cvt.rzi", "s64", "f64"): "to_integer<int64_t>({0})",
    ("cvt.rzi", "s32", "f64"): "to_integer<int32_t>({0})",
    ("cvt.rzi", "u32", "f64"): "to_integer<uint32_t>({0})",
}

#: New value of an atomic operation, from the value ``before`` and the operand.
ATOMICS = {"add": "before + {0}", "inc": "before >= {0} ? 0 : before + 1"}

SPECIAL_REGISTERS = {
    "%tid.x": "ptx::thread()",
    "%ntid.x": "ptx::threads()",
    "%ctaid.x": "ptx::block()",
    "%nctaid.x": "ptx::blocks()",
}

#: Memory spaces. "" is a generic address.
SPACES = ("global", "shared", "param")
#: Parts of loads and stores that do not change what is read or written, like ORDERS.
CACHES = ("cs", "cg", "ca", "nc", "L1::evict_first", "L2::cache_hint")
VECTORS = {"v2": 2, "v4": 4}
#: Fences between blocks. Here blocks run one after the other between barriers and see all writes of others.
FENCES = {f"fence.{kind}.{scope}" for kind in ("acq_rel", "sc") for scope in ("cta", "gpu", "sys")}
FENCES |= {f"membar.{scope}" for scope in ("cta", "gl", "sys")}
ORDERS = ("relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys")
