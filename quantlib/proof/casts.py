"""Theorems of casts: C1, C2, C3, and the codes of C6."""

from __future__ import annotations

from collections.abc import Iterator

from quantlib import formats
from quantlib.formats import FloatFormat
from quantlib.proof import functions, terms
from quantlib.proof.description import WIDTH, FloatDescription, float_row, widened
from quantlib.proof.terms import F64, Term, and_, bits, float_const, float_sort, fp, implies, ite, not_, or_, same
from quantlib.proof.theorem import (
    HEADER,
    LANGUAGES,
    NUMERICS_H,
    NUMERICS_PY,
    REFERENCE,
    Case,
    Claim,
    Fault,
    Run,
    Theorem,
    edit,
    float_variable,
    int_variable,
)

FLOATS = [f for f in formats.WITHOUT_BOOKS if isinstance(f, FloatFormat)]
EVERY_INPUT = "all 2^32 float32"
EVERY_CODE = "every code"


def wide(code: Term) -> Term:
    return terms.resize(code, WIDTH)


def how(saturate: bool) -> str:
    return ", saturating" if saturate else ""


def label(f: FloatFormat, saturate: bool, language: str) -> str:
    return f"{f.name}{how(saturate)}, {language}"


def modes(f: FloatFormat) -> tuple[bool, ...]:
    """Saturating or not; a format with nothing beyond its largest value saturates in any case."""
    return (False, True) if f.overflow_code != f.max_code else (True,)


# ---- claims ---------------------------------------------------------------------------------------------------------


def nearest(f: FloatFormat, saturate: bool, language: str) -> Case:
    def build(run: Run) -> Claim:
        x, other = float_variable("x"), int_variable("other", WIDTH)
        described = FloatDescription(f)
        code = wide(run(functions.encode_float(f, saturate), language, x=x))
        only = implies(described.is_code_of(other, x, saturate), same(other, code))
        return Claim(terms.TRUE, and_(described.is_code_of(code, x, saturate), only))

    return Case(label(f, saturate, language), build, f.name)


