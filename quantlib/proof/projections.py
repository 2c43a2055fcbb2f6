"""Theorems of projections onto codes and back: C5, C6, C7."""

from __future__ import annotations

from collections.abc import Iterator

from quantlib import formats
from quantlib.formats import FLOAT32, FloatFormat, IntFormat
from quantlib.proof import functions, terms
from quantlib.proof.casts import FLOATS, wide
from quantlib.proof.description import FloatDescription, IntDescription, float_row, int_row, integer, widened
from quantlib.proof.scales import INTS, allowed
from quantlib.proof.terms import F64, Term, and_, bits, float_const, fp, implies, ite, or_, same
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

INFINITY = float("inf")


def zeros(f: IntFormat, affine: bool) -> tuple[dict[str, Term], Term, Term]:
    """The argument z where there is one, its value, and that it is a code."""
    if not affine:
        return {}, integer(0), terms.TRUE
    z = int_variable("z")
    return {"z": z}, z, IntDescription(f, affine).holds(z)


def named(f: IntFormat, affine: bool, language: str) -> str:
    return f"{f.name}{', every zero point' if affine else ', symmetric'}, {language}"


# ---- claims ---------------------------------------------------------------------------------------------------------


def nearest(f: IntFormat, affine: bool, language: str) -> Case:
    def build(run: Run) -> Claim:
        t = float_variable("t")
        argument, z, is_code = zeros(f, affine)
        code = run(functions.encode_int(f, affine), language, t=t, **argument)
        return Claim(is_code, IntDescription(f, affine).is_code_of(code, t, z))

    return Case(named(f, affine, language), build, f.name)


