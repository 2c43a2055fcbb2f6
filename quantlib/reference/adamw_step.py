"""parameter -= rate * m / (sqrt(v) * correction + eps), m and v moving averages in 8 bits, in NumPy (contract C13, C9).

Code q of m stands for q * |q| * scale, and code q of v for the square of q * q * scale, each ``block`` columns of a row
under one scale. Arithmetic is binary32, one rounding an operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quantlib import formats
from quantlib.formats import SCALE_MIN, FloatFormat
from quantlib.reference import numerics
from quantlib.reference.numerics import Array
from quantlib.reference.ops import reduce_blocks, spread


@dataclass(frozen=True)
class Squares:
    """Codes of 8 bits whose values are squares: q * |q| for q in -127..127, or 0..255."""

    signed: bool

    @property
    def most(self) -> int:
        """The largest code."""
        return 127 if self.signed else 255

    @property
    def scale_max(self) -> float:
        """The largest scale, by the rule of C4: no product with a value overflows."""
        return 2.0 ** (127 - (2 * self.most.bit_length() - 1))

    @property
    def storage(self) -> str:
        return "int8" if self.signed else "uint8"

    def decode(self, codes: Array, scale: Array, block: int) -> Array:
        """fl(q |q| * s), NaN where the scale is."""
        q = codes.astype(np.int32)
        return (q * np.abs(q)).astype(np.float32) * spread(self.effective(scale), codes.shape, (1, block))

    def encode(self, x: Array, block: int) -> tuple[Array, Array]:
        """Codes and scales: s = clamp(fl(amax / most^2)), |q| the number of squares (n + 1/2)^2 below fl(|x| / s)."""
        amax = reduce_blocks(np.maximum, numerics.magnitude_bits(x), (1, block)).view(np.float32)
        scale = self.effective(amax / np.float32(self.most**2))
        y = np.abs(x) * spread(np.float32(1) / scale, x.shape, (1, block))
        halves = ((np.arange(self.most) + 0.5) ** 2).astype(np.float32)  # exact
        q = np.where(y == y, np.searchsorted(halves, y), 0)
        return np.where(x < 0, -q, q).astype(self.storage), scale

    def effective(self, scale: Array) -> Array:
        clamped = np.minimum(np.maximum(np.abs(scale), np.float32(SCALE_MIN)), np.float32(self.scale_max))
        return np.where(scale == scale, np.where(scale < 0, -clamped, clamped), numerics.NAN)


M_CODES, V_CODES = Squares(signed=True), Squares(signed=False)


class Step(NamedTuple):
    """The results of a step."""

    parameter: Array  # [M, K], codes of its dtype
    m: Array  # [M, K] int8, or float32
    v: Array  # [M, K] uint8, or float32
    m_scale: Array  # [M, ceil(K / block)] float32, [M, 0] where m and v are float32
    v_scale: Array


def adamw_step(
    parameter: Array,
    gradient: Array,
    m: Array,
    v: Array,
    m_scale: Array,
    v_scale: Array,
    constants: Array,
    *,
    block: int,
    dtype: str = "float32",
    key: Array | None = None,
    origin: tuple[int, int] = (0, 0),
) -> Step:
    """parameter -= rate * m / (sqrt(v) * correction + eps); ``block`` 0 means that m and v are float32."""
    decay, l2, beta1, rest1, beta2, rest2, rate, correction, eps = np.asarray(constants, np.float32)
    x, g = np.asarray(parameter, np.float32), np.asarray(gradient, np.float32)
    with np.errstate(all="ignore"):
        # 1. the states as float32
        if block:
            m = M_CODES.decode(m, m_scale, block)
            u = V_CODES.decode(v, v_scale, block)
            v = u * u
        # 2. the moving averages
        if l2 != 0:
            g = g + l2 * x
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * (g * g)
        u = np.sqrt(v)
        # 3. the parameter
        x = x * decay - rate * m / (u * correction + eps)
        codes = _rounded(x, dtype, key, origin)
        # 4. the states as they are kept
        if not block:
            empty = np.zeros((len(x), 0), np.float32)
            return Step(codes, numerics.canonical(m), numerics.canonical(v), empty, empty)
        m_codes, m_scale = M_CODES.encode(m, block)
        v_codes, v_scale = V_CODES.encode(u, block)
        return Step(codes, m_codes, v_codes, m_scale, v_scale)


def random_bits(key: Array, row: Array, column: Array) -> Array:
    """16 random bits for each element of a matrix, by its row and column alone: [...] uint32 below 2^16 (C9).

    ``key`` is two words: one of the parameter, one of the step.
    """
    first, second = np.asarray(key).astype(np.int64).astype(np.uint32)
    with np.errstate(over="ignore"):
        a = _mixed(first ^ np.asarray(row).astype(np.uint32))
        b = _mixed(a ^ second)
        return _mixed(_mixed(b ^ np.asarray(column).astype(np.uint32)) + a) >> np.uint32(16)


def _mixed(x: Array) -> Array:
    """A permutation of 32 bits (Wellons 2018, lowbias32)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _rounded(x: Array, dtype: str, key: Array | None, origin: tuple[int, int]) -> Array:
    """Codes of ``dtype``: nearest, or with a key of bfloat16 up or down at random, without a bias (C9)."""
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    if key is None:
        return numerics.encode_float(x, f)
    M, K = x.shape
    random = random_bits(key, origin[0] + np.arange(M)[:, None], origin[1] + np.arange(K)[None, :])
    upper = ((np.ascontiguousarray(x).view(np.uint32) + random) >> np.uint32(16)).astype(f.storage)
    return np.where(x == x, upper, np.array(f.nan_code, f.storage))
