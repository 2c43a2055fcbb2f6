"""One value to one code and back, in NumPy: the meaning of every format, bit for bit (contract C1-C7).

``csrc/numerics.h`` and ``backends/triton/numerics.py`` are this file in two other languages: the same names and the
same numbered steps. Arithmetic is binary32, one rounding an operation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlib.formats import FLOAT32, SCALE_MIN, FloatFormat, Format, IntFormat

Array = NDArray[Any]

NAN = np.array(FLOAT32.nan_code, np.uint32).view(np.float32)[()]  # the one NaN that is ever written
INFINITY_BITS = np.uint32(0x7F800000)


def magnitude_bits(x: Array) -> Array:
    """[...] float32 -> [...] uint32: the bits without the sign, which order like the magnitudes, NaN above all."""
    return np.asarray(x, np.float32).view(np.uint32) & np.uint32(0x7FFFFFFF)


def encode_float(x: Array, f: FloatFormat, saturate: bool | None = None) -> Array:
    """[...] float32 -> [...] code of ``f``: nearest, ties to even, rounded once (C3)."""
    if f.is_book:
        return encode_book(x, f)
    saturate = f.saturates if saturate is None else saturate
    x = np.asarray(x, np.float32)
    a = magnitude_bits(x)
    sign = (x.view(np.uint32) >> np.uint32(31)) << np.uint32(f.bits - 1)
    if f.bits == 32:
        return np.where(a > INFINITY_BITS, np.uint32(f.nan_code), a | sign)
    shift = 23 - f.fraction_bits
    # 1. round the magnitude's bits: add just under half, and the last kept bit so that ties go to even
    r = a + ((a >> np.uint32(shift)) & np.uint32(1)) + np.uint32((1 << (shift - 1)) - 1)
    # 2. move the exponent to the format's bias
    r = (r >> np.uint32(shift)).astype(np.int32) - np.int32((127 - f.bias) << f.fraction_bits)
    # 3. below the smallest normal: add the float whose last place is the smallest subnormal; the addition rounds
    if f.bias != 127:
        magic = np.array((127 + 24 - f.bias - f.fraction_bits) << 23, np.uint32)
        small = (a.view(np.float32) + magic.view(np.float32)).view(np.uint32) - magic
        r = np.where(a < np.uint32((128 - f.bias) << 23), small.astype(np.int32), r)
    # 4. too large: the largest finite value, or what the format has beyond it, which is the code after that
    r = np.minimum(r, np.int32(f.max_code if saturate else f.overflow_code))
    # 5. sign, of a zero only where there is -0; NaN last
    code = r.astype(np.uint32) | (sign if f.has_negative_zero else np.where(r == 0, np.uint32(0), sign))
    return np.where(a > INFINITY_BITS, np.uint32(f.nan_code), code).astype(f.storage)


def decode_float(code: Array, f: FloatFormat) -> Array:
    """[...] code of ``f`` -> [...] float32, exact; NaN becomes 0x7FFFFFFF."""
    if f.is_book:
        return decode_book(code, f)
    code = np.asarray(code).astype(np.uint32) & np.uint32((1 << f.bits) - 1)
    a = code & np.uint32(f.sign_bit - 1)
    # 1. normal: fraction and exponent move up, the exponent to FP32's bias
    bits = (a << np.uint32(23 - f.fraction_bits)) + np.uint32((127 - f.bias) << 23)
    # 2. subnormal: a count of smallest subnormals
    if f.bias != 127:
        smallest = np.float32(2.0 ** (1 - f.bias - f.fraction_bits))
        subnormal = (a.astype(np.float32) * smallest).view(np.uint32)
        bits = np.where(a < np.uint32(1 << f.fraction_bits), subnormal, bits)
    # 3. infinity, sign, NaN
    if f.has_inf:
        bits = np.where(a == f.overflow_code, INFINITY_BITS, bits)
    bits = bits | ((code >> np.uint32(f.bits - 1)) << np.uint32(31))
    if f.has_nan:
        is_nan = a > np.uint32(f.max_code + f.has_inf) if f.has_negative_zero else code == np.uint32(f.nan_code)
        bits = np.where(is_nan, np.uint32(FLOAT32.nan_code), bits)
    return bits.astype(np.uint32).view(np.float32)


def encode_book(x: Array, f: FloatFormat) -> Array:
    """[...] float32 -> [...] code of the nearest value of a code book; at a midpoint, of the lower (C6)."""
    x = np.asarray(x, np.float32)
    # 1. the midpoints below x
    code = np.zeros(x.shape, f.storage)
    for midpoint in f.midpoints:
        code += x > np.float32(midpoint)
    # 2. NaN is the largest value
    return np.where(x == x, code, np.array(f.nan_code, f.storage))


def decode_book(code: Array, f: FloatFormat) -> Array:
    """[...] code of a code book -> [...] float32"""
    return np.array(f.values, np.float32)[np.asarray(code).astype(np.uint32) & np.uint32(f.max_code)]


def effective_scale(s: Array, f: Format) -> Array:
    """[...] float32 -> |s| clamped to [2^-100, scale_max] with the sign of s; 0 becomes 2^-100, NaN stays (C4)."""
    s = np.asarray(s, np.float32)
    magnitude = (s.view(np.uint32) & np.uint32(0x7FFFFFFF)).view(np.float32)
    clamped = np.minimum(np.maximum(magnitude, np.float32(SCALE_MIN)), np.float32(f.scale_max))
    return np.where(s == s, np.where(s < 0, -clamped, clamped), NAN)


def project(x: Array, s_eff: Array) -> Array:
    """t = fl(x * fl(1 / s_eff)): in units of the scale (C5 and C6)."""
    r = np.float32(1) / s_eff
    return np.asarray(x, np.float32) * r


def encode_int(t: Array, z: Array, f: IntFormat, affine: bool) -> Array:
    """[...] float32 in units of the scale -> [...] int32 code, clamp(RNE(t) + z, qmin, qmax) (C5)."""
    qmin, qmax = f.range(affine)
    z = clamp_zero_point(z, f, affine)
    # 1. NaN is the code of zero
    t = np.where(t == t, t, np.float32(0))
    # 2. clamp first: z is added after rounding, so the bounds are integers and clamping commutes with rounding
    t = np.clip(t, (qmin - z).astype(np.float32), (qmax - z).astype(np.float32))
    # 3. round to nearest, ties to even, then add the zero point
    return np.rint(t).astype(np.int32) + z


def decode_int(code: Array, s_eff: Array, z: Array, f: IntFormat, affine: bool) -> Array:
    """fl(fl32(q - z) * s_eff), NaN as 0x7FFFFFFF (C7)."""
    return canonical((np.asarray(code, np.int32) - clamp_zero_point(z, f, affine)).astype(np.float32) * s_eff)


def clamp_zero_point(z: Array, f: IntFormat, affine: bool) -> Array:
    """[...] int32: a zero point is a code; one outside the format's range means the nearest that is inside (C5)."""
    return np.clip(np.asarray(z, np.int32), *f.range(affine)) if affine else np.zeros((), np.int32)


