"""Theorems of scales and zero points: C4."""

from __future__ import annotations

from collections.abc import Iterator

from quantlib import formats
from quantlib.formats import FLOAT32, SCALE_MIN, FloatFormat, Format, IntFormat
from quantlib.proof import functions, terms
from quantlib.proof.casts import wide
from quantlib.proof.description import (
    FloatDescription,
    IntDescription,
    float_row,
    int_row,
    integer,
    is_between,
    widened,
)
from quantlib.proof.terms import F64, Term, and_, bits, float_const, fp, implies, ite, not_, or_, same
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

INTS = [f for f in formats.TABLE if isinstance(f, IntFormat)]
ONE_NAN = bits(FLOAT32.nan_code, 32)
INFINITY = float("inf")


def largest(f: Format) -> tuple[float, int]:
    """Q and the largest effective scale's exponent, 127 - e, e the exponent of the largest magnitude that is a code."""
    if isinstance(f, FloatFormat):
        described = FloatDescription(f)
        exponent, fraction = divmod(described.largest, 1 << f.fraction_bits)
        return (1 + fraction / (1 << f.fraction_bits)) * 2.0 ** (exponent - f.bias), 127 - (exponent - f.bias)
    described_int = IntDescription(f, affine=True)
    magnitude = max(-described_int.qmin, described_int.qmax)
    return float(described_int.qmax), 127 - (magnitude.bit_length() - 1)


def bounds(f: Format) -> tuple[float, float]:
    return SCALE_MIN, 2.0 ** largest(f)[1]


def sign(x: Term) -> Term:
    """The sign bit."""
    return terms.extract(31, 31, terms.bits_of(x))


def allowed(s: Term, f: Format) -> Term:
    """A scale of either sign whose magnitude is within its bounds."""
    return is_between(fp("abs", s), *bounds(f))


# ---- claims ---------------------------------------------------------------------------------------------------------


def effective(f: Format, language: str) -> Case:
    def build(run: Run) -> Claim:
        s = float_variable("s")
        used = run(functions.effective_scale(f), language, s=s)
        low, high = (float_const(b) for b in bounds(f))
        magnitude = fp("abs", s)
        clamped = ite(fp("lt", magnitude, low), low, ite(fp("lt", high, magnitude), high, magnitude))
        right = ite(fp("lt", s, float_const(0.0)), fp("neg", clamped), clamped)
        return Claim(
            terms.TRUE,
            ite(fp("isNaN", s), same(terms.bits_of(used), ONE_NAN), same(terms.bits_of(used), terms.bits_of(right))),
        )

    return Case(f"{f.name}, {language}", build, f.name)


def contract_bounds(name: str, exponent: int, language: str) -> Case:
    """The largest effective scale as C4 writes it."""
    f = formats.get(name)

    def build(run: Run) -> Claim:
        s = float_variable("s")
        used = run(functions.effective_scale(f), language, s=s)
        low, high = 2.0**-100, 2.0**exponent
        return Claim(
            not_(fp("isNaN", s)),
            and_(
                implies(fp("leq", float_const(high), s), same(used, float_const(high))),
                implies(fp("leq", s, float_const(-high)), same(used, float_const(-high))),
                implies(fp("leq", fp("abs", s), float_const(low)), same(fp("abs", used), float_const(low))),
                implies(fp("isZero", s), same(used, float_const(low))),
                implies(is_between(fp("abs", s), low, high), same(terms.bits_of(used), terms.bits_of(s))),
            ),
        )

    return Case(f"{name}, {language}", build, name)


BOUNDS = {"int8": 120, "uint8": 120, "int4": 124, "float8_e4m3fn": 119, "float8_e5m2": 112, "float16": 112}
BOUNDS |= {"bfloat16": 0, "float4_e2m1fn": 125}


def reciprocal_is_normal(f: Format, language: str) -> Case:
    def build(run: Run) -> Claim:
        s = float_variable("s")
        r = run(functions.reciprocal(f), language, s=s)
        return Claim(
            not_(fp("isNaN", s)),
            and_(fp("isNormal", r), same(sign(r), ite(fp("lt", s, float_const(0.0)), bits(1, 1), bits(0, 1)))),
        )

    return Case(f"{f.name}, {language}", build, f.name)


