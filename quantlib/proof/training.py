"""Theorems of fake quantization: C10."""

from __future__ import annotations

from collections.abc import Iterator

from quantlib import formats
from quantlib.formats import FLOAT32, FloatFormat, Format, IntFormat
from quantlib.proof import functions, terms
from quantlib.proof.description import FloatDescription, IntDescription, float_row, int_row, widened
from quantlib.proof.projections import zeros
from quantlib.proof.scales import INTS
from quantlib.proof.terms import F32, F64, Term, and_, bits, float_const, fp, ite, not_, or_, same
from quantlib.proof.theorem import (
    FAKE_H,
    FAKE_PY,
    HEADER,
    LANGUAGES,
    REFERENCE,
    Case,
    Claim,
    Fault,
    Run,
    Theorem,
    edit,
    float_variable,
)

INFINITY = float("inf")
WIDE = ("int8", "uint8")  # which are slow, and run the code of int4


def is_affine(f: Format) -> bool:
    return isinstance(f, IntFormat)


def zero_point(f: Format) -> tuple[dict[str, Term], Term, Term]:
    """The argument of a learned zero point, which is a code, its value, and that it is one."""
    if not isinstance(f, IntFormat):
        return {}, bits(0, 32), terms.TRUE
    argument, z, is_code = zeros(f, affine=True)
    return {name: terms.to_float(value, F32) for name, value in argument.items()}, z, is_code


def named(f: Format, lsq: bool, language: str) -> str:
    return f"{f.name}{', LSQ mask' if lsq else ''}, {language}"


# ---- claims ---------------------------------------------------------------------------------------------------------


def as_quantized(f: Format, language: str, affine: bool) -> Case:
    def build(run: Run) -> Claim:
        x, s = float_variable("x"), float_variable("s")
        t = run(functions.project(f), language, x=x, s=s)
        if isinstance(f, IntFormat):
            argument, z, is_code = zeros(f, affine)
            learned = {"z": terms.to_float(z, F32)} if affine else {}
            y = run(functions.fake_quantize(f, affine), language, x=x, s=s, **learned)
            code = run(functions.quantize(f, affine), language, x=x, s=s, **argument)
            want = run(functions.dequantize(f, affine), language, code=code, s=s, **argument)
        else:
            is_code = terms.TRUE
            y = run(functions.fake_quantize(f, affine=False), language, x=x, s=s)
            code = run(functions.quantize(f), language, x=x, s=s)
            want = run(functions.dequantize(f), language, code=terms.resize(code, 32), s=s)
        nan = same(terms.bits_of(y), bits(FLOAT32.nan_code, 32))
        number = and_(not_(fp("isNaN", s)), is_code)
        return Claim(number, ite(fp("isNaN", t), nan, same(y, want)), open_products=True)

    label = (
        f"{f.name}, {language}"
        if not isinstance(f, IntFormat)
        else f"{f.name}{', every zero point' * affine}, {language}"
    )
    return Case(label, build, f.name)


def never_nan(f: Format, language: str) -> Case:
    def build(run: Run) -> Claim:
        x, s = float_variable("x"), float_variable("s")
        t = run(functions.project(f), language, x=x, s=s)
        return Claim(and_(not_(fp("isNaN", x)), not_(fp("isNaN", s))), not_(fp("isNaN", t)))

    return Case(f"{f.name}, {language}", build, f.name)


def mask(f: Format, lsq: bool, language: str, long: bool = False) -> Case:
    def build(run: Run) -> Claim:
        dy, x, s = (float_variable(name) for name in ("dy", "x", "s"))
        t = run(functions.project(f), language, x=x, s=s)
        argument, z, is_zero_code = zero_point(f)
        dx, *_ = run(functions.gradients(f, is_affine(f), lsq), language, dy=dy, x=x, s=s, **argument)
        inside = _inside(f, t, z, lsq)
        want = ite(inside, terms.bits_of(dy), bits(0, 32))
        return Claim(and_(is_zero_code, not_(fp("isNaN", s))), same(terms.bits_of(dx), want), open_products=True)

    return Case(named(f, lsq, language), build, f.name, long)


