"""Floats as the GPU computes them: every rounding is to nearest even, a NaN that is computed is 0x7fffffff.

Nothing here is taken from quantlib, which it is to test.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Array = Any  # of NumPy
NAN = np.uint32(0x7FFFFFFF)
PAYLOAD = np.uint32(0x7FC5A5A5)  # of a NaN where PTX promises no payload


def canonical(x: Array) -> Array:
    """X float32 with one NaN."""
    nan = np.isnan(x)
    return np.where(nan, NAN, x.view(np.uint32)).view(np.float32) if nan.any() else x


def fma(a: Array, b: Array, c: Array) -> Array:
    """Fma(a, b, c) = a * b + c, rounded once.

    The product of two float32 is exact in float64; the sum is rounded to odd there, which has more than twice the bits
    and two, so that rounding it again to float32 is rounding once.
    """
    return canonical(fma_to_odd(a, b, c).astype(np.float32))


def fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """A * b + c of float32 in float64, rounded to odd."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    odd = total.view(np.int64) & 1
    away = np.where((lost > 0) == (total > 0), 1, -1)  # the other neighbour, which lies beyond the exact sum
    inexact = np.isfinite(total) & (lost != 0) & (odd == 0)
    return (total.view(np.int64) + inexact * away).view(np.float64)


def fma_16(a: Array, b: Array, c: Array) -> Array:
    """A * b + c of floats of 16 bits, given as float32, so that rounding the result to 16 bits is rounding once."""
    exact = fma_to_odd(a, b, c)
    near = exact.astype(np.float32)
    lost = np.isfinite(exact) & (near != exact)
    toward_zero = near.view(np.uint32) - (lost & (np.abs(near.astype(np.float64)) > np.abs(exact)))
    return (toward_zero | lost).astype(np.uint32).view(np.float32)


def saturated(x: Array) -> Array:
    """Clamp x to 0..1; a NaN, and -0, become +0."""
    return np.where(x > 0, np.minimum(x, np.float32(1)), np.float32(0))


def minimum(a: Array, b: Array) -> Array:
    """Min(a, b): the number where the other is NaN, and -0 below +0."""
    signed = np.where((a == b) & np.signbit(a), a, b)
    return canonical(np.where(np.isnan(b) | (a < b), a, np.where(a == b, signed, b)))


def maximum(a: Array, b: Array) -> Array:
    return negative(minimum(negative(a), negative(b)))


def negative(x: Array) -> Array:
    return np.where(np.isnan(x), x, -x)


# ---- narrower floats -------------------------------------------------------------------------------------------------


def to_bfloat16(x: Array) -> Array:
    """[N] float32 -> [N] uint16"""
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_float16(x: Array) -> Array:
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def from_bfloat16(code: Array) -> Array:
    x = code.astype(np.uint32) << 16
    return np.where((x & 0x7FFFFFFF) > 0x7F800000, PAYLOAD, x).view(np.float32)


def from_float16(code: Array) -> Array:
    x = code.view(np.float16).astype(np.float32)
    return np.where(np.isnan(x), PAYLOAD, x.view(np.uint32)).view(np.float32)


@functools.cache
def values(name: str) -> Array:
    """The values of the codes 0..127 of an 8-bit float, float64: infinity and NaN as they are."""
    exponent, mantissa = {"e4m3": (4, 3), "e5m2": (5, 2)}[name]
    code, bias = np.arange(128), 2 ** (exponent - 1) - 1
    e, m = code >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
    x = np.where(e == 0, m * 2.0 ** (1 - bias), (1 + m) * 2.0 ** (e - bias))
    if name == "e4m3":
        x[127] = np.nan
    else:
        x[124], x[125:] = np.inf, np.nan
    return x