def product_is_finite(f: Format, language: str) -> Case:
    def build(run: Run) -> Claim:
        s = float_variable("s")
        finite = not_(fp("isNaN", s))
        if isinstance(f, IntFormat):
            z, code = int_variable("z"), int_variable("code")
            described = IntDescription(f, affine=False)
            y = run(functions.dequantize(f), language, code=code, s=s)
            del z
            return Claim(and_(finite, described.holds(code)), fp("lt", fp("abs", y), float_const(INFINITY)))
        code = int_variable("code", f.bits)
        y = run(functions.dequantize(f), language, code=terms.resize(code, 32), s=s)
        in_range = FloatDescription(f).is_finite(wide(code))
        return Claim(and_(finite, in_range), fp("lt", fp("abs", y), float_const(INFINITY)))

    return Case(f"{f.name}, {language}", build, f.name)


def quotient(f: Format, language: str) -> Case:
    """Claim the scale by the solver's own division, which is that of IEEE 754."""

    def build(run: Run) -> Claim:
        amax = int_variable("amax")
        a = terms.float_of(amax, terms.F32)
        s = run(functions.symmetric_scale(f), language, amax=amax)
        low, high = (float_const(b) for b in bounds(f))
        exact = fp("div", a, float_const(largest(f)[0]))
        clamped = ite(fp("lt", exact, low), low, ite(fp("lt", high, exact), high, exact))
        magnitude = terms.ule(amax, bits(0x7FFFFFFF, 32))
        return Claim(magnitude, ite(fp("isNaN", a), same(terms.bits_of(s), ONE_NAN), same(s, clamped)))

    return Case(f"{f.name}, {language}", build, f.name)


def true_division(f: Format, language: str, long: bool = False) -> Case:
    """The scale is the float32 nearest to amax / Q, shown by multiplying its midpoints with Q in float64: exact."""

    def build(run: Run) -> Claim:
        amax = int_variable("amax")
        a = terms.float_of(amax, terms.F32)
        s = run(functions.symmetric_scale(f), language, amax=amax)
        q = float_const(largest(f)[0], F64)
        low, high = bounds(f)
        inside = and_(fp("lt", float_const(low), s), fp("lt", s, float_const(high)))
        step = bits(1, 32)
        neighbours = [terms.float_of(op(terms.bits_of(s), step), terms.F32) for op in (terms.sub, terms.add)]
        half = float_const(0.5, F64)
        middles = [fp("mul", fp("add", widened(s), widened(n)), half) for n in neighbours]  # exact: 25 bits
        below, above = (fp("mul", m, q) for m in middles)  # exact: 25 bits and those of Q
        odd = same(terms.extract(0, 0, terms.bits_of(s)), bits(1, 1))
        nearest = and_(
            or_(fp("lt", below, widened(a)), and_(fp("eq", below, widened(a)), not_(odd))),
            or_(fp("lt", widened(a), above), and_(fp("eq", widened(a), above), not_(odd))),
        )
        clamped = ite(
            same(s, float_const(low)),
            # amax / Q rounds to at most 2^-100: the midpoint above it is 2^-100 (1 + 2^-24), and 2^-100 is even
            fp("leq", widened(a), fp("mul", float_const(low * (1 + 2.0**-24), F64), q)),
            ite(
                same(s, float_const(high)),
                fp("leq", fp("mul", float_const(high * (1 - 2.0**-25), F64), q), widened(a)),
                and_(inside, nearest),
            ),
        )
        magnitude = terms.ule(amax, bits(0x7FFFFFFF, 32))
        return Claim(magnitude, ite(fp("isNaN", a), same(terms.bits_of(s), ONE_NAN), clamped))

    return Case(f"{f.name}, {language}", build, f.name, long)


def short(q: float) -> bool:
    """True if the solver can invert a product with ``q``: its odd part has at most 3 bits."""
    numerator = q.as_integer_ratio()[0]
    return numerator // (numerator & -numerator) < 8


