"""Codes that share a byte: code P j + i of a row is bits i * bits and up of byte j, P = 8 / bits.

A row of K codes takes ceil(K / P) bytes; what follows the last code is 0. ``csrc/packing.h`` is this file in C++.
"""

from __future__ import annotations

import numpy as np

from quantlib.formats import Format
from quantlib.reference.numerics import Array


def pack(codes: Array, f: Format) -> Array:
    """[..., K] codes, an integer format's with their sign, a float format's as bits -> [..., ceil(K / P)] uint8.

    Raises
    ------
    ValueError
        For a code that ``f`` does not have.
    """
    codes = np.asarray(codes)
    lowest, highest = f.code_range
    if codes.size and not (lowest <= codes.min() and codes.max() <= highest):
        got = codes.min() if codes.min() < lowest else codes.max()
        raise ValueError(f"codes of {f.name} must be in {lowest}..{highest}, got {got}")
    low_bits = (codes.astype(np.int32) & ((1 << f.bits) - 1)).astype(np.uint8)
    padded = np.zeros((*codes.shape[:-1], f.columns(codes.shape[-1]) * f.per_byte), np.uint8)
    padded[..., : codes.shape[-1]] = low_bits
    packed = np.zeros((*codes.shape[:-1], f.columns(codes.shape[-1])), np.uint8)
    for i in range(f.per_byte):
        packed |= padded[..., i :: f.per_byte] << np.uint8(i * f.bits)
    return packed


def unpack(packed: Array, f: Format, size: int) -> Array:
    """[..., ceil(size / P)] uint8 -> [..., size] codes: int8 where the format is signed, a float's bits as uint8."""
    places = np.arange(f.per_byte, dtype=np.uint8) * np.uint8(f.bits)
    codes = (packed[..., None] >> places) & np.uint8((1 << f.bits) - 1)
    codes = codes.reshape(*packed.shape[:-1], f.per_byte * packed.shape[-1])[..., :size]
    if f.is_float or not f.signed:
        return codes
    sign = 1 << (f.bits - 1)
    return ((codes ^ np.uint8(sign)).astype(np.int16) - np.int16(sign)).astype(np.int8)