def to_float8(x: Array, name: str) -> Array:
    """[N] float32 -> [N] uint8: to nearest even, then to the largest finite value; 0x7f for NaN."""
    finite = values(name)[np.isfinite(values(name))]
    middles = (finite[1:] + finite[:-1]) / 2
    size = np.abs(x).astype(np.float64)
    below, above = np.searchsorted(middles, size, "left"), np.searchsorted(middles, size, "right")
    code = np.where(below % 2 == 0, below, above)  # they differ on a middle alone
    return np.where(np.isnan(x), 0x7F, code + np.signbit(x) * 0x80).astype(np.uint8)


def from_float8(code: Array, name: str) -> Array:
    """[N] uint8 -> [N] uint16, a float16"""
    x = values(name)[code & 0x7F].astype(np.float16).view(np.uint16)
    return np.where(np.isnan(values(name))[code & 0x7F], 0x7FFF, x | ((code & 0x80).astype(np.uint16) << 8)).astype(
        np.uint16
    )


# ---- integers --------------------------------------------------------------------------------------------------------


def quotient(a: Array, b: Array) -> Array:
    """A / b towards zero."""
    q = a // np.where(b == 0, b.dtype.type(1), b)
    return q + ((a - q * b != 0) & ((a < 0) != (b < 0))) if a.dtype.kind == "i" else q


def multiply_high(a: Array, b: Array) -> Array:
    """The high half of the product."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    x, y, low, half = a.view(np.uint64), b.view(np.uint64), np.uint64(0xFFFFFFFF), np.uint64(32)
    middle = (x >> half) * (y & low) + (((x & low) * (y & low)) >> half)
    other = (x & low) * (y >> half) + (middle & low)
    high = (x >> half) * (y >> half) + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def shift_left(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, by: Array) -> Array:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def extract(a: Array, at: Array, length: Array) -> Array:
    """Bfe: ``length`` bits from bit ``at`` on."""
    bits, at, length = a.dtype.itemsize * 8, at & 255, length & 255
    found = shift_right(a, at) & low(length, a)
    if a.dtype.kind == "u":
        return found
    last = np.minimum(at.astype(np.int64) + length - 1, bits - 1)
    negative = (shift_right(a, np.maximum(last, 0)) & 1).astype(bool) & (length > 0)
    kept = np.minimum(length, np.maximum(bits - at.astype(np.int64), 0))
    return np.where(negative, found | ~low(kept, a), found)


def insert(a: Array, b: Array, at: Array, length: Array) -> Array:
    """Bfi: b with ``length`` bits of a from bit ``at`` on."""
    at, length = at & 255, length & 255
    field = shift_left(low(length, a), at)
    return (b & ~field) | (shift_left(a, at) & field)


def low(length: Array, like: Array) -> Array:
    """The lowest ``length`` bits."""
    ones = shift_left(np.ones_like(like.view(f"u{like.dtype.itemsize}")), length) - like.dtype.type(1).view(
        f"u{like.dtype.itemsize}"
    )
    return ones.view(like.dtype)


def funnel_left(a: Array, b: Array, by: Array) -> Array:
    """Shf.l.wrap: the high word of b:a << (by & 31)."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    return ((both << (by & 31).astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)


def funnel_right(a: Array, b: Array, by: Array) -> Array:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    return (both >> (by & 31).astype(np.uint64)).astype(np.uint32)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Prmt: each nibble of the selector names a byte of b:a, or its sign in all bits."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.uint32(0)
    for n in range(4):
        nibble = (selector >> np.uint32(4 * n)) & np.uint32(15)
        byte = ((both >> ((nibble & 7).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(nibble & 8, (byte >> np.uint32(7)) * np.uint32(255), byte)
        result = result | (byte << np.uint32(8 * n))
    return result


def logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Lop3: the bit of the table that three bits name."""
    result = np.uint32(0)
    for n in range(8):
        chosen = (table >> np.uint32(n)) & np.uint32(1)
        term = (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
        result = result | np.where(chosen, term, np.uint32(0))
    return result