def special_blocks(f: Format, language: str) -> Case:
    def build(run: Run) -> Claim:
        amax = int_variable("amax")
        s = run(functions.symmetric_scale(f), language, amax=amax)
        low, high = bounds(f)
        return Claim(
            terms.ule(amax, bits(0x7FFFFFFF, 32)),
            and_(
                implies(same(amax, bits(0, 32)), same(s, float_const(low))),
                implies(same(amax, bits(0x7F800000, 32)), same(s, float_const(high))),
                implies(terms.ult(bits(0x7F800000, 32), amax), same(terms.bits_of(s), ONE_NAN)),
                implies(terms.ule(amax, bits(0x7F800000, 32)), is_between(s, low, high)),
            ),
        )

    return Case(f"{f.name}, {language}", build, f.name)


def largest_code(f: Format, language: str, long: bool = False) -> Case:
    def build(run: Run) -> Claim:
        amax = int_variable("amax")
        a = terms.float_of(amax, terms.F32)
        s = run(functions.symmetric_scale(f), language, amax=amax)
        code = run(functions.quantize(f), language, x=a, s=s)
        q = largest(f)[0]
        want = FloatDescription(f).largest if isinstance(f, FloatFormat) else int(q)
        inside = and_(fp("leq", float_const(q * SCALE_MIN), a), fp("lt", a, float_const(INFINITY)))
        return Claim(inside, same(code, bits(want, code.sort.bits)))

    return Case(f"{f.name}, {language}", build, f.name, long)


def affine_bounds(f: IntFormat, language: str) -> Case:
    def build(run: Run) -> Claim:
        lowest, highest = float_variable("lowest"), float_variable("highest")
        s, z = run(functions.affine_scale(f), language, lowest=lowest, highest=highest)
        nan = or_(fp("isNaN", lowest), fp("isNaN", highest))
        code = IntDescription(f, affine=True)
        zero = float_const(0.0)
        only_zero = and_(fp("eq", lowest, zero), fp("eq", highest, zero))
        infinite = or_(fp("isInfinite", lowest), fp("isInfinite", highest))
        # Both bounds are NaN where one value is.
        domain = or_(and_(fp("isNaN", lowest), fp("isNaN", highest)), fp("leq", lowest, highest))
        return Claim(
            domain,
            ite(
                nan,
                and_(same(terms.bits_of(s), ONE_NAN), same(z, integer(0))),
                and_(
                    is_between(s, *bounds(f)),
                    code.holds(z),
                    implies(only_zero, same(s, float_const(SCALE_MIN))),
                    implies(infinite, same(s, float_const(bounds(f)[1]))),
                ),
            ),
        )

    return Case(f"{f.name}, {language}", build, f.name)


def one_sided(f: IntFormat, language: str) -> Case:
    """A block of one sign: real zero is at the end of the codes."""

    def build(run: Run) -> Claim:
        lowest, highest = float_variable("lowest"), float_variable("highest")
        _, z = run(functions.affine_scale(f), language, lowest=lowest, highest=highest)
        code, zero = IntDescription(f, affine=True), float_const(0.0)
        positive = and_(fp("leq", zero, lowest), fp("leq", lowest, highest))
        return Claim(positive, same(z, integer(code.qmin)))

    return Case(f"{f.name}, {language}", build, f.name)


# ---- faults ---------------------------------------------------------------------------------------------------------

