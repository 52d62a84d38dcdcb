"""The meaning of PTX instructions, and errors for unknown ones."""

from __future__ import annotations

import ctypes
import math
import struct

import pytest
import torch

from ..cuda_emulation import build
from . import load
from .parse import Unknown, parse
from .translate import translate

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")

THREADS = 64
KERNEL = """
.version 9.0
.target sm_90
.address_size 64

.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 kernel_param_1
)
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .f32 	%f<9>;
	.reg .b64 	%rd<9>;
	.reg .f64 	%fd<9>;
	.shared .align 8 .b8 memory[512];

	ld.param.u64 	%rd1, [kernel_param_0];
	ld.param.u64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd3, %r1, 8;
	add.s64 	%rd2, %rd2, %rd3;
	{body}
	ret;
}}
"""


def run(body: str, *values: int) -> list[int]:
    """Returns the value of %rd8 in each thread, with the values in memory at %rd1."""
    given, found = torch.tensor([*values, 0], dtype=torch.int64), torch.zeros(THREADS, dtype=torch.int64)
    text = KERNEL.format(body=f"{body}\n\tst.global.u64 \t[%rd2], %rd8;")
    load.launch("kernel", text, 1, THREADS, 0, [ctypes.c_uint64(t.data_ptr()) for t in (given, found)])
    return found.tolist()


def bits(value: float, kind: str = "f") -> int:
    return int.from_bytes(struct.pack(f"<{kind}", value), "little")


def two(instruction: str) -> str:
    """Returns an instruction on 32-bit registers %r2 and %r3, the halves of the first value."""
    return f"ld.global.v2.u32 {{%r2, %r3}}, [%rd1]; {instruction} cvt.u64.u32 %rd8, %r4;"


NAN = bits(math.nan)
ARITHMETIC = [
    ("sub.s32 %r4, %r2, %r3;", 3, 5, 2**32 - 2),
    ("mul.lo.s32 %r4, %r2, %r3;", 2**31, 6, 0),
    ("shr.s32 %r4, %r2, %r3;", 2**31, 40, 2**32 - 1),
    ("shr.u32 %r4, %r2, %r3;", 2**31, 31, 1),
    ("shl.b32 %r4, %r2, %r3;", 1, 32, 0),
    ("bfe.s32 %r4, %r2, 4, 4;", 0xF0, 0, 2**32 - 1),
    ("bfe.u32 %r4, %r2, 4, 4;", 0x1B0, 0, 0xB),
    ("prmt.b32 %r4, %r2, %r3, 0x5410;", 0x44332211, 0x88776655, 0x66552211),
    ("prmt.b32 %r4, %r2, %r3, 0xBB21;", 0x84332211, 0, 0xFFFF3322),
    ("min.f32 %r4, %r2, %r3;", NAN, bits(2.0), bits(2.0)),
    ("max.f32 %r4, %r2, %r3;", bits(-0.0), bits(0.0), bits(0.0)),
    ("fma.rn.f32 %r4, %r2, %r3, 0fBF800000;", bits(1 + 2**-23), bits(1 - 2**-23), bits(-(2.0**-46))),
    ("mul.rn.f32 %r4, %r2, %r3;", bits(1 + 2**-23), bits(1 - 2**-23), bits(1.0)),
    ("setp.lt.f32 %p1, %r2, %r3; selp.b32 %r4, 1, 0, %p1;", NAN, bits(1.0), 0),
    ("setp.ltu.f32 %p1, %r2, %r3; selp.b32 %r4, 1, 0, %p1;", NAN, bits(1.0), 1),
    ("setp.gt.s32 %p1, %r2, %r3; @!%p1 mov.u32 %r4, 9; @%p1 mov.u32 %r4, 7;", 2**32 - 1, 1, 9),
    ("cvt.s32.s8 %r4, %r2;", 0x180, 0, 2**32 - 128),
    ("cvt.rn.f16x2.f32 %r4, %r2, %r3;", bits(1.0), bits(2.0**-24), 0x3C000001),
    ("cvt.rn.f32.u32 %r4, %r2;", 2**24 + 3, 0, bits(2.0**24 + 4)),
    ("mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r4, {%rs2, %rs1};", 0x11112222, 0, 0x22221111),
]


@pytest.mark.parametrize(("instruction", "a", "b", "expected"), ARITHMETIC)
def test_result_of_an_instruction(instruction, a, b, expected):
    value = (b << 32 | a) - (2**64 if b >= 2**31 else 0)
    assert run(two(instruction), value) == [expected] * THREADS