def slopes(f: Format, language: str, long: bool = False) -> Case:
    """dscale and dzero_point, with m as dx shows it for a dy of 1, and c as the code of t is worth."""

    def build(run: Run) -> Claim:
        dy, x, s = (float_variable(name) for name in ("dy", "x", "s"))
        zero, one = float_const(0.0), float_const(1.0)
        t = run(functions.project(f), language, x=x, s=s)
        argument, z, is_zero_code = zero_point(f)
        gradients = functions.gradients(f, is_affine(f), False)
        shown, *_ = run(gradients, language, dy=one, x=x, s=s, **argument)
        _, *outputs = run(gradients, language, dy=dy, x=x, s=s, **argument)
        s_eff = run(functions.effective_scale(f), language, s=s)
        inside = fp("eq", shown, one)
        if isinstance(f, IntFormat):
            code = run(functions.encode_int(f, True), language, t=t, z=z)
            c = terms.to_float(terms.sub(code, z), F32)
        else:
            code = run(functions.encode_float(f, True), language, x=t)
            c = run(functions.decode_float(f), language, code=terms.resize(code, 32))
        slope = ite(fp("isNaN", t), zero, ite(inside, fp("sub", c, t), c))
        wanted = [fp("mul", dy, slope)]
        if is_affine(f):
            wanted.append(ite(inside, zero, fp("neg", fp("mul", dy, s_eff))))
        return Claim(
            and_(is_zero_code, not_(fp("isNaN", s))),
            and_(*(same(got, want) for got, want in zip(outputs, wanted, strict=True))),
            open_products=True,
        )

    return Case(f"{f.name}, {language}", build, f.name, long)


def _inside(f: Format, t: Term, z: Term, lsq: bool) -> Term:
    """m: whether t, or with the LSQ mask off what t rounds to, is in the range."""
    if isinstance(f, FloatFormat):
        described, size = FloatDescription(f), widened(fp("abs", t))
        if lsq:
            return fp("leq", size, described.value(bits(described.largest, 64)))
        end = described.midpoint(bits(described.largest, 64))  # t rounds to a finite value
        return or_(fp("lt", size, end), terms.FALSE if described.largest % 2 else fp("eq", size, end))
    code = IntDescription(f, affine=True)
    lo, hi = (terms.to_float(terms.sub(bits(q, 32), z), F64) for q in (code.qmin, code.qmax))
    if lsq:
        return and_(fp("leq", lo, widened(t)), fp("leq", widened(t), hi))
    # lo <= RNE(t) <= hi: half a step beyond, on the tie where the end is even
    low_even, high_even = (
        same(terms.extract(0, 0, terms.sub(bits(q, 32), z)), bits(0, 1)) for q in (code.qmin, code.qmax)
    )
    half = float_const(0.5, F64)
    start, end = fp("sub", lo, half), fp("add", hi, half)
    return and_(
        or_(fp("lt", start, widened(t)), and_(low_even, fp("eq", start, widened(t)))),
        or_(fp("lt", widened(t), end), and_(high_even, fp("eq", widened(t), end))),
    )


def learned(f: IntFormat, language: str) -> Case:
    """The value of -infinity at s = 1 is qmin - z: it shows z as it is used."""

    def build(run: Run) -> Claim:
        z, code = float_variable("z"), IntDescription(f, affine=True)
        low, high = float_const(float(code.qmin)), float_const(float(code.qmax))
        clamped = ite(fp("leq", z, low), low, ite(fp("leq", high, z), high, z))
        used = fp("roundToIntegral", ite(fp("isNaN", z), float_const(0.0), clamped))
        y = run(functions.fake_quantize(f, True), language, x=float_const(-INFINITY), s=float_const(1.0), z=z)
        return Claim(terms.TRUE, fp("eq", y, fp("sub", low, used)))

    return Case(f"{f.name}, {language}", build, f.name)