def ieee(f: FloatFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        x = float_variable("x")
        code = run(functions.encode_float(f, False), language, x=x)
        rounded = terms.to_float(x, float_sort(f.exponent_bits, f.fraction_bits))
        return Claim(not_(fp("isNaN", x)), same(terms.float_of(code, rounded.sort), rounded))

    return Case(label(f, False, language), build, f.name)


def worth(f: FloatFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        code = int_variable("code", f.bits)
        y = run(functions.decode_float(f), language, code=terms.resize(code, 32))
        return Claim(terms.TRUE, FloatDescription(f).is_value_of(y, wide(code)))

    return Case(f"{f.name}, {language}", build, f.name)


def returns(f: FloatFormat, saturate: bool, language: str) -> Case:
    def build(run: Run) -> Claim:
        code = int_variable("code", f.bits)
        described = FloatDescription(f)
        y = run(functions.decode_float(f), language, code=terms.resize(code, 32))
        again = wide(run(functions.encode_float(f, saturate), language, x=y))
        kept = described.is_finite(wide(code))
        if not saturate:
            kept = or_(kept, described.is_infinite(wide(code)))
        nan = implies(described.is_nan(wide(code)), same(again, bits(described.nan, WIDTH)))
        return Claim(terms.TRUE, and_(implies(kept, same(again, wide(code))), nan))

    return Case(label(f, saturate, language), build, f.name)


def idempotent(f: FloatFormat, saturate: bool, language: str) -> Case:
    def build(run: Run) -> Claim:
        x = float_variable("x")
        code = run(functions.encode_float(f, saturate), language, x=x)
        y = run(functions.decode_float(f), language, code=terms.resize(code, 32))
        again = run(functions.encode_float(f, saturate), language, x=y)
        described = FloatDescription(f)
        nan = and_(described.is_nan(wide(code)), same(wide(again), bits(described.nan, WIDTH)))
        return Claim(terms.TRUE, or_(same(again, code), nan))

    return Case(label(f, saturate, language), build, f.name)


def monotone(f: FloatFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        x, larger = float_variable("x"), float_variable("larger")
        described = FloatDescription(f)
        codes = [wide(run(functions.encode_float(f, True), language, x=v)) for v in (x, larger)]
        values = [described.signed_value(code) for code in codes]
        return Claim(fp("leq", x, larger), fp("leq", *values))

    return Case(f"{f.name}, {language}", build, f.name)


def symmetric(f: FloatFormat, saturate: bool, language: str) -> Case:
    def build(run: Run) -> Claim:
        x = float_variable("x")
        encode = functions.encode_float(f, saturate)
        code, negative = (run(encode, language, x=v) for v in (x, fp("neg", x)))
        other = terms.xor(code, bits(f.sign_bit, code.sort.bits))
        if not FloatDescription(f).negative_zero:  # zero, and the NaN in the place of -0, have no sign
            magnitude = terms.band(code, bits(f.sign_bit - 1, code.sort.bits))
            other = ite(same(magnitude, bits(0, code.sort.bits)), code, other)
        return Claim(not_(fp("isNaN", x)), same(negative, other))

    return Case(label(f, saturate, language), build, f.name)


def half_a_step(f: FloatFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        x = float_variable("x")
        described = FloatDescription(f)
        code = wide(run(functions.encode_float(f, True), language, x=x))
        size = widened(fp("abs", x))
        error = fp("abs", fp("sub", described.signed_value(code), widened(x)))  # exact in float64
        smallest_normal = 2.0 ** (1 - f.bias)
        relative = fp("mul", size, float_const(2.0 ** -(f.fraction_bits + 1), F64))  # exact
        absolute = float_const(2.0 ** (-f.bias - f.fraction_bits), F64)
        bound = ite(fp("leq", float_const(smallest_normal, F64), size), relative, absolute)
        inside = fp("leq", size, described.value(bits(described.largest, WIDTH)))
        return Claim(inside, fp("leq", error, bound))

    return Case(f"{f.name}, {language}", build, f.name)


# The numbers as docs/contract.md gives them: the smallest magnitude that is too large, and what it becomes.
TOO_LARGE = {
    "float16": (65520.0, 0x7C00, 0x7BFF),
    "bfloat16": (float.fromhex("0x1.ffp127"), 0x7F80, 0x7F7F),  # 0x7F7F8000
    "float8_e4m3fn": (float.fromhex("0x1.d00002p8"), 0x7F, 0x7E),  # above 464, half way from 448 to the next step
    "float8_e5m2": (61440.0, 0x7C, 0x7B),
    "float4_e2m1fn": (7.0, None, 0x7),
}
NAN = {"float16": 0x7FFF, "bfloat16": 0x7FFF, "float8_e4m3fn": 0x7F, "float8_e5m2": 0x7F, "float4_e2m1fn": 0x7}


def too_large(f: FloatFormat, saturate: bool, language: str) -> Case:
    """Claim the code of a number that is too large, in typed constants, unlike all other claims here."""

    def build(run: Run) -> Claim:
        x = float_variable("x")
        code = wide(run(functions.encode_float(f, saturate), language, x=x))
        start, beyond, largest = TOO_LARGE[f.name]
        sign = ite(same(terms.extract(31, 31, terms.bits_of(x)), bits(1, 1)), bits(f.sign_bit, WIDTH), bits(0, WIDTH))
        found = largest if saturate or beyond is None else beyond
        large = and_(not_(fp("isNaN", x)), fp("leq", float_const(start), fp("abs", x)))
        small = fp("lt", fp("abs", x), float_const(start))
        magnitude = terms.band(code, bits(f.sign_bit - 1, WIDTH))
        return Claim(
            terms.TRUE,
            and_(
                implies(fp("isNaN", x), same(code, bits(NAN[f.name], WIDTH))),
                implies(large, same(code, terms.bor(bits(found, WIDTH), sign))),
                implies(small, terms.ule(magnitude, bits(largest, WIDTH))),
            ),
        )

    return Case(label(f, saturate, language), build, f.name)


# ---- faults ---------------------------------------------------------------------------------------------------------

TIES_PY = "r = a + ((a >> np.uint32(shift)) & np.uint32(1)) + np.uint32((1 << (shift - 1)) - 1)"
TIES_AWAY_PY = edit(NUMERICS_PY, TIES_PY, "r = a + np.uint32(1 << (shift - 1))")
TRUNCATED_PY = edit(NUMERICS_PY, TIES_PY, "r = a")
MAGIC_PY = edit(
    NUMERICS_PY, "(127 + 24 - f.bias - f.fraction_bits) << 23", "(127 + 23 - f.bias - f.fraction_bits) << 23"
)
NORMAL_PY = edit(NUMERICS_PY, "np.uint32((128 - f.bias) << 23)", "np.uint32((130 - f.bias) << 23)")
LIMIT_PY = edit(NUMERICS_PY, "f.max_code if saturate else f.overflow_code", "f.overflow_code")
NAN_PY = edit(
    NUMERICS_PY,
    "np.where(a > INFINITY_BITS, np.uint32(f.nan_code), code)",
    "np.where(a >= INFINITY_BITS, np.uint32(f.nan_code), code)",
)
SIGN_PY = edit(NUMERICS_PY, "<< np.uint32(f.bits - 1)", "<< np.uint32(f.bits - 2)")
SUBNORMAL_PY = edit(NUMERICS_PY, "2.0 ** (1 - f.bias - f.fraction_bits)", "2.0 ** (-f.bias - f.fraction_bits)")
BIAS_PY = edit(
    NUMERICS_PY,
    "bits = (a << np.uint32(23 - f.fraction_bits)) + np.uint32((127 - f.bias) << 23)",
    "bits = (a << np.uint32(23 - f.fraction_bits)) + np.uint32((126 - f.bias) << 23)",
)

ADDED_H = "((magnitude >> shift) & 1u) + ((1u << (shift - 1)) - 1u)"
NO_TIE_H = edit(NUMERICS_H, ADDED_H, "((1u << (shift - 1)) - 1u)")
TIES_AWAY_H = edit(NUMERICS_H, ADDED_H, "(1u << (shift - 1))")
MAGIC_H = edit(
    NUMERICS_H, "(127 + 24 - F::bias - F::fraction_bits) << 23", "(127 + 25 - F::bias - F::fraction_bits) << 23"
)
LIMIT_H = edit(NUMERICS_H, "saturate ? F::max_code : F::overflow_code", "saturate ? F::overflow_code : F::max_code")
NAN_H = edit(NUMERICS_H, "return a > int32_t(kInfinity) ? splat<U>(F::nan_code) : code;", "return code;")
SIGN_H = edit(NUMERICS_H, "& (1u << (F::bits - 1)))", "& (1u << (F::bits - 2)))")
SMALLEST_H = edit(
    NUMERICS_H, "uint32_t(128 - F::bias - F::fraction_bits) << 23", "uint32_t(127 - F::bias - F::fraction_bits) << 23"
)
HIGHEST_H = edit(
    NUMERICS_H, "F::has_inf ? F::overflow_code : F::max_code", "F::has_inf ? F::overflow_code : F::nan_code"
)
NORMAL_H = edit(NUMERICS_H, "a < ((128 - F::bias) << 23) ? small : r", "a < ((125 - F::bias) << 23) ? small : r")


def theorems() -> Iterator[Theorem]:
    f16, bf16, e4m3, e5m2, e2m1 = map(
        float_row, ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
    )
    yield Theorem(
        "cast rounds once to nearest, ties to even",
        "C1 C2 C3",
        "The code of x is the one between whose midpoints x lies, the even one on a midpoint; the sign of zero and of "
        "an infinity is kept; what is too large and NaN become what C3 and C1 say. No other code is right.",
        EVERY_INPUT,
        tuple(nearest(f, s, language) for f in FLOATS for s in modes(f) for language in LANGUAGES),
        (
            Fault("ties away from zero", nearest(e4m3, True, REFERENCE), TIES_AWAY_PY),
            Fault("subnormals rounded one place too high", nearest(f16, False, REFERENCE), MAGIC_PY),
            Fault("infinity taken for NaN", nearest(bf16, False, REFERENCE), NAN_PY),
            Fault("the tie bit forgotten", nearest(bf16, False, HEADER), NO_TIE_H),
            Fault("saturating and not swapped", nearest(e5m2, True, HEADER), LIMIT_H),
            Fault("NaN not seen", nearest(e2m1, True, HEADER), NAN_H),
        ),
    )
    yield Theorem(
        "cast is the conversion of IEEE 754",
        "C3",
        "The code of float16, a format of IEEE 754, is what the solver's own conversion gives.",
        "all float32 but NaN",
        tuple(ieee(f16, language) for language in LANGUAGES),
        (
            Fault("truncated", ieee(f16, REFERENCE), TRUNCATED_PY),
            Fault("subnormals rounded one place too low", ieee(f16, HEADER), MAGIC_H),
        ),
    )
    yield Theorem(
        "too large, infinite and NaN by their numbers",
        "C1 C3",
        "float16 overflows from 65520, bfloat16 from 0x7F7F8000, float8_e5m2 from 61440, float8_e4m3fn above 464; "
        "the largest values are 65504, 0x7F7F, 448, 57344 and 6; NaN is 0x7FFF, 0x7F, and 6 in float4_e2m1fn.",
        EVERY_INPUT,
        tuple(too_large(f, s, la) for f in FLOATS if f.name in TOO_LARGE for s in modes(f) for la in LANGUAGES),
        (
            Fault("never saturates", too_large(e4m3, True, REFERENCE), LIMIT_PY),
            Fault("NaN not seen", too_large(f16, False, HEADER), NAN_H),
        ),
    )
    yield Theorem(
        "a code is worth what its fields say",
        "C1 C2 C3",
        "decode(c) is (-1)^s * 2^(e - bias) * 1.f, or 2^(1 - bias) * 0.f at e = 0, exactly; NaN is 0x7FFFFFFF.",
        EVERY_CODE,
        tuple(worth(f, language) for f in FLOATS for language in LANGUAGES),
        (
            Fault("subnormals worth half", worth(e5m2, REFERENCE), SUBNORMAL_PY),
            Fault("normals worth half", worth(e4m3, REFERENCE), BIAS_PY),
            Fault("subnormals worth half", worth(f16, HEADER), SMALLEST_H),
            Fault("NaN worth a number", worth(e4m3, HEADER), HIGHEST_H),
        ),
    )
    yield Theorem(
        "round trip of a cast",
        "C3",
        "encode(decode(c)) = c for finite c, and for infinities unless it saturates; of NaN it is the format's NaN.",
        EVERY_CODE,
        tuple(returns(f, s, language) for f in FLOATS for s in modes(f) for language in LANGUAGES),
        (
            Fault("subnormals worth half", returns(f16, False, REFERENCE), SUBNORMAL_PY),
            Fault("the sign one place too low", returns(e5m2, False, HEADER), SIGN_H),
        ),
    )
    yield Theorem(
        "a cast is idempotent",
        "C3",
        "encode(decode(encode(x))) = encode(x), save that a NaN from overflow, 0xFF in float8_e4m3fn, becomes 0x7F.",
        EVERY_INPUT,
        tuple(idempotent(f, s, REFERENCE) for f in FLOATS for s in modes(f)),
        (
            Fault("normals worth half", idempotent(e4m3, True, REFERENCE), BIAS_PY),
            Fault("subnormals rounded one place too low", idempotent(f16, False, HEADER), MAGIC_H),
        ),
    )
    yield Theorem(
        "a cast is monotone",
        "C3",
        "x <= y implies decode(encode(x)) <= decode(encode(y)), saturating.",
        "all pairs of float32, neither NaN",
        tuple(monotone(f, REFERENCE) for f in FLOATS),
        (
            Fault("two exponents above the subnormals taken for some", monotone(e4m3, REFERENCE), NORMAL_PY),
            Fault("the sign one place too low", monotone(e5m2, HEADER), SIGN_H),
        ),
    )
    yield Theorem(
        "a cast is symmetric",
        "C2 C3",
        "encode(-x) is encode(x) with the other sign, zero and infinity included.",
        "all float32 but NaN",
        tuple(symmetric(f, s, REFERENCE) for f in FLOATS for s in modes(f)),
        (
            Fault("the sign one place too low", symmetric(f16, False, REFERENCE), SIGN_PY),
            Fault(
                "NaN not seen",
                symmetric(e4m3, True, HEADER),
                edit(NUMERICS_H, "const I a = same_bits<I>(magnitude);", "const I a = same_bits<I>(bits);"),
            ),
        ),
    )
    yield Theorem(
        "a cast errs by at most half a step",
        "C3",
        "|decode(encode(x)) - x| <= 2^-(M+1) |x| with M fraction bits, or half the smallest subnormal below "
        "2^(1 - bias).",
        "all float32 up to the largest value",
        tuple(half_a_step(f, REFERENCE) for f in FLOATS),
        (
            Fault("truncated", half_a_step(bf16, REFERENCE), TRUNCATED_PY),
            Fault("the smallest normals lost", half_a_step(e2m1, HEADER), NORMAL_H),
        ),
    )