NO_UPPER_PY = edit(
    NUMERICS_PY,
    "np.minimum(np.maximum(magnitude, np.float32(SCALE_MIN)), np.float32(f.scale_max))",
    "np.maximum(magnitude, np.float32(SCALE_MIN))",
)
SMALL_PY = edit(
    NUMERICS_PY, "np.maximum(magnitude, np.float32(SCALE_MIN))", "np.maximum(magnitude, np.float32(SCALE_MIN / 2**40))"
)
NAN_SCALE_PY = edit(NUMERICS_PY, "clamped), NAN)", "clamped), s)")
NAN_SCALE_H = edit(NUMERICS_H, "s == s ? bits_of(s)", "true ? bits_of(s)")
CLAMPED_H = "min(max(magnitude, float_of(QL_SCALE_MIN)), scale_max)"
NO_UPPER_H = edit(NUMERICS_H, CLAMPED_H, "max(magnitude, float_of(QL_SCALE_MIN))")
NO_LOWER_H = edit(NUMERICS_H, CLAMPED_H, "min(magnitude, scale_max)")
NO_SIGN_PY = edit(NUMERICS_PY, "np.where(s < 0, -clamped, clamped)", "clamped")
SIGN_OF_ZERO_H = edit(NUMERICS_H, "bits_of(s) > 0x80000000u ?", "bits_of(s) >= 0x80000000u ?")
RECIPROCAL_PY = edit(
    NUMERICS_PY,
    "effective_scale(amax / np.float32(f.max), f)",
    "effective_scale(amax * (np.float32(1) / np.float32(f.max)), f)",
)
RECIPROCAL_H = edit(
    NUMERICS_H, "div(float_of(amax_bits), largest<F>())", "mul(float_of(amax_bits), div(1.0f, largest<F>()))"
)
ONE_LESS_PY = edit(
    NUMERICS_PY, "effective_scale(amax / np.float32(f.max), f)", "effective_scale(amax / np.float32(f.max - 1), f)"
)
ONE_LESS_H = edit(NUMERICS_H, "div(float_of(amax_bits), largest<F>())", "div(float_of(amax_bits), largest<F>() - 1.0f)")
SIGN_TAKEN_PY = edit(
    NUMERICS_PY,
    "highest = np.maximum(np.asarray(highest, np.float32), np.float32(0))",
    "highest = np.asarray(highest, np.float32)",
)
NO_WIDENING_H = edit(NUMERICS_H, "lowest = lowest > 0.0f ? 0.0f : lowest;", "")
NO_CLAMP_H = edit(NUMERICS_H, "z = min(max(z, qmin), qmax);", "")
NAN_Z_PY = edit(NUMERICS_PY, "z = np.where(z == z, z, np.float32(0))", "z = np.where(z == z, z, np.float32(1))")
NO_WIDENING_PY = edit(
    NUMERICS_PY,
    "lowest = np.minimum(np.asarray(lowest, np.float32), np.float32(0))",
    "lowest = np.asarray(lowest, np.float32)",
)
HIGH_ZERO_H = edit(
    NUMERICS_H, "float z = sub(qmin, mul(lowest, reciprocal(s)));", "float z = sub(qmax, mul(lowest, reciprocal(s)));"
)


