"""The executor of PTX itself: its arithmetic against Python's integers and fractions, and each fault it must find."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from ptx import arithmetic
from ptx.machine import TABLE, Program
from ptx.memory import Global
from ptx.order import order
from ptx.parse import PtxError, parse

Array = Any

KERNEL = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 x,
	.param .u64 .ptr .global .align 1 y,
	.param .u32 n
)
.reqntid THREADS
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<19>;
	ld.param.b64 	%rd1, [x];
	ld.param.b64 	%rd2, [y];
	ld.param.b32 	%r1, [n];
	mov.u32 	%r2, %tid.x;
	mov.u32 	%r3, %ctaid.x;
	mad.lo.s32 	%r4, %r3, THREADS, %r2;
	mad.wide.u32 	%rd3, %r4, 4, %rd1;
	mad.wide.u32 	%rd4, %r4, 4, %rd2;
	BODY
	ret;
}
"""


def run(body: str, x: Array, *, n: int = 0, threads: int = 64, programs: int = 1, shared: int = 1024) -> Array:
    """Run ``body``, in which %r2 is the thread, %r3 the program, %r4 both; %rd3 and %rd4 their places in x and y."""
    y = np.zeros(threads * programs, x.dtype)
    program = Program(parse(KERNEL.replace("BODY", body).replace("THREADS", str(threads))), shared)
    arguments = {"x": x.ctypes.data, "y": y.ctypes.data, "n": n}
    program.run(programs, arguments, Global([(a.ctypes.data, a.nbytes, name) for a, name in ((x, "x"), (y, "y"))]))
    return y


COUNT = np.arange(128, dtype=np.uint32)
LOAD, STORE = "ld.global.b32 {%r5}, [%rd3 + 0];", "st.global.b32 [%rd4 + 0], {%r6};"
CELL = "shl.b32 %r7, %r2, 2; mov.b32 %r8, global_smem; add.s32 %r9, %r7, %r8;"
OTHERS_CELL = "xor.b32 %r10, %r7, 128; add.s32 %r11, %r10, %r8;"


def test_a_grid_of_programs() -> None:
    body = LOAD + "add.s32 %r6, %r5, %r1;" + STORE
    assert (run(body, COUNT, n=7, programs=2) == COUNT + 7).all()


def test_threads_that_branch_apart_meet_again() -> None:
    """Each thread adds 1 as often as its number says, then all meet at a barrier; the join lies before the loop."""
    body = (
        "mov.b32 %r6, 0; bra.uni $LOOP;\n$JOIN:\nbar.sync 0;"
        + STORE
        + "ret;\n$LOOP:\nsetp.eq.u32 %p1, %r6, %r2; @%p1 bra $JOIN; add.s32 %r6, %r6, 1; bra.uni $LOOP;"
    )
    assert (run(body, COUNT)[:64] == COUNT[:64]).all()


def test_what_follows_a_loop_comes_after_all_of_it() -> None:
    assert order(0, {0: [1], 1: [5, 2], 2: [3, 4], 3: [2], 4: [1], 5: []}) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("kind", "by", "limits", "source"),
    [
        ("bfly", 16, 31, lambda lane: lane ^ 16),
        ("idx", 5, 31, lambda lane: 5),
        ("up", 1, 0, lambda lane: max(lane - 1, 0)),
        ("down", 3, 31, lambda lane: lane + 3 if lane < 29 else lane),
        ("down", 1, 7 << 8 ^ 24 << 8 ^ 7 << 8 | 31, lambda lane: lane if lane % 8 == 7 else lane + 1),
    ],
)
def test_shuffles(kind: str, by: int, limits: int, source: Any) -> None:
    got = run(LOAD + f"shfl.sync.{kind}.b32 %r6, %r5, {by}, {limits}, -1;" + STORE, COUNT)
    assert got[:64].tolist() == [lane // 32 * 32 + source(lane % 32) for lane in range(64)]


def test_the_largest_of_a_warp() -> None:
    got = run(LOAD + "mov.b32 %r7, -1; redux.sync.max.s32 %r6, %r5, %r7;" + STORE, COUNT)
    assert got[:64].tolist() == [31] * 32 + [63] * 32


def test_matrices_are_dealt_out_as_they_were_taken() -> None:
    """Rows of 16 bytes from 8 lanes; lane 4 i + j has the elements 2 j and 2 j + 1 of row i."""
    body = (
        "shl.b32 %r7, %r2, 4; mov.b32 %r8, global_smem; add.s32 %r9, %r7, %r8;"
        + LOAD
        + "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r9], {%r5}; bar.sync 0;"
    )
    plain = body + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r9];" + STORE
    assert (run(plain, COUNT, threads=32)[:32] == COUNT[:32]).all()
    turned = body + "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r6}, [%r9];" + STORE
    halves = np.arange(64, dtype=np.uint16)
    got = run(turned, halves.view(np.uint32), threads=32).view(np.uint16)
    assert (got.reshape(8, 8) == halves.reshape(8, 8).T).all()


