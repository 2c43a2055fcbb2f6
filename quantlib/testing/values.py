"""Values at which rounding, clamping and special cases are decided (contract C12), the same on every run.

Random inputs hardly ever meet a tie or an edge; these are made of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantlib import formats, reference
from quantlib.formats import SCALE_MIN, FloatFormat, Format, IntFormat

Array = NDArray[Any]


@functools.cache
def edges() -> Array:
    """[n] float32: every exponent with the fractions where some format rounds, both signs; so every special value too.

    Among them are zeros, subnormals, infinities and quiet and signalling NaNs of several payloads.
    """
    fractions = {0, 1, 2, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF}
    for f in formats.TABLE:
        if isinstance(f, FloatFormat) and not f.is_book:
            half = 1 << (22 - f.fraction_bits)  # of the last place
            fractions |= {k * half + d for k in (1, 3) for d in (-1, 0, 1)}
    exponents = np.arange(256, dtype=np.uint32) << np.uint32(23)
    magnitudes = exponents[:, None] | np.array(sorted(fractions), np.uint32)
    return _readonly(np.concatenate([magnitudes, magnitudes | np.uint32(1 << 31)]).reshape(-1).view(np.float32))


@functools.cache
def midpoints(format: str, affine: bool = False) -> Array:
    """[n] float32 in units of the scale: halfway between neighbouring codes, and where overflow begins; exact."""
    f = formats.get(format)
    if isinstance(f, IntFormat):
        qmin, qmax = f.range(affine)
        return _readonly(np.arange(qmin - 1, qmax + 1, dtype=np.float32) + np.float32(0.5))
    if f.is_book:
        step = f.values[-1] - f.values[-2]
        ends = np.array([f.values[0] - step / 2, *f.midpoints, f.values[-1] + step / 2])
        return _readonly(ends.astype(np.float32))
    values = reference.decode_float(np.arange(f.max_code + 1, dtype=np.uint32), f).astype(np.float64)
    beyond = 2 * values[-1] - values[-2]
    halves = (values + np.append(values[1:], beyond)) / 2
    return _readonly(np.concatenate([-halves[::-1], halves]).astype(np.float32))


def neighbours(values: Array) -> Array:
    """[n] -> [3n]: the float before, the value, the float after."""
    with np.errstate(all="ignore"):
        return np.stack(
            [np.nextafter(values, np.float32(-np.inf)), values, np.nextafter(values, np.float32(np.inf))], -1
        ).reshape(-1)


@functools.cache
def scales(format: str) -> Array:
    """[n] float32: ordinary scales, the edges of the effective range, and what is outside of it (C4)."""
    f = formats.get(format)
    ordinary = np.array([1, 0.1, 2.0**-7, math.pi / 127, SCALE_MIN, min(2.0**120, f.scale_max)], np.float32)
    limits = neighbours(np.array([SCALE_MIN, f.scale_max, -SCALE_MIN, -f.scale_max], np.float32))
    special = np.array([np.nan, 0.0, -0.0, -1.0, -0.1, np.inf, -np.inf, 1e-40, -1e-40], np.float32)
    signalling = np.array([0xFF800001], np.uint32).view(np.float32)
    return _readonly(np.concatenate([ordinary, limits, special, signalling]))


def zero_points(format: str) -> tuple[int, ...]:
    """The edges of the format's range and what lies between (C12)."""
    qmin, qmax = _range(formats.get(format))
    return tuple(sorted({qmin, qmax, *(z for z in (-128, 0, 5, 127) if qmin <= z <= qmax)}))


@functools.cache
def codes(format: str) -> Array:
    """[2^bits] every code of ``format`` in its storage type; a narrow one by itself, with its sign."""
    f = formats.get(format)
    every = np.arange(1 << f.bits, dtype=np.uint32)
    if not f.whole:
        return _readonly(every.astype(np.uint8) if f.is_float or not f.signed else _signed(every, f.bits))
    return _readonly(every.astype(f.storage))


def _signed(codes: Array, bits: int) -> Array:
    sign = 1 << (bits - 1)
    return ((codes ^ sign).astype(np.int32) - sign).astype(np.int8)


def _range(f: Format) -> tuple[int, int]:
    if not isinstance(f, IntFormat):
        raise ValueError(f"format must be an integer format, got {f.name}")
    return f.range(affine=True)


def _readonly(values: Array) -> Array:
    values.setflags(write=False)
    return values


@functools.cache
def ranges() -> Array:
    """[M, 3] whose rows have every kind of range."""
    every = edges()[::7]
    with np.errstate(all="ignore"):
        return np.stack([every, np.roll(every, 1) * np.float32(2**-9), every * np.float32(0.4)], -1)


def few_midpoints(format: str, affine: bool = False) -> Array:
    """About 2000 of :func:`midpoints`, the last one too."""
    return _thinned(midpoints(format, affine), 2000)


def few_codes(format: str) -> Array:
    """About 4000 of :func:`codes`, the last one too."""
    return _thinned(codes(format), 4000)


def _thinned(array: Array, size: int) -> Array:
    step = -(-len(array) // size)
    return array[::-1][::step][::-1]