def canonical(x: Array) -> Array:
    """Every NaN becomes 0x7FFFFFFF (C1)."""
    return np.where(x == x, x, NAN)


def symmetric_scale(amax_bits: Array, f: Format) -> Array:
    """[...] uint32 magnitude bits of the range -> [...] float32, clamp(fl(amax / Q)) (C4)."""
    amax = np.asarray(amax_bits, np.uint32).view(np.float32)
    return effective_scale(amax / np.float32(f.max), f)


def affine_scale(lowest: Array, highest: Array, f: IntFormat) -> tuple[Array, Array]:
    """Range -> float32 scale and int32 zero point (C4). Both bounds are NaN where the block holds one."""
    qmin, qmax = f.range(affine=True)
    # 1. widen to hold zero, so that zero has a code
    lowest = np.minimum(np.asarray(lowest, np.float32), np.float32(0))
    highest = np.maximum(np.asarray(highest, np.float32), np.float32(0))
    # 2. scale; an infinite range gives the largest
    s = effective_scale((highest - lowest) / np.float32(qmax - qmin), f)
    # 3. zero point: the code of zero when the lowest value has code qmin; 0 where the scale is NaN
    z = np.float32(qmin) - project(lowest, s)
    z = np.where(z == z, z, np.float32(0))
    z = np.rint(np.minimum(np.maximum(z, np.float32(qmin)), np.float32(qmax)))
    return s, z.astype(np.int32)