def bf16_words(values: Array) -> Array:
    """Small integers, two to a word."""
    return np.ascontiguousarray(values.astype(ml_dtypes.bfloat16)).view(np.uint32).ravel()


LANE = "shr.u32 %r10, %r2, 2; and.b32 %r11, %r2, 3;"  # g and t of a lane 4 g + t
A_ROW = (
    "mad.lo.s32 %r12, %r10, 32, 0; mad.lo.s32 %r12, %r11, 4, %r12; cvt.u64.u32 %rd5, %r12; add.s64 %rd6, %rd1, %rd5;"
)


def test_a_product_of_a_warp() -> None:
    """[16, 16] bfloat16 times [16, 8], whose rows lie in x after each other."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (16, 16)), rng.integers(-9, 10, (8, 16))
    body = (
        LANE
        + A_ROW
        + "ld.global.b32 {%r13}, [%rd6 + 0]; ld.global.b32 {%r14}, [%rd6 + 256]; ld.global.b32 {%r15}, [%rd6 + 16];"
        "ld.global.b32 {%r16}, [%rd6 + 272]; ld.global.b32 {%r17}, [%rd6 + 512]; ld.global.b32 {%r18}, [%rd6 + 528];"
        "mov.b32 %r5, 0x3F800000; mov.b32 %r7, 0;"
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r5, %r6, %r7, %r8}, {%r13, %r14, %r15, %r16},"
        "{%r17, %r18}, {%r5, %r5, %r7, %r7}; st.global.b32 [%rd4 + 0], {RESULT};"
    )
    want = a @ b.T
    want[:8] += 1
    for n, (row, column) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
        x = np.concatenate([bf16_words(a), bf16_words(b)])
        got = run(body.replace("RESULT", f"%r{5 + n}"), x, threads=32)[:32].view(np.float32)
        assert (got.reshape(8, 4) == want[row : row + 8, column::2]).all()


def test_a_product_of_integers_is_clamped_where_it_says_so() -> None:
    body = (
        "mov.b32 %r5, 0x7F7F7F7F; mov.b32 %r6, 0x7FFFFFF0;"
        "mma.sync.aligned.m16n8k32.row.colCLAMPED.s32.s8.s8.s32 {%r7, %r8, %r9, %r10}, {%r5, %r5, %r5, %r5},"
        "{%r5, %r5}, {%r6, %r6, %r6, %r6}; st.global.b32 [%rd4 + 0], {%r7};"
    )
    for clamped, want in ((".satfinite", 2**31 - 1), ("", 2**31 - 16 + 32 * 127**2 - 2**32)):
        assert (run(body.replace("CLAMPED", clamped), COUNT, threads=32)[:32].view(np.int32) == want).all()


# Rows of 128 bytes of b, in the order of the swizzle; the row of a is the thread's own in each of its four words.
BESIDE = (
    "mad.wide.u32 %rd5, %r2, 16, %rd1; and.b32 %r7, %r2, 7; shr.u32 %r8, %r2, 3; and.b32 %r8, %r8, 7;"
    "xor.b32 %r7, %r7, %r8; shl.b32 %r7, %r7, 4; shl.b32 %r8, %r8, 7; add.s32 %r7, %r7, %r8;"
    "mov.b32 %r8, global_smem; add.s32 %r7, %r7, %r8; setp.lt.u32 %p1, %r2, 64;"
    "@%p1 ld.global.v4.b32 {%r13, %r14, %r15, %r16}, [%rd5 + 0]; @%p1 st.shared.v4.b32 [%r7], {%r13, %r14, %r15, %r16};"
    "fence.proxy.async.shared::cta; BARRIER"
    "ld.global.b32 {%r9}, [%rd3 + 1024]; mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r17, 0;"
    "shr.u32 %r18, %r8, 4; cvt.u64.u32 %rd6, %r18; or.b64 %rd6, %rd6, 4611686293305294848; setp.eq.u32 %p2, %r1, 1;"
    "wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r17},"
    "{%r9, %r9, %r9, %r9}, %rd6, %p2, 1, 1, 0; wgmma.commit_group.sync.aligned; AFTER"
    "wgmma.wait_group.sync.aligned 0; st.global.b32 [%rd4 + 0], {%r10};"
)


@pytest.mark.parametrize(
    ("barrier", "after", "says"),
    [
        ("bar.sync 0;", "", None),
        ("bar.sync 0;", "mov.b32 %r9, 0;", "other bytes"),
        (
            "bar.sync 0;",
            "bar.sync 0; @%p1 st.shared.v4.b32 [%r7], {%r9, %r9, %r9, %r9};",
            "reads what another has written",
        ),
        ("bar.sync 0;", "@%p1 st.shared.v4.b32 [%r7], {%r9, %r9, %r9, %r9};", "writes what another reads"),
        ("", "", "reads what another has written"),
    ],
)
def test_a_product_of_a_warpgroup_reads_its_operands_until_it_is_waited_for(
    barrier: str, after: str, says: str | None
) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 10, (64, 4, 2)), rng.integers(-9, 10, (8, 64))
    lanes = a.reshape(4, 2, 8, 4, 2)[:, 0]  # rows g of each warp; words of g + 8 and of the other columns are the same
    x = np.concatenate([bf16_words(b), bf16_words(lanes)])
    body = BESIDE.replace("BARRIER", barrier).replace("AFTER", after)
    if says and says != "other bytes":
        with pytest.raises(PtxError, match=says):
            run(body, x, n=1, threads=128)
        return
    got = run(body, x, n=1, threads=128)[:128].view(np.float32).reshape(4, 8, 4)
    rows = lanes.reshape(4, 8, 8)
    want = np.concatenate([rows, rows], -1) @ b[:, :16].T
    assert (got == want[..., ::2]).all() == (says is None)


def test_a_copy_is_there_when_it_is_waited_for() -> None:
    copy = "setp.lt.u32 %p1, %r2, 16; mov.b32 %r5, 16; @%p1 mov.b32 %r5, 0; mad.wide.u32 %rd5, %r2, 16, %rd1;"
    copy += CELL + "shl.b32 %r9, %r2, 4; add.s32 %r9, %r9, %r8; cp.async.cg.shared.global [%r9], [%rd5], 0x10, %r5;"
    copy += "cp.async.commit_group; cp.async.wait_group PENDING; ld.shared.b32 %r6, [%r9];" + STORE
    x = np.arange(1, 257, dtype=np.uint32)
    got = run(copy.replace("PENDING", "0"), x)
    assert (got[:64] == np.where(np.arange(64) < 16, 0, x[::4])).all()
    assert (run(copy.replace("PENDING", "1"), x)[:64] == 0xA5A5A5A5).all()


def test_tickets_are_taken_in_turn() -> None:
    x = np.zeros(128, np.uint32)
    got = run("mov.b32 %r5, 1; atom.global.gpu.acq_rel.add.u32 %r6, [%rd1 + 0], %r5;" + STORE, x)
    assert sorted(got[:64]) == list(range(64))
    assert x[0] == 64


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_floats_of_16_bits_round_once(name: str) -> None:
    """Fma of random codes, against the sum of fractions."""
    dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[name]
    rng = np.random.default_rng(1)
    exponents = rng.integers(-9, 0, (3, 4000))
    values = (rng.integers(-255, 256, (3, 4000)) * 2.0**exponents).astype(dtype)
    codes = [v.view(np.uint16) for v in values]
    got = TABLE[f"fma.rn.{name}"].function(*codes).view(dtype)
    places = 10 if name == "f16" else 7
    for a, b, c, found in zip(*values, got, strict=True):
        assert Fraction(float(found)) == shortened(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)), places)


def shortened(exact: Fraction, places: int) -> Fraction:
    """The nearest float of so many places behind the first, ties to even; of no small exponent."""
    if exact == 0:
        return exact
    exponent = 0
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - places)
    return round(exact / unit) * unit


FAULTS = {
    "outside of every tensor, the first of them 0 after": LOAD.replace("%rd3 + 0", "%rd3 + 512"),
    "is no multiple of 16": "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd3 + 4];",
    "thread 0 reads what another has written, byte 128": f"{CELL} {OTHERS_CELL} st.shared.b32 [%r9], %r2;"
    "ld.shared.b32 %r6, [%r11];",
    "thread 0 writes what another reads": f"{CELL} {OTHERS_CELL} st.shared.b32 [%r9], %r2; bar.sync 0;"
    "ld.shared.b32 %r6, [%r11]; st.shared.b32 [%r9], %r2;",
    "writes what another has written": f"{CELL} {OTHERS_CELL} st.shared.b32 [%r9], %r2; st.shared.b32 [%r11], %r2;",
    "byte 1024 is outside of the 1024": "mov.b32 %r8, global_smem; ld.shared.b32 %r6, [%r8+1024];",
    "threads write different values": "st.global.b32 [%rd2 + 0], {%r2};",
    "not all threads of a program reach": "setp.eq.b32 %p1, %r2, 3; @%p1 bar.sync 0;",
    "other lanes of the warp run": "setp.lt.u32 %p1, %r2, 3; @%p1 shfl.sync.bfly.b32 %r6, %r2, 1, 31, -1;",
    "a division by zero": "div.u32 %r6, %r4, %r2;",
    "is not known": "ex2.approx.f32 %r6, %r2;",
    "a register of 16 bits for": "add.s32 %rs1, %r2, %r2;",
    "operands, expected": "add.s32 %r6, %r2;",
    "%clock is not known|unknown operand": "mov.u32 %r6, %clock;",
    "is no multiple of 16 bytes": "mov.b32 %r8, global_smem; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r8+4];",
    "predicate has not been written": "@%p3 mov.u32 %r6, 1;",
    "no label": "bra.uni $NOWHERE;",
}


@pytest.mark.parametrize("says", FAULTS)
def test_a_fault_is_found(says: str) -> None:
    with pytest.raises(PtxError, match=says):
        run(FAULTS[says], COUNT)


def test_warps_of_one_program_need_a_barrier_and_lanes_of_a_warp_one_of_theirs() -> None:
    near = "xor.b32 %r10, %r7, 4; add.s32 %r11, %r10, %r8;"
    body = f"{CELL} {near} st.shared.b32 [%r9], %r2; BARRIER ld.shared.b32 %r6, [%r11];" + STORE
    assert (run(body.replace("BARRIER", "bar.warp.sync -1;"), COUNT)[:64] == COUNT[:64] ^ 1).all()
    with pytest.raises(PtxError, match="no barrier"):
        run(body.replace("BARRIER", ""), COUNT)
    apart = body.replace(near, OTHERS_CELL)
    assert (run(apart.replace("BARRIER", "bar.sync 0;"), COUNT)[:64] == COUNT[:64] ^ 32).all()
    with pytest.raises(PtxError, match="no barrier"):
        run(apart.replace("BARRIER", "bar.warp.sync -1;"), COUNT)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def f32(bits: list[int]) -> Array:
    return np.array(bits, np.uint32).view(np.float32)


def nearest(x: Fraction) -> float:
    """x rounded once to float32."""
    if x == 0:
        return 0.0
    exponent = -150
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** max(exponent - 23, -149)
    units = round(x / unit)  # to even
    return float(units * unit) if abs(units * unit) < 2**128 else float("inf") * (1 if x > 0 else -1)


def test_fma_rounds_once() -> None:
    draw = random.Random(0)
    words = [[draw.getrandbits(32) for _ in range(3)] for _ in range(300)]
    # a product that lies beside the middle of two float32 by less than float64 shows
    words += [[0x3F800001, 0x3F800001, 0x33800000 + k] for k in range(50)]
    words += [[0x3F800001, 0x3F7FFFFF, 0xBF800000 + k] for k in range(8)]
    words += [
        [0x3F800000, 0x3F800000, 0x33800000],
        [0x3F800000, 0x3F800001, 0x33800000],
        [0x3F800001, 0x3F800000, 0x0001],
    ]
    words += [[0x3FC00000, 0x4B800001, s ^ 0x00000001] for s in (0, 1 << 31)]
    for a, b, c in (f32(word) for word in words):
        if not np.isfinite([a, b, c]).all():
            continue
        with np.errstate(all="ignore"):
            (got,) = arithmetic.fma(*(np.array([v]) for v in (a, b, c)))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        assert float(got) == nearest(exact), (a, b, c)


def test_a_saturated_float_is_none_below_nothing_and_no_nan() -> None:
    x = np.array([-3, -0.0, 0, 0.25, 1, 1.5, np.inf, -np.inf, np.nan], np.float32)
    got = arithmetic.saturated(x)
    assert got.view(np.uint32).tolist() == np.array([0, 0, 0, 0.25, 1, 1, 1, 0, 0], np.float32).view(np.uint32).tolist()


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_two_floats_at_once(op: str) -> None:
    a, b = (np.random.default_rng(n).standard_normal(64).astype(np.float32) for n in (0, 1))
    got = TABLE[f"{op}.rn.f32x2"].function(a.view(np.uint64), b.view(np.uint64))
    assert (got.view(np.float32) == {"add": a + b, "sub": a - b, "mul": a * b}[op]).all()


def test_the_smaller_and_the_larger() -> None:
    nan = float("nan")
    with np.errstate(all="ignore"):
        a, b = np.array([1, nan, 2, nan, -0.0, 0.0], np.float32), np.array([nan, 1, 3, nan, 0.0, -0.0], np.float32)
        low, high = arithmetic.minimum(a, b), arithmetic.maximum(a, b)
    one = 0x3F800000
    assert low.view(np.uint32).tolist() == [one, one, 0x40000000, 0x7FFFFFFF, 1 << 31, 1 << 31]
    assert high.view(np.uint32).tolist() == [one, one, 0x40400000, 0x7FFFFFFF, 0, 0]


@pytest.mark.parametrize(
    ("ours", "dtype", "nan"),
    [
        (arithmetic.to_bfloat16, ml_dtypes.bfloat16, 0x7FFF),
        (arithmetic.to_float16, np.float16, 0x7FFF),
        (lambda x: arithmetic.to_float8(x, "e4m3"), ml_dtypes.float8_e4m3fn, 0x7F),
        (lambda x: arithmetic.to_float8(x, "e5m2"), ml_dtypes.float8_e5m2, 0x7F),
    ],
)
def test_narrow_floats(ours: Any, dtype: Any, nan: int) -> None:
    """Every upper half of a float32 and its neighbours, where a rounding is decided."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    x = np.concatenate([high, high + 1, high - 1, high + 0x8000, high + 0x8001, high + 0x7FFF]).view(np.float32)
    largest = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(all="ignore"):
        wide = np.clip(x, -largest, largest) if np.dtype(dtype).itemsize == 1 else x
        want = wide.astype(dtype).view(f"u{np.dtype(dtype).itemsize}")
        got = ours(x)
    assert (got == np.where(np.isnan(x), nan, want)).all()


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_floats_of_8_bits_as_float16(name: str) -> None:
    code = np.arange(256, dtype=np.uint8)
    want = code.view({"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[name]).astype(np.float16)
    got = arithmetic.from_float8(code, name)
    assert (got == np.where(np.isnan(want), 0x7FFF, want.view(np.uint16))).all()


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def bfe(a: int, at: int, length: int, bits: int, sign: bool) -> int:
    """Extract ``length`` bits of a from bit ``at`` on, one after the other, as the manual of PTX defines bfe."""
    at, length, top = at & 255, length & 255, bits - 1
    last = (a >> min(at + length - 1, top) & 1) if sign and length else 0
    return sum((a >> (at + k) & 1 if k < length and at + k <= top else last) << k for k in range(bits))


def bfi(a: int, b: int, at: int, length: int) -> int:
    at, length = at & 255, length & 255
    for k in range(length):
        if at + k < 32:
            b = b & ~(1 << (at + k)) | (a >> k & 1 if k < 32 else 0) << (at + k)
    return b


def prmt(a: int, b: int, selector: int) -> int:
    octets = struct.pack("<II", a, b)
    chosen = [selector >> 4 * n & 15 for n in range(4)]
    return int.from_bytes(bytes((255 * (octets[s & 7] >> 7)) if s & 8 else octets[s & 7] for s in chosen), "little")


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS: dict[str, Any] = {
    "mul.hi.s32": lambda a, b: signed(a, 32) * signed(b, 32) >> 32,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s64": lambda a, b: signed(a, 64) * signed(b, 64) >> 64,
    "mul.hi.u64": lambda a, b: a * b >> 64,
    "mul.wide.s32": lambda a, b: signed(a, 32) * signed(b, 32),
    "mul.wide.u16": lambda a, b: a * b,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mad.wide.s32": lambda a, b, c: signed(a, 32) * signed(b, 32) + c,
    "div.s32": lambda a, b: towards_zero(signed(a, 32), signed(b, 32)),
    "div.u64": lambda a, b: a // b,
    "div.s64": lambda a, b: towards_zero(signed(a, 64), signed(b, 64)),
    "rem.s32": lambda a, b: signed(a, 32) - towards_zero(signed(a, 32), signed(b, 32)) * signed(b, 32),
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.s32": lambda a, b: signed(a, 32) >> min(b, 31),
    "shr.u64": lambda a, b: a >> b,
    "bfe.u32": lambda a, b, c: bfe(a, b, c, 32, False),
    "bfe.s32": lambda a, b, c: bfe(a, b, c, 32, True),
    "bfe.u64": lambda a, b, c: bfe(a, b, c, 64, False),
    "bfi.b32": bfi,
    "prmt.b32": prmt,
    "lop3.b32": lambda a, b, c, t: sum(
        (t >> ((a >> k & 1) * 4 + (b >> k & 1) * 2 + (c >> k & 1)) & 1) << k for k in range(32)
    ),
    "shf.l.wrap.b32": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "popc.b32": lambda a: a.bit_count(),
    "max.u16x2": lambda a, b: max(a >> 16, b >> 16) << 16 | max(a & 0xFFFF, b & 0xFFFF),
    "add.s16x2": lambda a, b: ((a >> 16) + (b >> 16) & 0xFFFF) << 16 | (a + b & 0xFFFF),
    "max.relu.s32": lambda a, b: max(signed(a, 32), signed(b, 32), 0),
    "cvt.s16.s8": lambda a: signed(a, 8),
    "cvt.s64.s32": lambda a: signed(a, 32),
    "cvt.u64.u16": lambda a: a,
    "cvt.u32.u64": lambda a: a,
    "setp.lt.s32": lambda a, b: signed(a, 32) < signed(b, 32),
    "setp.gt.u64": lambda a, b: a > b,
}


@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode: str) -> None:
    meaning, draw = TABLE[opcode], random.Random(opcode)
    sizes = [dtype(t).itemsize * 8 for t in meaning.operands]
    edges = [0, 1, 2, 7, 15, 16, 31, 32, 33, 63, 64, 255, 256, -1, -2, 1 << 31, 1 << 63, (1 << 31) - 1]
    rows = [
        [draw.choice([draw.getrandbits(s), draw.choice(edges)]) & ((1 << s) - 1) for s in sizes] for _ in range(999)
    ]
    rows = [row for row in rows if not (meaning.nonzero and row[-1] == 0)]
    rows = [row for row in rows if not (meaning.nonzero and row[-1] == (1 << sizes[-1]) - 1)]  # -(-2^31) is none
    rows = [row for row in rows if opcode != "lop3.b32" or row[3] < 256]
    taken = zip(zip(*rows, strict=True), sizes, meaning.operands, strict=True)
    columns = [np.array(column, f"u{size // 8}").view(dtype(t)) for column, size, t in taken]
    with np.errstate(all="ignore"):
        got = meaning.function(*columns)
    assert got.dtype == dtype(meaning.result)
    bits = 1 if meaning.result == "pred" else got.dtype.itemsize * 8
    want = [int(INTEGERS[opcode](*row)) & ((1 << bits) - 1) for row in rows]
    assert [int(v) & ((1 << bits) - 1) for v in got] == want


def dtype(type: str) -> Any:
    from ptx.instructions import DTYPES

    return DTYPES[type]