def outside_zero_points(f: IntFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        z = int_variable("z")
        used = run(functions.clamp_zero_point(f), language, z=z)
        code = IntDescription(f, affine=True)
        low, high = integer(code.qmin), integer(code.qmax)
        return Claim(terms.TRUE, same(used, ite(terms.slt(z, low), low, ite(terms.slt(high, z), high, z))))

    return Case(f"{f.name}, {language}", build, f.name)


def special(f: IntFormat, affine: bool, language: str) -> Case:
    def build(run: Run) -> Claim:
        t = float_variable("t")
        argument, z, is_code = zeros(f, affine)
        code = run(functions.encode_int(f, affine), language, t=t, **argument)
        low, high = IntDescription(f, affine).qmin, IntDescription(f, affine).qmax
        far = float_const(float(2 * (high - low)))
        return Claim(
            is_code,
            and_(
                implies(fp("isNaN", t), same(code, z)),
                implies(fp("leq", far, t), same(code, integer(high))),
                implies(fp("leq", t, fp("neg", far)), same(code, integer(low))),
                implies(fp("isZero", t), same(code, z)),
            ),
        )

    return Case(named(f, affine, language), build, f.name)


def monotone(f: IntFormat, affine: bool, language: str, long: bool = False) -> Case:
    def build(run: Run) -> Claim:
        t, larger = float_variable("t"), float_variable("larger")
        argument, _, is_code = zeros(f, affine)
        encode = functions.encode_int(f, affine)
        a, b = (run(encode, language, t=v, **argument) for v in (t, larger))
        return Claim(and_(is_code, fp("leq", t, larger)), terms.sle(a, b))

    return Case(named(f, affine, language), build, f.name, long)


def symmetric(f: IntFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        t = float_variable("t")
        encode = functions.encode_int(f, affine=False)
        a, b = (run(encode, language, t=v) for v in (t, fp("neg", t)))
        return Claim(terms.TRUE, same(b, terms.neg(a)))

    return Case(f"{f.name}, {language}", build, f.name)


def half_a_step(f: IntFormat, affine: bool, language: str, long: bool = False) -> Case:
    def build(run: Run) -> Claim:
        t = float_variable("t")
        argument, z, is_code = zeros(f, affine)
        code = run(functions.encode_int(f, affine), language, t=t, **argument)
        low, high = (terms.to_float(terms.sub(integer(q), z), F64) for q in _range(f, affine))
        half = float_const(0.5, F64)
        inside = and_(fp("leq", fp("sub", low, half), widened(t)), fp("leq", widened(t), fp("add", high, half)))
        k = terms.to_float(terms.sub(code, z), F64)
        near = and_(fp("leq", fp("sub", k, half), widened(t)), fp("leq", widened(t), fp("add", k, half)))
        return Claim(and_(is_code, inside), near)

    return Case(named(f, affine, language), build, f.name, long)


def _range(f: IntFormat, affine: bool) -> tuple[int, int]:
    described = IntDescription(f, affine)
    return described.qmin, described.qmax


def flushed(f: IntFormat | FloatFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        x, s = float_variable("x"), float_variable("s")
        subnormal = or_(fp("isSubnormal", x), fp("isZero", x))
        zero = terms.float_of(terms.band(terms.bits_of(x), bits(1 << 31, 32)), terms.F32)
        code, other = (run(functions.quantize(f), language, x=v, s=s) for v in (x, zero))
        return Claim(and_(subnormal, allowed(s, f)), same(code, other))

    return Case(f"{f.name}, {language}", build, f.name)


def worth(f: IntFormat, affine: bool, language: str) -> Case:
    """fl32(q - z) is exact, so one rounding is left, that of the product, which is the same in both."""

    def build(run: Run) -> Claim:
        code, s = int_variable("code"), float_variable("s")
        argument, z, is_code = zeros(f, affine)
        y = run(functions.decode_int(f, affine), language, code=code, s=s, **argument)
        exact = terms.to_float(terms.sub(code, z), terms.F32)
        product = fp("mul", exact, s)
        right = same(terms.bits_of(y), terms.bits_of(product))
        return Claim(
            and_(is_code, IntDescription(f, affine).holds(code)),
            and_(
                fp("eq", widened(exact), terms.to_float(terms.sub(code, z), F64)),
                ite(fp("isNaN", product), same(terms.bits_of(y), bits(FLOAT32.nan_code, 32)), right),
            ),
            open_products=True,
        )

    return Case(named(f, affine, language), build, f.name)


def zero_has_the_sign(f: IntFormat, affine: bool, language: str) -> Case:
    def build(run: Run) -> Claim:
        s = float_variable("s")
        argument, z, is_code = zeros(f, affine)
        y = run(functions.decode_int(f, affine), language, code=z, s=s, **argument)
        zero = terms.band(terms.bits_of(s), bits(1 << 31, 32))
        return Claim(and_(is_code, allowed(s, f)), same(terms.bits_of(y), zero))

    return Case(named(f, affine, language), build, f.name)


def returns(f: IntFormat | FloatFormat, language: str, long: bool = False) -> Case:
    def build(run: Run) -> Claim:
        s = float_variable("s")
        if isinstance(f, FloatFormat):
            code = int_variable("code", f.bits)
            given, domain = terms.resize(code, 32), FloatDescription(f).is_finite(wide(code))
        else:
            code = given = int_variable("code")
            domain = IntDescription(f, affine=False).holds(code)
        y = run(functions.dequantize(f), language, code=given, s=s)
        again = run(functions.quantize(f), language, x=y, s=s)
        return Claim(and_(domain, allowed(s, f)), same(terms.resize(again, code.sort.bits), code))

    return Case(f"{f.name}, {language}", build, f.name, long)


def saturating(f: FloatFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        x, s = float_variable("x"), float_variable("s")
        described = FloatDescription(f)
        code = wide(run(functions.quantize(f), language, x=x, s=s))
        t = run(functions.project(f), language, x=x, s=s)
        return Claim(
            terms.TRUE,
            ite(
                fp("isNaN", t),
                same(code, bits(described.nan, code.sort.bits)),
                and_(described.is_finite(code), described.is_code_of(code, t, saturate=True)),
            ),
            open_products=True,
        )

    return Case(f"{f.name}, {language}", build, f.name)


# ---- faults ---------------------------------------------------------------------------------------------------------

CLIP_PY = "t = np.clip(t, (qmin - z).astype(np.float32), (qmax - z).astype(np.float32))"
TRUNCATED_PY = edit(NUMERICS_PY, "return np.rint(t).astype(np.int32) + z", "return t.astype(np.int32) + z")
Z_FIRST_PY = edit(
    NUMERICS_PY,
    CLIP_PY,
    "t = np.clip(t + z.astype(np.float32), np.float32(qmin), np.float32(qmax)) - z.astype(np.float32)",
)
NAN_PY = edit(
    NUMERICS_PY, "t = np.where(t == t, t, np.float32(0))\n    # 2", "t = np.where(t == t, t, np.float32(1))\n    # 2"
)
HALF_UP_PY = edit(
    NUMERICS_PY,
    "return np.rint(t).astype(np.int32) + z",
    "return (np.rint(t + t) * np.float32(0.5) + np.float32(0.5)).astype(np.int32) + z",
)
NO_UPPER_PY = edit(
    NUMERICS_PY, CLIP_PY, "t = np.clip(t, (qmin - z).astype(np.float32), (qmax - z).astype(np.float32) + np.float32(1))"
)
NO_Z_CLAMP_PY = edit(
    NUMERICS_PY,
    "return np.clip(np.asarray(z, np.int32), *f.range(affine))",
    "return np.maximum(np.asarray(z, np.int32), f.range(affine)[0])",
)
Z_FIRST_H = edit(
    NUMERICS_H,
    "t = t == t ? max(t, Lanes<V>::of(qmin - z)) : splat<V>(0.0f);\n  t = min(t, Lanes<V>::of(qmax - z));",
    "t = t == t ? max(t + Lanes<V>::of(z), Lanes<V>::of(qmin + 0 * z)) : Lanes<V>::of(z);\n"
    "  t = min(t, Lanes<V>::of(qmax + 0 * z)) - Lanes<V>::of(z);",
)
NAN_H = edit(
    NUMERICS_H, "t = t == t ? max(t, Lanes<V>::of(qmin - z)) : splat<V>(0.0f);", "t = max(t, Lanes<V>::of(qmin - z));"
)
QMIN_H = edit(NUMERICS_H, "AFFINE ? F::affine_qmin : F::qmin, qmax", "F::affine_qmin, qmax")
MAGIC_H = edit(
    NUMERICS_H,
    "same_bits<int32_t>(add(a, 12582912.0f)) - 0x4b400000",
    "same_bits<int32_t>(add(a, 12582913.0f)) - 0x4b400001",
)
CEIL_H = edit(NUMERICS_H, "return Lanes<V>::nearest(t) + z;", "return Lanes<V>::nearest(t + 0.25f) + z;")
Z_CLAMP_H = edit(NUMERICS_H, "return z > F::affine_qmax ? F::affine_qmax : z;", "return z;")
WITHOUT_Z_PY = edit(
    NUMERICS_PY,
    "(np.asarray(code, np.int32) - clamp_zero_point(z, f, affine)).astype(np.float32) * s_eff",
    "(np.asarray(code, np.int32) - z - z).astype(np.float32) * s_eff",
)
NEGATED_H = edit(NUMERICS_H, "canonical(mul(float(code - z), s_eff))", "canonical(mul(-float(z - code), s_eff))")
WRONG_NAN_H = edit(NUMERICS_H, "canonical(mul(float(code - z), s_eff))", "mul(float(code - z), s_eff) + 0.0f")
PLUS_H = edit(NUMERICS_H, "canonical(mul(float(code - z), s_eff))", "canonical(mul(float(code - z + 1), s_eff))")
NEGATED_PY = edit(
    NUMERICS_PY,
    "(np.asarray(code, np.int32) - clamp_zero_point(z, f, affine)).astype(np.float32) * s_eff",
    "-(clamp_zero_point(z, f, affine) - np.asarray(code, np.int32)).astype(np.float32) * s_eff",
)
TWICE_PY = edit(NUMERICS_PY, "r = np.float32(1) / s_eff", "r = np.float32(1) / (s_eff * np.float32(1.0625))")
RECIPROCAL_H = edit(NUMERICS_H, "return div(1.0f, s_eff);", "return div(0.875f, s_eff);")
BIG_R_PY = edit(NUMERICS_PY, "r = np.float32(1) / s_eff", "r = np.float32(2.0**40) / s_eff")
BIG_R_H = edit(NUMERICS_H, "return div(1.0f, s_eff);", "return div(1099511627776.0f, s_eff);")


def theorems() -> Iterator[Theorem]:
    int8, uint8, int4 = map(int_row, ("int8", "uint8", "int4"))
    e4m3, e5m2, e2m1 = map(float_row, ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"))
    both = [(f, affine) for f in INTS for affine in (False, True)]
    every_t = "all 2^32 float32 t, every zero point"
    yield Theorem(
        "a projection rounds to nearest, ties to even",
        "C1 C5",
        "q = clamp(RNE(t) + z, qmin, qmax): t lies between q - z - 1/2 and q - z + 1/2, on one of them only where "
        "q - z is even, or beyond the end that q is at; a NaN t gives z.",
        every_t,
        tuple(nearest(f, affine, language) for f, affine in both for language in LANGUAGES),
        (
            Fault("truncated", nearest(int8, False, REFERENCE), TRUNCATED_PY),
            Fault("the zero point added before rounding", nearest(int8, True, REFERENCE), Z_FIRST_PY),
            Fault("the zero point added before rounding", nearest(uint8, True, HEADER), Z_FIRST_H),
            Fault("symmetric codes down to -128", nearest(int8, False, HEADER), QMIN_H),
            Fault("the magic number odd", nearest(int4, False, HEADER), MAGIC_H),
        ),
    )
    yield Theorem(
        "a zero point outside the codes means the nearest code",
        "C5",
        "clamp_zero_point(z) = min(max(z, qmin), qmax).",
        "all 2^32 int32",
        tuple(outside_zero_points(f, language) for f in INTS for language in LANGUAGES),
        (
            Fault("no upper bound", outside_zero_points(int8, REFERENCE), NO_Z_CLAMP_PY),
            Fault("no upper bound", outside_zero_points(int4, HEADER), Z_CLAMP_H),
        ),
    )
    yield Theorem(
        "saturation, NaN and infinity of a projection",
        "C1 C5",
        "what is far above gives qmax, far below qmin, infinities too; NaN and both zeros give the zero point.",
        every_t,
        tuple(special(f, affine, language) for f, affine in both for language in LANGUAGES),
        (
            Fault("NaN is 1", special(int8, True, REFERENCE), NAN_PY),
            Fault("one code too many", special(int4, False, REFERENCE), NO_UPPER_PY),
            Fault("NaN at the lowest code", special(uint8, True, HEADER), NAN_H),
        ),
    )
    yield Theorem(
        "a projection is monotone",
        "C5",
        "t <= t' implies q <= q'.",
        "all pairs of float32, neither NaN, every zero point",
        tuple(monotone(f, affine, REFERENCE, long=affine and f.name == "int8") for f, affine in both),
        (
            Fault(
                "codes that wrap around",
                monotone(int8, False, REFERENCE),
                edit(
                    NUMERICS_PY,
                    CLIP_PY,
                    "t = np.where(t > qmax, np.float32(qmin), np.clip(t, np.float32(qmin), np.float32(qmax)))",
                ),
            ),
            Fault(
                "clamped by the highest alone",
                monotone(int8, False, HEADER),
                edit(
                    NUMERICS_H,
                    "t = min(t, Lanes<V>::of(qmax - z));",
                    "t = t > Lanes<V>::of(qmax - z) ? splat<V>(0.0f) : t;",
                ),
            ),
        ),
    )
    signed = [f for f in INTS if f.signed]
    yield Theorem(
        "a symmetric projection is symmetric",
        "C5",
        "without a zero point the code of -t is minus that of t, in a signed format.",
        "all 2^32 float32 t",
        tuple(symmetric(f, REFERENCE) for f in signed),
        (
            Fault("half a step up", symmetric(int8, REFERENCE), HALF_UP_PY),
            Fault("symmetric codes down to -8", symmetric(int4, HEADER), QMIN_H),
        ),
    )
    yield Theorem(
        "a projection errs by at most half a step",
        "C5",
        "|t - (q - z)| <= 1/2 where qmin - 1/2 <= t + z <= qmax + 1/2.",
        "every such t, every zero point",
        tuple(half_a_step(f, affine, REFERENCE, long=affine and f.name == "int8") for f, affine in both),
        (
            Fault("truncated", half_a_step(uint8, False, REFERENCE), TRUNCATED_PY),
            Fault("a quarter of a step up", half_a_step(int8, True, HEADER), CEIL_H),
        ),
    )
    yield Theorem(
        "flush-to-zero cannot change a code",
        "C0 C5 C6",
        "a subnormal x has the code of the zero of its sign; not so in bfloat16 and float16, whose steps are smaller.",
        "all subnormal x, every scale within its bounds",
        tuple(flushed(f, language) for f in formats.WITHOUT_BOOKS if f.bits <= 8 for language in LANGUAGES),
        (
            Fault("a reciprocal 2^40 times too large", flushed(int8, REFERENCE), BIG_R_PY),
            Fault("a reciprocal 2^40 times too large", flushed(e4m3, HEADER), BIG_R_H),
        ),
    )
    yield Theorem(
        "a quantized float is the cast of t, saturating",
        "C6",
        "the code is the one nearest to t = fl(x * fl(1/s)) and never infinite; a NaN t gives NaN, in E2M1 6.",
        "all x and s, whatever the product rounds to",
        tuple(saturating(f, language) for f in FLOATS for language in LANGUAGES),
        (
            Fault(
                "not saturating",
                saturating(e5m2, REFERENCE),
                edit(NUMERICS_PY, "f.max_code if saturate else f.overflow_code", "f.overflow_code"),
            ),
            Fault(
                "NaN not seen",
                saturating(e2m1, HEADER),
                edit(NUMERICS_H, "return a > int32_t(kInfinity) ? splat<U>(F::nan_code) : code;", "return code;"),
            ),
        ),
    )
    yield Theorem(
        "a code less its zero point is exact, and rounds once",
        "C7",
        "dequantize gives fl(fl32(q - z) * s) with an exact fl32(q - z), and C1's NaN where that is NaN.",
        "every code, every zero point, all s, whatever the product rounds to",
        tuple(worth(f, affine, language) for f, affine in both for language in LANGUAGES),
        (
            Fault("the zero point twice", worth(int8, True, REFERENCE), WITHOUT_Z_PY),
            Fault("one step up", worth(int4, True, HEADER), PLUS_H),
        ),
    )
    yield Theorem(
        "real zero is exactly 0",
        "C2 C7",
        "the code z dequantizes to the zero of the scale's sign.",
        "every zero point, every scale within its bounds",
        tuple(zero_has_the_sign(f, affine, language) for f, affine in both for language in LANGUAGES),
        (
            Fault("subtracted the other way round", zero_has_the_sign(int8, True, REFERENCE), NEGATED_PY),
            Fault("subtracted the other way round", zero_has_the_sign(uint8, False, HEADER), NEGATED_H),
        ),
    )
    small = [f for f in formats.WITHOUT_BOOKS if f.bits <= 8]
    yield Theorem(
        "round trip: quantize(dequantize(q, s), s) = q",
        "C5 C6 C7",
        "and so quantize(dequantize(.)) is idempotent: what was quantized once is found again.",
        "every finite code, every scale within its bounds",
        tuple(returns(f, REFERENCE, long=f.name in ("int8", "uint8", "float8_e4m3fn", "float8_e5m2")) for f in small),
        (
            Fault("a reciprocal 6 % too small", returns(int8, REFERENCE), TWICE_PY),
            Fault("a reciprocal 12 % too small", returns(e4m3, HEADER), RECIPROCAL_H),
        ),
    )
