"""Theorems of conversion instructions: whether their documented meaning is that of the kernels' formulas.

The meaning of an instruction is written from its vendor's manual, Intel's Software Developer's Manual and NVIDIA's
PTX ISA. The vectors of csrc/cpu/lanes.h are the templates of csrc/numerics.h with those instructions for their lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from quantlib import formats
from quantlib.formats import IntFormat
from quantlib.proof import cxx, functions, terms
from quantlib.proof.casts import FLOATS, modes
from quantlib.proof.cxx import Program, Value
from quantlib.proof.description import IntDescription, float_row, int_row, integer
from quantlib.proof.projections import zeros
from quantlib.proof.scales import INTS
from quantlib.proof.terms import F32, Term, and_, bits, float_const, float_sort, fp, implies, ite, not_, or_, same
from quantlib.proof.theorem import (
    HEADER,
    LANGUAGES,
    NUMERICS_H,
    REFERENCE,
    Case,
    Claim,
    Fault,
    Function,
    Run,
    Theorem,
    edit,
    float_variable,
    int_variable,
)
from quantlib.proof.words import TYPES, Type

LANES_H = "csrc/cpu/lanes.h"
INDEFINITE = 0x80000000

# ---- what the manuals say -------------------------------------------------------------------------------------------


def cvtps2dq(a: Term) -> Term:
    """x86 CVTPS2DQ: to int32 as MXCSR rounds, to nearest even; NaN and what is out of range give 0x80000000."""
    rounded = fp("roundToIntegral", a)
    fits = and_(fp("leq", float_const(-(2.0**31)), rounded), fp("lt", rounded, float_const(2.0**31)))
    return ite(fits, terms.node("to_sbv", terms.bits_sort(32), rounded), bits(INDEFINITE, 32))


def maxps(a: Term, b: Term) -> Term:
    """x86 MAXPS: the second operand where one is NaN, or both are zeros."""
    return ite(fp("lt", b, a), a, b)


def minps(a: Term, b: Term) -> Term:
    return ite(fp("lt", a, b), a, b)


def vcvtps2ph(x: Term) -> Term:
    """x86 VCVTPS2PH to nearest even: IEEE 754, subnormals too; a NaN keeps its sign and upper payload, and is quiet."""
    raw = terms.bits_of(x)
    sign = terms.shl(terms.resize(terms.extract(31, 31, raw), 16), 15)
    nan = terms.bor(terms.bor(sign, bits(0x7E00, 16)), terms.resize(terms.extract(22, 13, raw), 16))
    return ite(fp("isNaN", x), nan, terms.bits_of(terms.to_float(x, float_sort(5, 10))))


def vcvtneps2bf16(x: Term) -> Term:
    """x86 VCVTNEPS2BF16: to nearest even; a subnormal counts as zero; a NaN keeps its upper half and is quiet."""
    raw = terms.bits_of(x)
    upper = terms.extract(31, 16, raw)
    rounded = terms.add(raw, terms.add(bits(0x7FFF, 32), terms.resize(terms.extract(16, 16, raw), 32)))
    tiny = or_(fp("isSubnormal", x), fp("isZero", x))
    number = ite(tiny, terms.band(upper, bits(0x8000, 16)), terms.extract(31, 16, rounded))
    return ite(fp("isNaN", x), terms.bor(upper, bits(0x40, 16)), number)


def cvt_rni_sat_s8(x: Term) -> Term:
    """PTX cvt.rni.sat.s8.f32: to the nearest integer, ties to even, clamped to -128..127; NaN gives 0."""
    rounded = fp("roundToIntegral", x)
    code = terms.node("to_sbv", terms.bits_sort(32), rounded)
    low, high = float_const(-128.0), float_const(127.0)
    clamped = ite(fp("leq", rounded, low), integer(-128), ite(fp("leq", high, rounded), integer(127), code))
    return ite(fp("isNaN", x), integer(0), clamped)


def packssdw(x: Term) -> Term:
    """x86 PACKSSDW: int32 to int16, saturating."""
    low, high = integer(-(1 << 15)), integer((1 << 15) - 1)
    return terms.resize(ite(terms.slt(x, low), low, ite(terms.slt(high, x), high, x)), 16)


def packusdw(x: Term) -> Term:
    """x86 PACKUSDW: int32 to uint16, saturating."""
    low, high = integer(0), integer((1 << 16) - 1)
    return terms.resize(ite(terms.slt(x, low), low, ite(terms.slt(high, x), high, x)), 16)


# ---- the header on lanes of these instructions -----------------------------------------------------------------------

LANE = Type("lane", "float", 32)


class Vectors:
    """`Lanes<lane>`: a float whose operations are those of csrc/cpu/lanes.h on x86."""

    def match(self, program: Program, arguments: tuple[Any, ...]) -> cxx.Struct | None:
        if arguments != (LANE,):
            return None
        scope = cxx.Scope(program.scope)
        scope.names |= {"Bits": TYPES["uint32"], "Ints": TYPES["int32"]}
        scope.names |= {
            "max": lambda template, given: Value(LANE, maxps(*(v.term for v in given))),
            "min": lambda template, given: Value(LANE, minps(*(v.term for v in given))),
            "of": lambda template, given: Value(LANE, terms.to_float(given[0].term, F32)),
            "nearest": lambda template, given: Value(TYPES["int32"], cvtps2dq(given[0].term)),
        }
        return cxx.Struct("Lanes", scope, arguments)


def on_vectors(program: Program) -> Program:
    """The header with lanes of x86."""
    forms = program.scope.find("Lanes").specialisations
    if not any(isinstance(form, Vectors) for form in forms):
        forms.append(Vectors())
    return program


@functools.cache
def encode_vector(f: IntFormat, affine: bool) -> Function:
    """encode_int, on a vector of x86"""
    scalar = functions.encode_int(f, affine)

    def header(program: Program, t: Value, z: Value | None = None) -> Value:
        on_vectors(program)
        clamped = program.call("clamp_zero_point", z or functions.number(0, "int32"), template=(f.name, affine))
        code = program.call("encode_int", Value(LANE, t.term), clamped, template=(f.name, affine))
        assert isinstance(code, Value)
        return code

    return Function(
        f"encode_int<{f.name}> on vectors", scalar.inputs, scalar.outputs, scalar.reference, header, scalar.op,
        code_bits=f.bits, accepts=scalar.accepts,
    )  # fmt: skip


@functools.cache
def round_pair() -> Function:
    """x -> 32 bits whose upper half is the bfloat16, as the lambda `rounded` of csrc/cpu/lanes.h has it"""
    inner = functions.encode_float(float_row("bfloat16"), False)

    def header(program: Program, x: Value) -> Value:
        text = program.text(LANES_H)
        start = "const auto rounded = [](Floats x) {"
        if start not in text:
            raise SyntaxError(f"{LANES_H} has no lambda `rounded`")
        body = text.partition(start)[2].partition("};")[0]
        scope = cxx.Scope(program.scope)
        scope.names |= {"Floats": TYPES["float32"], "F": program.struct("bfloat16"), "x": x}
        result = cxx.Runner(program, scope).block(cxx.Reader(program, cxx.tokenized(body)).statements())
        return Value(TYPES["uint16"], terms.extract(31, 16, result.term))

    return Function("encode_pair<bfloat16>", inner.inputs, inner.outputs, inner.reference, header, inner.op)


# ---- claims ---------------------------------------------------------------------------------------------------------


def vector_codes(f: IntFormat, affine: bool) -> Case:
    def build(run: Run) -> Claim:
        t = float_variable("t")
        argument, z, is_code = zeros(f, affine)
        code = run(encode_vector(f, affine), HEADER, t=t, **argument)
        return Claim(is_code, IntDescription(f, affine).is_code_of(code, t, z))

    return Case(f"{f.name}{', every zero point' * affine}", build, f.name)


def halves(canonical: bool = True, flush: bool = False) -> Case:
    def build(run: Run) -> Claim:
        x = float_variable("x")
        code = run(functions.encode_float(float_row("float16"), False), HEADER, x=x)
        y = x
        if canonical:
            y = ite(fp("isNaN", x), terms.float_of(bits(0x7FFFFFFF, 32), F32), x)
        converted = vcvtps2ph(y)
        if flush:
            tiny = fp("lt", fp("abs", x), float_const(2.0**-14))
            converted = ite(tiny, terms.band(converted, bits(0x8000, 16)), converted)
        return Claim(terms.TRUE, same(code, converted))

    return Case("float16", build, "float16")


def pairs() -> Case:
    def build(run: Run) -> Claim:
        x = float_variable("x")
        return Claim(
            terms.TRUE,
            same(
                run(round_pair(), HEADER, x=x),
                run(functions.encode_float(float_row("bfloat16"), False), REFERENCE, x=x),
            ),
        )

    return Case("bfloat16", build, "bfloat16")


def upper_halves(shift: int = 16) -> Case:
    def build(run: Run) -> Claim:
        x = int_variable("x")
        upper = terms.extract(31, 16, x)
        arithmetic = terms.binary("bvashr", x, bits(shift, 32))
        logical = terms.lshr(x, shift)
        return Claim(terms.TRUE, and_(same(packssdw(arithmetic), upper), same(packusdw(logical), upper)))

    return Case("of 32 bits", build)


def exact_in_bfloat16(name: str, language: str) -> Case:
    """Claim the assumption of csrc/cpu/pairs.h: the lower half of the float32 is zero."""
    f = formats.get(name)

    def build(run: Run) -> Claim:
        if isinstance(f, IntFormat):
            code, one = int_variable("code"), float_const(1.0)
            argument, _, is_code = zeros(f, affine=True)
            domain = and_(is_code, IntDescription(f, affine=True).holds(code))
            y = run(functions.decode_int(f, affine=True), language, code=code, s=one, **argument)
        else:
            code, domain = int_variable("code", f.bits), terms.TRUE
            y = run(functions.decode_float(f), language, code=terms.resize(code, 32))
            domain = not_(fp("isNaN", y))
        return Claim(domain, same(terms.extract(15, 0, terms.bits_of(y)), bits(0, 16)))

    return Case(f"{name}, {language}", build, name)


def bfloat16_instruction(subnormal: bool = False, nan: bool = False) -> Case:
    def build(run: Run) -> Claim:
        x = float_variable("x")
        code = run(functions.encode_float(float_row("bfloat16"), False), REFERENCE, x=x)
        domain = [not_(fp("isNaN", x))] if not nan else []
        domain += [not_(fp("isSubnormal", x))] if not subnormal else []
        return Claim(and_(*domain), same(code, vcvtneps2bf16(x)))

    return Case("bfloat16", build, "bfloat16")


def clamped_first(name: str, language: str, clamp: bool = True) -> Case:
    f = float_row(name)

    def build(run: Run) -> Claim:
        x = float_variable("x")
        largest = float_const(f.max)
        inside = ite(fp("lt", x, fp("neg", largest)), fp("neg", largest), ite(fp("lt", largest, x), largest, x))
        first = run(functions.encode_float(f, False), language, x=inside if clamp else x)
        last = run(functions.encode_float(f, True), language, x=x)
        return Claim(not_(fp("isNaN", x)), same(first, last))

    return Case(f"{name}, {language}", build, name)


def saturated_bytes(affine: bool, everywhere: bool = False, nan: int = 0) -> Case:
    f = int_row("int8")

    def build(run: Run) -> Claim:
        t = float_variable("t")
        argument = {"z": integer(nan)} if affine else {}
        code = run(functions.encode_int(f, affine), HEADER, t=t, **argument)
        converted = cvt_rni_sat_s8(t)
        if affine or everywhere:
            return Claim(terms.TRUE, same(code, converted))
        lowest = fp("lt", t, float_const(-127.5))  # numbers that round to -128, which is not a symmetric code
        kept = same(code, ite(same(converted, integer(-128)), integer(-127), converted))
        at_tie = fp("eq", t, float_const(-127.5))
        return Claim(terms.TRUE, and_(kept, implies(not_(or_(lowest, at_tie)), same(code, converted))))

    return Case(f"int8, {'zero point 0' if affine else 'symmetric'}", build, "int8")


# ---- faults ---------------------------------------------------------------------------------------------------------

NO_UPPER_H = edit(NUMERICS_H, "t = min(t, Lanes<V>::of(qmax - z));", "")
NO_NAN_H = edit(
    NUMERICS_H, "t = t == t ? max(t, Lanes<V>::of(qmin - z)) : splat<V>(0.0f);", "t = max(Lanes<V>::of(qmin - z), t);"
)
PAIR_TIES_H = edit(LANES_H, "bits + (bits >> 16 & 1u) + 0x7fffu", "bits + 0x8000u")
PAIR_NAN_H = edit(LANES_H, "splat<Bits<Floats>>(uint32_t(F::nan_code) << 16)", "bits")
THIRDS_PY = edit(
    "quantlib/reference/numerics.py",
    "bits = (a << np.uint32(23 - f.fraction_bits))",
    "bits = (a << np.uint32(23 - f.fraction_bits)) + np.uint32(1)",
)
HALF_H = edit(NUMERICS_H, "canonical(mul(float(code - z), s_eff))", "canonical(mul(float(code - z) + 0.001f, s_eff))")
LIMIT_H = edit(NUMERICS_H, "saturate ? F::max_code : F::overflow_code", "saturate ? F::max_code - 1 : F::overflow_code")


def theorems() -> Iterator[Theorem]:
    int8, uint8 = map(int_row, ("int8", "uint8"))
    every_input = "all 2^32 float32"
    yield Theorem(
        "vectors of x86 project as the contract says",
        "C5",
        "encode_int of csrc/numerics.h with MAXPS, MINPS and CVTPS2DQ for its lanes gives "
        "clamp(RNE(t) + z, qmin, qmax); "
        "nothing out of range and no NaN reaches the conversion.",
        "all 2^32 float32 t, every zero point",
        tuple(vector_codes(f, affine) for f in INTS for affine in (False, True)),
        (
            Fault("not clamped above", vector_codes(int8, False), NO_UPPER_H),
            Fault("NaN not seen", vector_codes(uint8, False), NO_NAN_H),
        ),
    )
    yield Theorem(
        "VCVTPS2PH after the NaN select is the cast to float16",
        "C1 C3",
        "the conversion of F16C, given C1's NaN for any NaN, has the bytes of encode_float.",
        every_input,
        (halves(),),
        (
            Fault("without the NaN select", halves(canonical=False)),
            Fault("if it flushed subnormals", halves(flush=True)),
        ),
    )
    yield Theorem(
        "the pairs of bfloat16 are the cast",
        "C1 C3",
        "the upper half of what `rounded` of csrc/cpu/lanes.h gives has the bytes of encode_float.",
        every_input,
        (pairs(),),
        (Fault("ties away from zero", pairs(), PAIR_TIES_H), Fault("NaN not seen", pairs(), PAIR_NAN_H)),
    )
    yield Theorem(
        "packing upper halves never saturates",
        "C3",
        "PACKSSDW of an arithmetic shift by 16 and PACKUSDW of a logical one give the upper half.",
        "all 2^32 words",
        (upper_halves(),),
        (Fault("shifted by 15", upper_halves(15)), Fault("shifted by 14", upper_halves(14))),
    )
    short = [f.name for f in formats.WITHOUT_BOOKS if f.bits <= 8]
    yield Theorem(
        "codes of at most 8 bits are exact in bfloat16",
        "C7 C11",
        "a float's value, and an integer less its zero point, is a float32 whose lower half is empty.",
        "every code but NaN, every zero point",
        tuple(exact_in_bfloat16(name, language) for name in short for language in LANGUAGES),
        (
            Fault("one unit too high", exact_in_bfloat16("float8_e4m3fn", REFERENCE), THIRDS_PY),
            Fault("a thousandth too high", exact_in_bfloat16("int8", HEADER), HALF_H),
        ),
    )
    yield Theorem(
        "VCVTNEPS2BF16 is the cast to bfloat16 but for subnormals and NaN",
        "C1 C2 C3",
        "it counts a subnormal as zero and keeps a NaN's payload: no kernel casts with it.",
        "all float32 but subnormals and NaN",
        (bfloat16_instruction(),),
        (
            Fault("taken for subnormals too", bfloat16_instruction(subnormal=True)),
            Fault("taken for NaN too", bfloat16_instruction(nan=True)),
        ),
    )
    wide_floats = [f.name for f in FLOATS if f.bits == 16 and True in modes(f)]
    yield Theorem(
        "clamping before a conversion is saturating after it",
        "C3",
        "encode(clamp(x, -max, max)) = encode(x) saturating: what the Triton kernels do before cvt.rn.f16 and "
        "cvt.rn.bf16.",
        "all float32 but NaN",
        tuple(clamped_first(name, language) for name in wide_floats for language in LANGUAGES),
        (
            Fault("not clamped", clamped_first("float16", REFERENCE, clamp=False)),
            Fault("saturating one code below", clamped_first("bfloat16", HEADER), LIMIT_H),
        ),
    )
    yield Theorem(
        "cvt.rni.sat.s8 is the affine projection with zero point 0, not the symmetric one",
        "C5",
        "it gives -128 where a symmetric code stops at -127, for t from -127.5 down, and 0 for NaN. No kernel uses it.",
        "all 2^32 float32 t",
        (saturated_bytes(affine=True), saturated_bytes(affine=False)),
        (
            Fault("taken for the symmetric projection", saturated_bytes(affine=False, everywhere=True)),
            Fault("with a zero point of 1", saturated_bytes(affine=True, nan=1)),
        ),
    )
