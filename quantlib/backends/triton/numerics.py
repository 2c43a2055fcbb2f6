"""quantlib/reference/numerics.py in Triton: the same names and the same numbered steps (contract C1-C7).

A format's row is passed whole as a ``tl.constexpr``. ARCH is the compute capability whose conversion instructions may
be used, 0 for none, as in the interpreter: both ways give the same bytes. Kernels are launched with
``enable_fp_fusion=False``, so that no product is contracted into a sum (C0).
"""

import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton.nibbles import encodes_nibbles, fills, lane_values, nearest_code, shuffled, widened

NAN: tl.constexpr = tl.constexpr(formats.FLOAT32.nan_code)
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
SCALE_MIN: tl.constexpr = tl.constexpr(formats.SCALE_MIN)
INTEGER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: its last place is one, so adding it rounds to an integer
INTEGER_BITS: tl.constexpr = tl.constexpr(0x4B400000)
FLOAT32: tl.constexpr = tl.constexpr(formats.FLOAT32)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def canonical(x):
    """Every NaN becomes 0x7FFFFFFF (C1)."""
    return tl.where(x == x, x, float_of(tl.full(x.shape, NAN, tl.uint32)))


@triton.jit
def product(x, s, ARCH: tl.constexpr):
    """fl(x * s), every NaN 0x7FFFFFFF (C1), which is what a GPU's multiplier makes of it"""
    return x * s if ARCH else canonical(x * s)


@triton.jit
def round_to_int(t):
    """[...] float32, |t| <= 2^22 -> [...] int32, nearest, ties to even"""
    return (t + INTEGER).to(tl.int32, bitcast=True) - INTEGER_BITS


@triton.jit
def int_to_float(q):
    """[...] int32, |q| <= 2^22 -> [...] float32, exact"""
    return (q + INTEGER_BITS).to(tl.float32, bitcast=True) - INTEGER


@triton.constexpr_function
def qmin(F, AFFINE):
    return F.range(AFFINE)[0]


@triton.constexpr_function
def qmax(F, AFFINE):
    return F.range(AFFINE)[1]


@triton.constexpr_function
def eight_bits(F):
    """The instruction set's name of F, "e4m3" or "e5m2"; "" where it has none"""
    shape = (F.bits, F.exponent_bits, F.bias, F.has_inf, F.nan)
    return {(8, 4, 7, False, "high"): "e4m3", (8, 5, 15, True, "high"): "e5m2"}.get(shape, "")


# ---- float formats ---------------------------------------------------------------------------------------------------


@triton.jit
def encode_float(x, F: tl.constexpr, SATURATE: tl.constexpr, ARCH: tl.constexpr):
    """[...] float32 -> [...] uint32 code of F: nearest, ties to even, rounded once (C3)."""
    bits = bits_of(x)
    a = bits & 0x7FFFFFFF
    if F.bits == 32:
        code = bits
    elif F.is_book:
        code = midpoints_below(x, F)
    elif ARCH >= 80 and F.bits == 16:
        code = convert_16(x, F, SATURATE)
    elif ARCH >= 89 and SATURATE and eight_bits(F) != "":
        code = convert_8(x, F)
    else:
        SHIFT: tl.constexpr = 23 - F.fraction_bits
        # 1. round the magnitude's bits: add just under half, and the last kept bit so that ties go to even
        r = a + ((a >> SHIFT) & 1) + ((1 << (SHIFT - 1)) - 1)
        # 2. move the exponent to the format's bias
        r = (r >> SHIFT).to(tl.int32) - ((127 - F.bias) << F.fraction_bits)
        # 3. below the smallest normal: add the float whose last place is the smallest subnormal; the addition rounds
        if F.bias != 127:
            MAGIC: tl.constexpr = (127 + 24 - F.bias - F.fraction_bits) << 23
            small = bits_of(float_of(a) + float_of(tl.full(a.shape, MAGIC, tl.uint32))) - MAGIC
            r = tl.where(a < ((128 - F.bias) << 23), small.to(tl.int32), r)
        # 4. too large: the largest finite value, or what the format has beyond it
        r = tl.minimum(r, F.max_code) if SATURATE else tl.where(r > F.max_code, F.overflow_code, r)
        # 5. sign, of a zero only where there is -0; NaN last
        code = r.to(tl.uint32) | ((bits >> 31) << (F.bits - 1))
        if not F.has_negative_zero:
            code = tl.where(r == 0, 0, code)
    return tl.where(a > INFINITY, F.nan_code, code)


