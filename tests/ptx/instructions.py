"""The instructions that need no other thread and no memory: opcode -> types and a function of arrays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx import arithmetic as by
from ptx.arithmetic import Array

TYPES: dict[str, Any] = {  # of PTX -> of NumPy; the floats of 16 bits and all pairs stay codes
    "pred": np.bool_,
    **{f"{kind}{bits}": f"u{bits // 8}" for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"i{bits // 8}" for bits in (8, 16, 32, 64)},
    "f32": "f4",
    **dict.fromkeys(("f16", "bf16", "e4m3x2", "e5m2x2"), "u2"),
    **dict.fromkeys(("f16x2", "bf16x2", "u16x2"), "u4"),
}
DTYPES = {name: np.dtype(dtype) for name, dtype in TYPES.items()}


@dataclass(frozen=True)
class Meaning:
    """The meaning of an opcode: ``function`` of operands of these types, viewed as TYPES says."""

    result: str
    operands: tuple[str, ...]
    function: Callable[..., Array]
    nonzero: bool = False  # the last operand must not be 0


def pairs(function: Callable[..., Array]) -> Callable[..., Array]:
    """Apply ``function`` to both halves of a word, each uint16."""

    def halves(*words: Array) -> Array:
        low, high = (function(*((w >> np.uint32(at)).astype(np.uint16) for w in words)) for at in (0, 16))
        return low | (high.astype(np.uint32) << np.uint32(16))

    return halves


def both(function: Callable[..., Array]) -> Callable[..., Array]:
    """Apply ``function`` to both halves of 64 bits, each float32."""

    def halves(*words: Array) -> Array:
        parts = [[(w >> np.uint64(at)).astype(np.uint32).view(np.float32) for w in words] for at in (0, 32)]
        low, high = (function(*part).view(np.uint32).astype(np.uint64) for part in parts)
        return low | (high << np.uint64(32))

    return halves


def joined(high: Array, low: Array, bits: int) -> Array:
    """The operands of a conversion of two: the first is the high half."""
    wide = np.uint16 if bits == 8 else np.uint32
    return (high.astype(wide) << wide(bits)) | low


def table() -> dict[str, Meaning]:
    found: dict[str, Meaning] = {}
    for known in (floats, integers, bits, moves, comparisons, conversions):
        for opcode, meaning in known().items():
            assert opcode not in found, opcode
            found[opcode] = meaning
    return found


def floats() -> dict[str, Meaning]:
    def rounded(function: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *x: by.canonical(function(*x))

    two = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
    found = {f"{op}.rn.f32": Meaning("f32", ("f32",) * 2, rounded(f)) for op, f in two.items()}
    for op in ("add", "sub", "mul"):  # from sm_100 on
        found[f"{op}.rn.f32x2"] = Meaning("b64", ("b64",) * 2, both(rounded(two[op])))
    found |= {
        "sqrt.rn.f32": Meaning("f32", ("f32",), rounded(np.sqrt)),
        "rcp.rn.f32": Meaning("f32", ("f32",), rounded(lambda x: np.float32(1) / x)),
        "fma.rn.f32": Meaning("f32", ("f32",) * 3, by.fma),
        "fma.rn.sat.f32": Meaning("f32", ("f32",) * 3, lambda *x: by.saturated(by.fma(*x))),
        "min.f32": Meaning("f32", ("f32",) * 2, by.minimum),
        "max.f32": Meaning("f32", ("f32",) * 2, by.maximum),
        "abs.f32": Meaning("b32", ("b32",), lambda x: x & 0x7FFFFFFF),
        "neg.f32": Meaning("b32", ("b32",), lambda x: x ^ 0x80000000),
        "abs.bf16x2": Meaning("b32", ("b32",), lambda x: x & 0x7FFF7FFF),
        "abs.f16x2": Meaning("b32", ("b32",), lambda x: x & 0x7FFF7FFF),
        "abs.f16": Meaning("b16", ("b16",), lambda x: x & 0x7FFF),
        "abs.bf16": Meaning("b16", ("b16",), lambda x: x & 0x7FFF),
        "neg.f16": Meaning("b16", ("b16",), lambda x: x ^ 0x8000),
        "neg.bf16": Meaning("b16", ("b16",), lambda x: x ^ 0x8000),
    }
    for t, widen, narrow in (
        ("f16", by.from_float16, by.to_float16),
        ("bf16", by.from_bfloat16, by.to_bfloat16),
    ):
        for op, operands, function in of_16_bits(widen, narrow):
            found[f"{op}.{t}"] = Meaning(t, (t,) * operands, function)
            found[f"{op}.{t}x2"] = Meaning("b32", ("b32",) * operands, pairs(function))
    return found


def of_16_bits(
    widen: Callable[[Array], Array], narrow: Callable[[Array], Array]
) -> Iterator[tuple[str, int, Callable[..., Array]]]:
    """(opcode, operands, function of codes)"""
    one, minus_zero = np.float32([1]), np.float32([-0.0])

    def made(fma: Callable[..., tuple[Array, Array, Array]]) -> Callable[..., Array]:
        return lambda *codes: narrow(by.fma_16(*np.broadcast_arrays(*fma(*map(widen, codes)))))

    for rounds in ("", ".rn"):
        yield f"add{rounds}", 2, made(lambda a, b: (a, one, b))
        yield f"sub{rounds}", 2, made(lambda a, b: (a, one, by.negative(b)))
        yield f"mul{rounds}", 2, made(lambda a, b: (a, b, minus_zero))
    yield "fma.rn", 3, made(lambda a, b, c: (a, b, c))
    yield "min", 2, lambda *codes: narrow(by.minimum(*np.broadcast_arrays(*map(widen, codes))))
    yield "max", 2, lambda *codes: narrow(by.maximum(*np.broadcast_arrays(*map(widen, codes))))


def integers() -> dict[str, Meaning]:
    found: dict[str, Meaning] = {}
    for kind, size in itertools.product("su", (16, 32, 64)):
        t = f"{kind}{size}"
        found |= {
            f"add.{t}": Meaning(t, (t, t), np.add),
            f"sub.{t}": Meaning(t, (t, t), np.subtract),
            f"mul.lo.{t}": Meaning(t, (t, t), np.multiply),
            f"mad.lo.{t}": Meaning(t, (t, t, t), lambda a, b, c: a * b + c),
            f"min.{t}": Meaning(t, (t, t), np.minimum),
            f"max.{t}": Meaning(t, (t, t), np.maximum),
            f"div.{t}": Meaning(t, (t, t), by.quotient, True),
            f"rem.{t}": Meaning(t, (t, t), lambda a, b: a - by.quotient(a, b) * b, True),
        }
        if size > 16:
            found[f"mul.hi.{t}"] = Meaning(t, (t, t), by.multiply_high)
        if size < 64:
            wide, dtype = f"{kind}{2 * size}", DTYPES[f"{kind}{2 * size}"]
            found[f"mul.wide.{t}"] = Meaning(wide, (t, t), lambda a, b, w=dtype: a.astype(w) * b.astype(w))
            found[f"mad.wide.{t}"] = Meaning(wide, (t, t, wide), lambda a, b, c, w=dtype: a.astype(w) * b.astype(w) + c)
    for size in (16, 32, 64):
        t = f"s{size}"
        found |= {f"neg.{t}": Meaning(t, (t,), np.negative), f"abs.{t}": Meaning(t, (t,), np.abs)}
    zero = np.int32(0)
    found["max.relu.s32"] = Meaning("s32", ("s32",) * 2, lambda a, b: np.maximum(np.maximum(a, b), zero))
    found["min.relu.s32"] = Meaning("s32", ("s32",) * 2, lambda a, b: np.maximum(np.minimum(a, b), zero))
    found["add.s16x2"] = found["add.u16x2"] = Meaning("b32", ("b32",) * 2, pairs(np.add))
    found["max.u16x2"] = Meaning("b32", ("b32",) * 2, pairs(np.maximum))
    found["min.u16x2"] = Meaning("b32", ("b32",) * 2, pairs(np.minimum))
    return found


def bits() -> dict[str, Meaning]:
    found = {}
    for t in ("pred", "b16", "b32", "b64"):
        for op, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            found[f"{op}.{t}"] = Meaning(t, (t, t), function)
        found[f"not.{t}"] = Meaning(t, (t,), np.invert)
    for size in (16, 32, 64):
        found[f"shl.b{size}"] = Meaning(f"b{size}", (f"b{size}", "u32"), by.shift_left)
        for kind in "bsu":
            t = f"{kind}{size}"
            found[f"shr.{t}"] = Meaning(t, (t, "u32"), by.shift_right)
    for t in ("s32", "u32", "s64", "u64"):
        found[f"bfe.{t}"] = Meaning(t, (t, "u32", "u32"), by.extract)
    word, field = ("b32",) * 3, ("u32", "u32")
    found |= {
        "bfi.b32": Meaning("b32", ("b32", "b32", *field), by.insert),
        "bfi.b64": Meaning("b64", ("b64", "b64", *field), by.insert),
        "prmt.b32": Meaning("b32", word, by.permute),
        "lop3.b32": Meaning("b32", (*word, "u32"), by.logic),
        "shf.l.wrap.b32": Meaning("b32", word, by.funnel_left),
        "shf.r.wrap.b32": Meaning("b32", word, by.funnel_right),
        "popc.b32": Meaning("u32", ("b32",), lambda x: np.bitwise_count(x).astype(np.uint32)),
        "popc.b64": Meaning("u32", ("b64",), lambda x: np.bitwise_count(x).astype(np.uint32)),
    }
    return found


def moves() -> dict[str, Meaning]:
    found = {f"mov.{t}": Meaning(t, (t,), lambda x: x) for t in ("pred", "b16", "b32", "b64", "u16", "u32", "u64")}
    found |= {f"mov.{t}": Meaning(t, (t,), lambda x: x) for t in ("s16", "s32", "s64", "f32")}
    for t in ("b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"):
        found[f"selp.{t}"] = Meaning(t, (t, t, "pred"), lambda a, b, p: np.where(p, a, b))
    found["selp.f32"] = Meaning("b32", ("b32", "b32", "pred"), lambda a, b, p: np.where(p, a, b))
    found["selp.f16"] = found["selp.bf16"] = found["selp.b16"]
    return found


def comparisons() -> dict[str, Meaning]:
    """Setp: those of floats are false where one is NaN, or true with a u at the end."""
    plain = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    plain |= {"gt": np.greater, "ge": np.greater_equal}
    found = {}
    for kind, size in itertools.product("bsu", (16, 32, 64)):
        for op, function in plain.items():
            if kind != "b" or op in ("eq", "ne"):
                found[f"setp.{op}.{kind}{size}"] = Meaning("pred", (f"{kind}{size}",) * 2, function)
    for t, widen in (("f32", lambda x: x), ("f16", by.from_float16), ("bf16", by.from_bfloat16)):
        for op, function in plain.items():
            found[f"setp.{op}.{t}"] = Meaning("pred", (t, t), compared(function, widen, False))
            found[f"setp.{op}u.{t}"] = Meaning("pred", (t, t), compared(function, widen, True))
        found[f"setp.num.{t}"] = Meaning("pred", (t, t), compared(lambda a, b: True, widen, False))
        found[f"setp.nan.{t}"] = Meaning("pred", (t, t), compared(lambda a, b: False, widen, True))
    return found


def compared(function: Callable[..., Any], widen: Callable[[Array], Array], with_nan: bool) -> Callable[..., Array]:
    def compare(a: Array, b: Array) -> Array:
        a, b = widen(a), widen(b)
        return np.where(np.isnan(a) | np.isnan(b), with_nan, function(a, b))

    return compare


def conversions() -> dict[str, Meaning]:
    found: dict[str, Meaning] = {}
    whole = [f"{kind}{size}" for kind in "su" for size in (8, 16, 32, 64)]
    for to, of in itertools.product(whole, whole):
        found[f"cvt.{to}.{of}"] = Meaning(to, (of,), lambda x, dtype=DTYPES[to]: x.astype(dtype))
    for of in ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"):
        found[f"cvt.rn.f32.{of}"] = Meaning("f32", (of,), lambda x: x.astype(np.float32))
    found |= {
        "cvt.f32.f16": Meaning("f32", ("f16",), by.from_float16),
        "cvt.f32.bf16": Meaning("f32", ("bf16",), by.from_bfloat16),
        "cvt.rn.f16.f32": Meaning("f16", ("f32",), by.to_float16),
        "cvt.rn.bf16.f32": Meaning("bf16", ("f32",), by.to_bfloat16),
        "cvt.rni.f32.f32": Meaning("f32", ("f32",), lambda x: by.canonical(np.rint(x))),
        "cvt.rn.f16x2.f32": Meaning("b32", ("f32", "f32"), lambda a, b: joined(by.to_float16(a), by.to_float16(b), 16)),
        "cvt.rn.bf16x2.f32": Meaning(
            "b32", ("f32", "f32"), lambda a, b: joined(by.to_bfloat16(a), by.to_bfloat16(b), 16)
        ),
    }
    for name in ("e4m3", "e5m2"):
        found[f"cvt.rn.satfinite.{name}x2.f32"] = Meaning(
            "b16",
            ("f32", "f32"),
            lambda a, b, name=name: joined(by.to_float8(a, name), by.to_float8(b, name), 8),
        )
        found[f"cvt.rn.f16x2.{name}x2"] = Meaning(
            "b32",
            ("b16",),
            lambda x, name=name: joined(
                by.from_float8(x >> np.uint16(8), name), by.from_float8(x & np.uint16(255), name), 16
            ),
        )
    for op, function in (("rni", np.rint), ("rzi", np.trunc)):
        for to in ("s32", "u32"):
            found[f"cvt.{op}.{to}.f32"] = Meaning(to, ("f32",), lambda x, f=function, to=to: to_integer(f(x), to))
    return found


def to_integer(x: Array, to: str) -> Array:
    """The nearest integer of 32 bits that there is, 0 for NaN."""
    limits = np.iinfo(DTYPES[to])
    return np.where(np.isnan(x), 0, np.clip(x.astype(np.float64), limits.min, limits.max)).astype(DTYPES[to])