def exact_difference(f: IntFormat, language: str) -> Case:
    """fl(c - t) is the difference in float64, which is exact: c has 8 bits, and t at most 24 within 2^8 of it."""

    def build(run: Run) -> Claim:
        t, one = float_variable("t"), float_const(1.0)
        c = run(functions.fake_quantize(f, affine=False), language, x=t, s=one)
        _, slope = run(functions.gradients(f, affine=False, lsq=True), language, dy=one, x=t, s=one)
        code = IntDescription(f, affine=False)
        inside = and_(fp("leq", float_const(float(code.qmin)), t), fp("leq", t, float_const(float(code.qmax))))
        difference = fp("sub", widened(c), widened(t))
        return Claim(
            inside, and_(fp("eq", widened(slope), difference), fp("leq", fp("abs", difference), float_const(0.5, F64)))
        )

    return Case(f"{f.name}, {language}", build, f.name)


# ---- faults ---------------------------------------------------------------------------------------------------------

C_PY = "c = np.where(t == t, np.minimum(np.maximum(k, lo), hi), np.float32(0)) + np.float32(0)"
UNCLAMPED_PY = edit(FAKE_PY, C_PY, "c = np.where(t == t, k, np.float32(0)) + np.float32(0)")
MINUS_ZERO_PY = edit(FAKE_PY, C_PY, C_PY.removesuffix(" + np.float32(0)"))
ROUNDED_MASK_PY = edit(FAKE_PY, "v = t if lsq_mask else k", "v = k")
STRICT_PY = edit(FAKE_PY, "return t, c, (lo <= v) & (v <= hi), s", "return t, c, (lo <= v) & (v < hi), s")
SLOPE_PY = edit(FAKE_PY, "np.where(m, c - t, c)", "np.where(m, t - c, c)")
UNROUNDED_Z_PY = edit(
    FAKE_PY,
    "z = np.rint(np.clip(np.where(z == z, z, 0), qmin, qmax))",
    "z = np.clip(np.where(z == z, z, 0), qmin, qmax)",
)
NAN_PY = edit(FAKE_PY, "return np.where(t == t, c * s, numerics.NAN)", "return (c * s)")
FLOAT_MASK_PY = edit(FAKE_PY, "np.uint32(f.max_bits if lsq_mask else f.rounds_to_max_bits)", "np.uint32(f.max_bits)")
CLAMPED_H = "else c = nearest(clamp(t, sub(splat<V>(q.qmin), of.z), sub(splat<V>(q.qmax), of.z)));"
UNCLAMPED_H = edit(FAKE_H, CLAMPED_H, "else c = nearest(t);")
LSQ_H = edit(FAKE_H, "g.inside = LSQ ? clamped == t : c == nearest(t);", "g.inside = c == nearest(t);")
ZERO_POINT_H = edit(
    FAKE_H, "g.zero_point = g.inside ? zero : -mul(dy, of.s);", "g.zero_point = g.inside ? zero : mul(dy, of.s);"
)
TIE_H = edit(FAKE_H, "(1u << (22 - F::fraction_bits)) - (F::max_code & 1)", "(1u << (22 - F::fraction_bits))")
NAN_H = edit(FAKE_H, "return t == t ? mul(c, of.s) : same_bits<V>(splat<Bits<V>>(kNaN));", "return mul(c, of.s);")
NAN_Z_H = edit(FAKE_H, "z = z == z ? z : 0.0f;", "z = z == z ? z : 1.0f;")
SLOPE_H = edit(FAKE_H, "const V slope = g.inside ? sub(c, t) : c;", "const V slope = g.inside ? sub(c, t) + 0.5f : c;")
COARSE_PY = edit(FAKE_PY, "k = np.rint(t)", "k = np.rint(t * np.float32(0.5)) * np.float32(2)")