def test_halves_are_rounded_as_in_torch():
    """Covers all of them, and values between two of them."""
    half = torch.arange(2**15, dtype=torch.int16).view(torch.float16)
    numbers = half[half.isfinite()].float()
    between = (numbers[1:] + numbers[:-1]) / 2
    for values in (numbers, between, between.nextafter(between * 2), -between, torch.tensor([65519.0, 65520.0, 1e30])):
        text = KERNEL.format(
            body="""
            mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd4, %r5, 256; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd1, %rd1, %rd4;
            add.s64 %rd1, %rd1, %rd5; ld.global.f32 %f1, [%rd1]; cvt.rn.f16.f32 %rs1, %f1; cvt.f32.f16 %f1, %rs1;
            st.global.f32 [%rd1], %f1;"""
        )
        padded = torch.cat([values, torch.zeros(-len(values) % THREADS)])
        expected = padded.half().float()
        arguments = [ctypes.c_uint64(padded.data_ptr())] * 2
        load.launch("kernel", text, len(padded) // THREADS, THREADS, 0, arguments)
        assert torch.equal(padded, expected)


def test_values_of_a_warp():
    for order in (0, 3):
        load.take_turns(order)
        lanes = run("shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1; cvt.u64.u32 %rd8, %r4;")
        assert lanes == [thread ^ 1 for thread in range(THREADS)]
        lanes = run("shfl.sync.idx.b32 %r4, %r1, 5, 31, -1; cvt.u64.u32 %rd8, %r4;")
        assert lanes == [thread // 32 * 32 + 5 for thread in range(THREADS)]
        lanes = run("mov.b32 %r3, -1; redux.sync.max.s32 %r4, %r1, %r3; cvt.u64.u32 %rd8, %r4;")
        assert lanes == [thread // 32 * 32 + 31 for thread in range(THREADS)]


EXCHANGE = """
    mov.u32 %r2, memory; shl.b32 %r3, %r1, 3; add.s32 %r4, %r2, %r3; st.shared.u64 [%r4], %rd3;
    {barrier} xor.b32 %r3, %r3, {mask}; add.s32 %r4, %r2, %r3; ld.shared.u64 %rd8, [%r4];
"""


def test_missing_barriers_change_the_result():
    expected = [8 * (thread ^ 1) for thread in range(THREADS)]
    for order in (0, 3):
        load.take_turns(order)
        assert run(EXCHANGE.format(barrier="bar.sync 0;", mask=8)) == expected
        assert run(EXCHANGE.format(barrier="", mask=8)) != expected


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.u64 %rd8, [%rd1+4];", "misaligned address in `ld.global.u64"),
        ("ld.global.v2.u32 {%r2, %r3}, [%rd1+4];", "misaligned address in `ld.global.v2"),
        ("st.shared.u64 [memory+508], %rd1;", "misaligned address in `st.shared.u64"),
        (EXCHANGE.format(barrier="bar.sync 0;", mask=4096), "outside of the block's memory"),
        ("mov.u64 %rd4, 64; ld.global.u64 %rd8, [%rd4];", "illegal memory access"),
        ("shfl.sync.idx.b32 %r4, %r1, 5, 31, 1;", "a part of a warp"),
        (
            "setp.eq.s32 %p1, %r1, 3; @%p1 bra $L__1; shfl.sync.idx.b32 %r4, %r1, 5, 31, -1; $L__1:",
            "the threads of a warp have parted",
        ),
    ],
)
def test_errors_end_the_launch(body, message):
    with pytest.raises(RuntimeError, match=message):
        run(body)
    assert run("mov.u64 %rd8, 5;") == [5] * THREADS  # the next launch runs


@pytest.mark.parametrize(
    "text",
    [
        "add.f32 %f1, %f2, %f3;",  # may be contracted
        "add.rn.ftz.f32 %f1, %f2, %f3;",
        "sqrt.approx.f32 %f1, %f2;",
        "div.full.f32 %f1, %f2, %f3;",
        "setp.ne.f32 %p1, %f1, %f2;",
        "cvt.rn.bf16.f32 %rs1, %f1;",
        "cvt.rz.f32.f64 %f1, %fd1;",
        "ld.volatile.global.u32 %r1, [%rd1];",
        "ld.global.v2.u32 %r1, [%rd1];",
        "ld.local.u32 %r1, [%rd1];",
        "atom.global.cas.b32 %r1, [%rd1], %r2, %r3;",
        "bar.sync 1;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "shfl.sync.idx.b32 %r1, %r2, 0, 15, -1;",
        "mov.u32 %r1, %clock;",
        "mov.b64 %rd1, elsewhere;",
        "add.rn.f32 %rd1, %f2, %f3;",
    ],
)
def test_unknown_instructions_are_errors(text):
    with pytest.raises(Unknown):
        translate(parse(KERNEL.format(body=text)), ["kernel"])
