"""Codes that share a byte, in torch: code P j + i of a row is bits i * bits and up of byte j, P = 8 / bits.

``quantlib/reference/packing.py`` in another language.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.formats import Format


def pack(codes: Tensor, f: Format) -> Tensor:
    """[..., K] codes of an integer dtype, of which the low bits count -> [..., ceil(K / P)] uint8, 0 past the end."""
    codes = codes.to(torch.uint8) & ((1 << f.bits) - 1)
    if not f.packed:
        return codes
    K = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, f.columns(K) * f.per_byte - K))
    packed = codes[..., 0 :: f.per_byte]
    for i in range(1, f.per_byte):
        packed = packed | codes[..., i :: f.per_byte] << (i * f.bits)
    return packed


def unpack(packed: Tensor, f: Format, K: int) -> Tensor:
    """[..., ceil(K / P)] uint8 -> [..., K] codes: int8 where the format is signed, a float's bits as uint8."""
    mask = (1 << f.bits) - 1
    places = [packed & mask, *(packed >> (i * f.bits) & mask for i in range(1, f.per_byte))]
    codes = torch.stack(places, -1).flatten(-2)[..., :K]
    return spread_sign(codes, f)


def wide_zero_points(zero_point: Tensor, f: Format, K: int) -> Tensor:
    """Zero points [..., K] as int32: as they are, or kept as codes of ``f`` are, [..., ceil(K / P)]."""
    if zero_point.dtype == torch.int32:
        return zero_point
    return (zero_point if f.whole else unpack(zero_point, f, K)).to(torch.int32)


def kept_zero_points(zero_point: Tensor, f: Format) -> Tensor:
    """int32 zero points [..., K] as codes of ``f``, kept as its codes are; one outside is the nearest."""
    zero_point = zero_point.clamp(*f.code_range)
    return zero_point.to(getattr(torch, f.dtype_name)) if f.whole else pack(zero_point, f)


def spread_sign(codes: Tensor, f: Format) -> Tensor:
    """The low bits of codes as uint8 -> codes, with their sign where ``f`` is a signed integer format."""
    if f.is_float or not f.signed:
        return codes
    sign = 1 << (f.bits - 1)
    return (codes ^ sign).to(torch.int8) - sign