def theorems() -> Iterator[Theorem]:
    int8, uint8, int4 = map(int_row, ("int8", "uint8", "int4"))
    e4m3, e5m2 = map(float_row, ("float8_e4m3fn", "float8_e5m2"))
    forms = [(f, affine) for f in formats.WITHOUT_BOOKS for affine in ((False, True) if is_affine(f) else (False,))]
    masks = [(f, lsq) for f in formats.WITHOUT_BOOKS for lsq in (False, True)]
    any_input = "all x, s and zero points, whatever the products round to"
    yield Theorem(
        "fake_quantize(x) = dequantize(quantize(x))",
        "C10",
        "the same value where t is a number, and C1's NaN where it is NaN.",
        any_input,
        tuple(as_quantized(f, language, affine) for f, affine in forms for language in LANGUAGES),
        (
            Fault("not clamped", as_quantized(int8, REFERENCE, True), UNCLAMPED_PY),
            Fault("a zero of -0", as_quantized(int8, REFERENCE, False), MINUS_ZERO_PY),
            Fault("not clamped", as_quantized(int4, HEADER, True), UNCLAMPED_H),
            Fault("NaN not seen", as_quantized(int8, HEADER, True), NAN_H),
        ),
    )
    yield Theorem(
        "t is NaN only where x or s is",
        "C5 C6 C10",
        "fl(x * fl(1/s)) is a number for every number x and effective scale.",
        "all x and s but NaN",
        tuple(never_nan(f, language) for f in (int8, e4m3) for language in LANGUAGES),
        (
            Fault(
                "a reciprocal of 0",
                never_nan(int8, REFERENCE),
                edit(
                    "quantlib/reference/numerics.py",
                    "r = np.float32(1) / s_eff",
                    "r = np.float32(1) / s_eff - np.float32(1)",
                ),
            ),
            Fault(
                "a reciprocal of infinity",
                never_nan(int8, HEADER),
                edit("csrc/numerics.h", "return div(1.0f, s_eff);", "return div(1.0f, s_eff - 1.0f);"),
            ),
        ),
    )
    yield Theorem(
        "a learned zero point is rounded to a code",
        "C10",
        "z = RNE(clamp(z, qmin, qmax)), 0 where it is NaN. The theorems that follow take it for a code.",
        "all 2^32 float32 as a zero point",
        tuple(learned(f, language) for f in INTS for language in LANGUAGES),
        (
            Fault("not rounded", learned(int8, REFERENCE), UNROUNDED_Z_PY),
            Fault("a NaN is 1", learned(int4, HEADER), NAN_Z_H),
        ),
    )
    yield Theorem(
        "the gradient of x is selected by the mask",
        "C10",
        "dx = m ? dy : +0, with m where lo <= RNE(t) <= hi, with the LSQ mask where lo <= t <= hi; of floats where t "
        "rounds to a finite value, or is at most the largest. A NaN t is outside.",
        any_input,
        tuple(
            mask(f, lsq, language, long=lsq and language == REFERENCE and f.name in WIDE)
            for f, lsq in masks
            for language in LANGUAGES
        ),
        (
            Fault("the mask of the rounded value", mask(int8, True, REFERENCE), ROUNDED_MASK_PY),
            Fault("the end left out", mask(int4, False, REFERENCE), STRICT_PY),
            Fault("the mask of the value", mask(e4m3, False, REFERENCE), FLOAT_MASK_PY),
            Fault("the mask of the rounded value", mask(uint8, True, HEADER), LSQ_H),
            Fault("an odd largest code takes its tie in", mask(e5m2, False, HEADER), TIE_H),
        ),
    )
    yield Theorem(
        "the gradients of scale and zero point are those of a straight-through rounding",
        "C10",
        "dscale = dy * (m ? fl(c - t) : c) and dzero_point = m ? +0 : -(dy * s), with c the value of t's code; at a "
        "NaN t c = 0 and m = 0.",
        any_input,
        tuple(
            slopes(f, la, long=la == REFERENCE and f.name in WIDE) for f in formats.WITHOUT_BOOKS for la in LANGUAGES
        ),
        (
            Fault("the slope with the other sign", slopes(e4m3, REFERENCE), SLOPE_PY),
            Fault("the other sign", slopes(uint8, HEADER), ZERO_POINT_H),
        ),
    )
    yield Theorem(
        "c - t is exact",
        "C10",
        "inside the range fl(c - t) has no rounding, and |c - t| <= 1/2.",
        "every t from qmin to qmax, without a zero point",
        tuple(exact_difference(f, REFERENCE) for f in INTS),
        (
            Fault("rounded to even numbers", exact_difference(int8, REFERENCE), COARSE_PY),
            Fault("half a step more", exact_difference(int4, HEADER), SLOPE_H),
        ),
    )
