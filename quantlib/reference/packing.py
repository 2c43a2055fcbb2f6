"""Codes of four bits, two a byte: element 2j in the low nibble of byte j, element 2j + 1 in the high one.

A row of K codes takes ceil(K / 2) bytes; the nibble past an odd K is 0. ``csrc/packing.h`` is this file in C++.
"""

from __future__ import annotations

import numpy as np

from quantlib.formats import FloatFormat, Format
from quantlib.reference.numerics import Array


def packed_size(size: int) -> int:
    """Bytes of a row of ``size`` codes."""
    return (size + 1) // 2


def pack(codes: Array, f: Format) -> Array:
    """[..., K] codes, int4's in -8..7 and a float format's in 0..15 -> [..., ceil(K / 2)] uint8.

    Raises
    ------
    ValueError
        For a code that ``f`` does not have.
    """
    codes = np.asarray(codes)
    lowest, highest = (0, 15) if isinstance(f, FloatFormat) else f.range(affine=True)
    if codes.size and not (lowest <= codes.min() and codes.max() <= highest):
        got = codes.min() if codes.min() < lowest else codes.max()
        raise ValueError(f"codes of {f.name} must be in {lowest}..{highest}, got {got}")
    nibbles = (codes.astype(np.int32) & 15).astype(np.uint8)
    if codes.shape[-1] % 2:
        nibbles = np.concatenate([nibbles, np.zeros((*codes.shape[:-1], 1), np.uint8)], -1)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack(packed: Array, f: Format, size: int) -> Array:
    """[..., ceil(size / 2)] uint8 -> [..., size]: int4's codes as int8, sign spread; a float format's as uint8."""
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., :size]
    return nibbles if f.is_float else ((nibbles ^ 8).astype(np.int8) - np.int8(8))