def theorems() -> Iterator[Theorem]:
    int8, uint8, int4 = map(int_row, ("int8", "uint8", "int4"))
    e4m3, e5m2 = map(float_row, ("float8_e4m3fn", "float8_e5m2"))
    every = formats.WITHOUT_BOOKS
    anything = "all 2^32 float32 as a scale"
    yield Theorem(
        "the effective scale is the scale within its bounds",
        "C4",
        "|s| clamped to [2^-100, 2^(127 - e)], e the exponent of the largest code, with the sign of s; 0 "
        "is 2^-100, NaN stays, as C1's.",
        anything,
        tuple(effective(f, language) for f in every for language in LANGUAGES),
        (
            Fault("no upper bound", effective(int8, REFERENCE), NO_UPPER_PY),
            Fault("a NaN keeps its payload", effective(e4m3, REFERENCE), NAN_SCALE_PY),
            Fault("NaN becomes a number", effective(int8, HEADER), NAN_SCALE_H),
            Fault("the sign is lost", effective(int4, REFERENCE), NO_SIGN_PY),
            Fault("a zero keeps its sign", effective(int4, HEADER), SIGN_OF_ZERO_H),
        ),
    )
    yield Theorem(
        "the bounds are the contract's",
        "C4",
        "|s| in [2^-100, S] with S = 2^120 for int8 and uint8, 2^124 for int4, 2^119 for E4M3, 2^112 for E5M2 and "
        "float16, 1 for bfloat16, 2^125 for E2M1; inside it no bit changes.",
        "all float32 but NaN as a scale",
        tuple(contract_bounds(name, e, language) for name, e in BOUNDS.items() for language in LANGUAGES),
        (
            Fault("a lower bound of 2^-140", contract_bounds("int8", 120, REFERENCE), SMALL_PY),
            Fault("no upper bound", contract_bounds("float8_e5m2", 112, HEADER), NO_UPPER_H),
        ),
    )
    yield Theorem(
        "the reciprocal of a scale is normal",
        "C4",
        "2^-126 <= |fl(1/s)| < infinity for every effective scale, of its sign.",
        "all float32 but NaN as a scale",
        tuple(reciprocal_is_normal(f, language) for f in every for language in LANGUAGES),
        (
            Fault("a lower bound of 2^-140", reciprocal_is_normal(int8, REFERENCE), SMALL_PY),
            Fault("no upper bound", reciprocal_is_normal(int8, HEADER), NO_UPPER_H),
        ),
    )
    yield Theorem(
        "no product of a code and its scale overflows",
        "C4 C7",
        "fl(code * s) is finite for every finite code and every effective scale.",
        "every code, all float32 but NaN as a scale",
        tuple(product_is_finite(f, language) for f in every for language in LANGUAGES),
        (
            Fault("no upper bound", product_is_finite(int8, REFERENCE), NO_UPPER_PY),
            Fault("no upper bound", product_is_finite(e5m2, HEADER), NO_UPPER_H),
        ),
    )
    yield Theorem(
        "a symmetric scale is the true quotient",
        "C4",
        "s is the float32 nearest to amax / Q, ties to even, within the bounds; NaN gives NaN.",
        "all 2^31 magnitudes",
        tuple(quotient(f, language) for f in every for language in LANGUAGES),
        (
            Fault("a product with 1/Q", quotient(int8, REFERENCE), RECIPROCAL_PY),
            Fault("a product with 1/Q", quotient(int4, HEADER), RECIPROCAL_H),
        ),
    )
    yield Theorem(
        "a symmetric scale times Q brackets amax",
        "C4",
        "amax lies between the products of Q with the midpoints around s, which are exact in float64: the quotient is "
        "nearest whatever a division is. For Q of 3 bits; the others are too hard.",
        "all 2^31 magnitudes",
        tuple(true_division(f, REFERENCE, long=f.is_float) for f in every if short(largest(f)[0])),
        (
            Fault("a product with 1/Q", true_division(int4, REFERENCE), RECIPROCAL_PY),
            Fault("a product with 1/Q", true_division(int4, HEADER), RECIPROCAL_H),
        ),
    )
    yield Theorem(
        "blocks of zeros, with an infinity, with a NaN",
        "C4",
        "amax 0 gives 2^-100, infinity the largest scale, NaN the one NaN; every other amax a scale within the bounds.",
        "all 2^31 magnitudes",
        tuple(special_blocks(f, language) for f in every for language in LANGUAGES),
        (
            Fault("no upper bound", special_blocks(int8, REFERENCE), NO_UPPER_PY),
            Fault("no lower bound", special_blocks(int4, HEADER), NO_LOWER_H),
        ),
    )
    hard = {"float16", "bfloat16", "float8_e5m2", "uint8"}
    yield Theorem(
        "the largest value of a block gets the largest code",
        "C4 C5 C6",
        "quantize(amax, symmetric_scale(amax)) is the largest code.",
        "every finite amax from Q * 2^-100 on",
        tuple(largest_code(f, REFERENCE, long=f.name in hard) for f in every),
        (
            Fault("divided by Q - 1", largest_code(int8, REFERENCE), ONE_LESS_PY),
            Fault("divided by Q - 1", largest_code(int4, HEADER), ONE_LESS_H),
        ),
    )
    yield Theorem(
        "an affine scale and zero point are within their bounds",
        "C4",
        "s is within its bounds and z a code; 0..0 gives 2^-100, an infinity the largest scale, NaN gives NaN and 0.",
        "all pairs of float32 with lowest <= highest, and NaN",
        tuple(affine_bounds(f, language) for f in INTS for language in LANGUAGES),
        (
            Fault("NaN with another zero point", affine_bounds(int8, REFERENCE), NAN_Z_PY),
            Fault("the zero point not clamped", affine_bounds(uint8, HEADER), NO_CLAMP_H),
        ),
    )
    yield Theorem(
        "the range is widened to hold zero",
        "C4",
        "where lowest >= 0, zero has the lowest code.",
        "all pairs of float32 with 0 <= lowest <= highest",
        tuple(one_sided(f, language) for f in INTS for language in LANGUAGES),
        (
            Fault("not widened", one_sided(int8, REFERENCE), NO_WIDENING_PY),
            Fault("not widened", one_sided(int8, HEADER), NO_WIDENING_H),
            Fault("counted from the highest code", one_sided(int8, HEADER), HIGH_ZERO_H),
        ),
    )