@triton.jit
def encode_product(y, F: tl.constexpr, ARCH: tl.constexpr):
    """encode_float, not saturating, for a y whose NaN is 0x7FFFFFFF, as a product's is: ``cvt.rn`` makes that 0x7FFF"""
    if F.bits == 32:
        return bits_of(y)
    elif ARCH >= 80 and F.bits == 16:
        return convert_16(y, F, False)
    else:
        return encode_float(y, F, False, ARCH)


@triton.jit
def convert_16(x, F: tl.constexpr, SATURATE: tl.constexpr):
    """encode_float for every x but NaN: ``cvt.rn`` rounds once to nearest even and keeps subnormals"""
    if SATURATE:  # the bound is a value of F, so clamping first is clamping last
        x = tl.minimum(tl.maximum(x, -F.max), F.max)
    y = x.to(tl.bfloat16) if F.bias == 127 else x.to(tl.float16)
    return y.to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def convert_8(x, F: tl.constexpr):
    """encode_float, saturating, for every x but NaN: from FP32 in one rounding, where ``.to`` may go through FP16"""
    PAIR: tl.constexpr = "cvt.rn.satfinite." + eight_bits(F) + "x2.f32 "
    code = tl.inline_asm_elementwise(
        "{ .reg .b16 a, b; " + PAIR + "a, $2, $1; " + PAIR + "b, $4, $3; mov.b32 $0, {a, b}; }",
        "=r,f,f,f,f", [x], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip
    return code.to(tl.uint32)


@triton.jit
def decode_float(code, F: tl.constexpr, ARCH: tl.constexpr):
    """[...] code of F -> [...] float32, exact; NaN stays NaN."""
    if F.bits == 32:
        return float_of(code)
    if F.is_book:
        return look_up(code, F, 0, F.max_code + 1)
    if F.bias == 127:
        return widened(code) if ARCH >= 80 and fills(code.shape, 2) else float_of(code.to(tl.uint32) << 16)
    if F.bits == 16:
        return code.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    if ARCH >= 89 and eight_bits(F) != "":
        TYPE: tl.constexpr = tl.float8e4nv if eight_bits(F) == "e4m3" else tl.float8e5
        return code.to(tl.uint8).to(TYPE, bitcast=True).to(tl.float16).to(tl.float32)
    code = code.to(tl.uint32)
    a = code & (F.sign_bit - 1)
    # 1. normal: fraction and exponent move up, the exponent to FP32's bias
    bits = (a << (23 - F.fraction_bits)) + ((127 - F.bias) << 23)
    # 2. subnormal: a count of smallest subnormals, the last places of the float added and taken away
    MAGIC: tl.constexpr = (127 + 24 - F.bias - F.fraction_bits) << 23
    magic = tl.full(a.shape, MAGIC, tl.uint32)
    bits = tl.where(a < (1 << F.fraction_bits), bits_of(float_of(a + magic) - float_of(magic)), bits)
    # 3. infinity, sign, NaN
    if F.has_inf:
        bits = tl.where(a == F.overflow_code, INFINITY, bits)
    bits = bits | ((code >> (F.bits - 1)) << 31)
    if not F.has_negative_zero:
        bits = tl.where(bits == 0x80000000, NAN, bits)
    elif F.has_nan:
        bits = tl.where(a > (F.overflow_code if F.has_inf else F.max_code), NAN, bits)
    return float_of(bits)


@triton.jit
def nearest_value(t, F: tl.constexpr, ARCH: tl.constexpr):
    """[...] float32 in units of the scale -> [...] float32: the value of its code (C6); in no loop, see nibbles.py"""
    if encodes_nibbles(F, ARCH):
        return shuffled(lane_values(F), nearest_code(t, F))
    else:
        return decode_float(encode_float(t, F, True, ARCH), F, ARCH)


# ---- code books -----------------------------------------------------------------------------------------------------


@triton.constexpr_function
def value_of(F, code):
    return F.values[code]


@triton.constexpr_function
def midpoint_of(F, code):
    return F.midpoints[code]


@triton.jit
def midpoints_below(x, F: tl.constexpr):
    """[...] float32 -> [...] uint32 code of the nearest value; at a midpoint, of the lower (C6)."""
    code = tl.full(x.shape, 0, tl.uint32)
    LAST: tl.constexpr = F.max_code
    for i in tl.static_range(LAST):
        code += (x > midpoint_of(F, i)).to(tl.uint32)
    return code


@triton.jit
def look_up(code, F: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """[...] code, its low bits counted from FIRST -> [...] float32: one of COUNT values, by a tree of selections"""
    if COUNT == 1:
        return tl.full(code.shape, value_of(F, FIRST), tl.float32)
    else:
        HALF: tl.constexpr = COUNT // 2
        low, high = look_up(code, F, FIRST, HALF), look_up(code, F, FIRST + HALF, HALF)
        return tl.where((code & HALF) != 0, high, low)


# ---- ranges: integers that order like the values, so that their extremes are exact and depend on no order -----------


@triton.jit
def ordered(code, X: tl.constexpr):
    """[...] code of X -> [...] int32 that orders like the value, negative NaN below all and positive NaN above all."""
    code = code.to(tl.int16 if X.bits == 16 else tl.int32, bitcast=True).to(tl.int32)
    return code ^ ((code >> 31) & (X.sign_bit - 1))


@triton.jit
def widen(lowest, highest, code, X: tl.constexpr, AFFINE: tl.constexpr):
    """The range of values, or of magnitudes: then the lowest stays as it is."""
    if AFFINE:
        key = ordered(code, X)
        return tl.minimum(lowest, key), tl.maximum(highest, key)
    else:
        return lowest, tl.maximum(highest, (code & (X.sign_bit - 1)).to(tl.int32))


@triton.jit
def bound(key, X: tl.constexpr):
    """[...] int32 of ``ordered``, or a magnitude's code -> [...] float32"""
    return decode_float(key ^ ((key >> 31) & (X.sign_bit - 1)), X, 0)


@triton.jit
def range_scale(lowest, highest, X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr):
    """[...] int32 range of a block -> [...] float32 scale, [...] int32 zero point (C4)"""
    if AFFINE:
        return affine_scale(bound(lowest, X), bound(highest, X), F)
    else:
        return symmetric_scale(bound(highest, X), F), lowest


# ---- scales ----------------------------------------------------------------------------------------------------------


@triton.jit
def effective_scale(s, F: tl.constexpr):
    """[...] float -> float32, |s| clamped to [2^-100, scale_max], its sign kept; 0 becomes 2^-100, NaN stays (C4)."""
    if s.dtype == tl.uint8:  # E8M0
        bits = tl.maximum(s.to(tl.uint32) << 23, 0x00400000)
        s = float_of(tl.where(s == 255, tl.full(s.shape, NAN, tl.uint32), bits))
    s = s.to(tl.float32)
    clamped = within(s, SCALE_MIN, F.scale_max)
    return tl.where(s == s, clamped, float_of(tl.full(s.shape, NAN, tl.uint32)))


@triton.jit
def within(s, least, most):
    """|s| clamped to [least, most] with the sign of s, + for 0"""
    clamped = tl.minimum(tl.maximum(tl.abs(s), least), most)
    return tl.where(s < 0.0, -clamped, clamped)


@triton.jit
def reciprocal(s_eff):
    """r = fl(1 / s_eff). t = x * r is x in units of the scale (C5, C6)."""
    return tl.div_rn(tl.full(s_eff.shape, 1.0, tl.float32), s_eff)


@triton.jit
def symmetric_scale(amax, F: tl.constexpr):
    """[...] float32 range, NaN where the block holds one -> [...] float32, clamp(fl(amax / Q)) (C4)."""
    return effective_scale(amax if F.max == 1.0 else tl.div_rn(amax, tl.full(amax.shape, F.max, tl.float32)), F)


@triton.jit
def affine_scale(lowest, highest, F: tl.constexpr):
    """Range -> float32 scale and int32 zero point (C4). A bound is NaN where the block holds one, and then both results
    are those of NaN."""
    QMIN: tl.constexpr = qmin(F, True)
    QMAX: tl.constexpr = qmax(F, True)
    # 1. widen to hold zero, so that zero has a code; a NaN stays
    lowest = tl.where(lowest > 0.0, 0.0, lowest)
    highest = tl.where(highest < 0.0, 0.0, highest)
    # 2. scale; an infinite range gives the largest
    s = effective_scale(tl.div_rn(highest - lowest, tl.full(lowest.shape, QMAX - QMIN, tl.float32)), F)
    # 3. zero point: the code of zero when the lowest value has code qmin; 0 where the scale is NaN
    z = QMIN - lowest * reciprocal(s)
    z = tl.where(z == z, z, 0.0)
    return s, round_to_int(tl.minimum(tl.maximum(z, QMIN), QMAX))


# ---- integer formats -------------------------------------------------------------------------------------------------


@triton.jit
def clamp_zero_point(z, F: tl.constexpr):
    """[...] int32: a zero point is a code; one outside the format's range means the nearest that is inside (C5)."""
    return tl.minimum(tl.maximum(z, qmin(F, True)), qmax(F, True))


@triton.jit
def clamp_units(t, z, F: tl.constexpr, AFFINE: tl.constexpr, s):
    """[...] float32 in units of the scale, to be rounded to a code less the zero point (C5).

    s is the scale if t is NaN only where s is, as the whole block is then: its bounds are 0, and a GPU's minimum of NaN
    and a number is the number. Otherwise, and in the interpreter, None.
    """
    QMIN: tl.constexpr = qmin(F, AFFINE)
    QMAX: tl.constexpr = qmax(F, AFFINE)
    # 1. NaN is the code of zero
    if s is None:
        t = tl.where(t == t, t, 0.0)
    # 2. clamp first: z is added after rounding, so the bounds are integers and clamping commutes with rounding
    if AFFINE:
        low, high = int_to_float(QMIN - z), int_to_float(QMAX - z)
    else:
        low, high = tl.full(z.shape, QMIN, tl.float32), tl.full(z.shape, QMAX, tl.float32)
    if s is not None:
        low, high = tl.where(s == s, low, 0.0), tl.where(s == s, high, 0.0)
    return tl.minimum(tl.maximum(t, low), high)


@triton.jit
def encode_int(t, z, F: tl.constexpr, AFFINE: tl.constexpr, s=None):
    """[...] float32 in units of the scale -> [...] int32 code, clamp(RNE(t) + z, qmin, qmax) (C5); s: clamp_units"""
    t = clamp_units(t, z, F, AFFINE, s)
    # 3. round to nearest, ties to even, then add the zero point
    return round_to_int(t) + z if AFFINE else round_to_int(t)


@triton.jit
def decode_int(code, s_eff, z, AFFINE: tl.constexpr, ARCH: tl.constexpr):
    """fl(fl32(q - z) * s_eff), NaN as 0x7FFFFFFF (C7)."""
    q = code.to(tl.int32)
    return product(int_to_float(q - z if AFFINE else q), s_eff, ARCH)


# ---- any format ------------------------------------------------------------------------------------------------------


@triton.jit
def encode(t, z, F: tl.constexpr, AFFINE: tl.constexpr, ARCH: tl.constexpr, s=None):
    """[...] float32 in units of the scale -> [...] code of F (C5, C6), or its low bits where that is what is kept.

    s: see clamp_units.
    """
    if encodes_nibbles(F, ARCH):
        return nearest_code(t, F)
    elif F.is_float:
        return encode_float(t, F, True, ARCH)
    elif F.whole:
        return encode_int(t, z, F, AFFINE, s if ARCH else None)
    else:  # the low bits of INTEGER are 0
        code = (clamp_units(t, z, F, AFFINE, s if ARCH else None) + INTEGER).to(tl.int32, bitcast=True)
        return code + z if AFFINE else code


@triton.jit
def decode(code, s_eff, z, F: tl.constexpr, AFFINE: tl.constexpr, ARCH: tl.constexpr):
    """[...] code of F -> [...] float32 (C7)."""
    if F.is_float:
        return product(decode_float(code, F, ARCH), s_eff, ARCH)
    else:
        return decode_int(code, s_eff, z, AFFINE, ARCH)
