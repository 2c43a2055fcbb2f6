"""One value to one code and back, in torch: the steps of ``quantlib/reference/numerics.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantlib import formats
from quantlib.formats import FLOAT32, SCALE_MIN, FloatFormat, Format

Block = tuple[int, int]
NAN = FLOAT32.nan_code
INFINITY = 0x7F800000


def encode_float(x: Tensor, f: FloatFormat, saturate: bool) -> Tensor:
    """[...] float32 -> [...] int32 code of ``f``: nearest, ties to even, rounded once (C3)."""
    if f.is_book:
        return encode_book(x, f)
    bits = x.view(torch.int32)
    a = bits & 0x7FFFFFFF
    sign = (bits >> 31 & 1) << (f.bits - 1)
    if f.bits == 32:
        return torch.where(a > INFINITY, NAN, bits)
    shift = 23 - f.fraction_bits
    # 1. round the magnitude's bits: add just under half, and the last kept bit; a magnitude is at most 2^31 - 1, so
    #    what overflows is a NaN, which step 5 replaces
    r = a + (a >> shift & 1) + ((1 << (shift - 1)) - 1)
    # 2. move the exponent to the format's bias
    r = (r >> shift) - ((127 - f.bias) << f.fraction_bits)
    # 3. below the smallest normal: add the float whose last place is the smallest subnormal; the addition rounds
    if f.bias != 127:
        magic = torch.full((), (127 + 24 - f.bias - f.fraction_bits) << 23, dtype=torch.int32, device=x.device)
        small = (a.view(torch.float32) + magic.view(torch.float32)).view(torch.int32) - magic
        r = torch.where(a < (128 - f.bias) << 23, small, r)
    # 4. too large: the largest finite value, or what the format has beyond it
    r = torch.where(r > f.max_code, f.max_code if saturate else f.overflow_code, r)
    # 5. sign, of a zero only where there is -0; NaN last
    code = r | sign if f.has_negative_zero else torch.where(r == 0, 0, r | sign)
    return torch.where(a > INFINITY, f.nan_code, code)


def decode_float(codes: Tensor, f: FloatFormat) -> Tensor:
    """[...] code of ``f``, in its torch dtype or one a byte -> [...] float32, exact; NaN becomes 0x7FFFFFFF."""
    if f.bits == 32:
        return codes
    if f.is_book:
        return torch.tensor(f.values, dtype=torch.float32, device=codes.device)[codes.int() & f.max_code]
    code = (codes.view(torch.int16) if f.bits == 16 else codes.view(torch.uint8)).int() & ((1 << f.bits) - 1)
    a = code & (f.sign_bit - 1)
    # 1. normal: fraction and exponent move up, the exponent to FP32's bias
    bits = (a << (23 - f.fraction_bits)) + ((127 - f.bias) << 23)
    # 2. subnormal: a count of smallest subnormals
    if f.bias != 127:
        subnormal = (a.float() * 2.0 ** (1 - f.bias - f.fraction_bits)).view(torch.int32)
        bits = torch.where(a < 1 << f.fraction_bits, subnormal, bits)
    # 3. infinity, sign, NaN
    if f.has_inf:
        bits = torch.where(a == f.overflow_code, INFINITY, bits)
    bits = bits | code >> (f.bits - 1) << 31
    if f.has_nan:
        is_nan = a > f.max_code + f.has_inf if f.has_negative_zero else code == f.nan_code
        bits = torch.where(is_nan, NAN, bits)
    return bits.view(torch.float32)


def encode_book(x: Tensor, f: FloatFormat) -> Tensor:
    """[...] float32 -> [...] int32 code of the nearest value of a code book; at a midpoint, of the lower (C6)."""
    # 1. the midpoints below x
    midpoints = torch.tensor(f.midpoints, dtype=torch.float32, device=x.device)
    code = torch.bucketize(x, midpoints, out_int32=True)
    # 2. NaN is the largest value
    return torch.where(x == x, code, f.nan_code)


def effective_scale(s: Tensor, f: Format) -> Tensor:
    """[...] of any float dtype -> float32, |s| clamped to [2^-100, scale_max] with the sign of s; NaN stays (C4)."""
    s = s.float()
    clamped = s.abs().clamp(SCALE_MIN, f.scale_max)
    return canonical(torch.where(s < 0, -clamped, clamped))


def canonical(x: Tensor) -> Tensor:
    return torch.where(x == x, x.view(torch.int32), NAN).view(torch.float32)


def float_format(dtype: torch.dtype) -> FloatFormat:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    return f


def constant(x: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=x.device)


def float_codes(code: Tensor, f: FloatFormat) -> Tensor:
    """int32 codes of ``f`` as :func:`decode_float` takes them."""
    return code.to(torch.int16 if f.bits == 16 else torch.uint8)


def store(out: Tensor, code: Tensor) -> None:
    """The low bits of an int32 code, in out's own type."""
    integer = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[out.element_size()]
    out.view(integer).copy_(code.to(integer))


def spread(values: Tensor, M: int, K: int, block: Block) -> Tensor:
    """[ceil(M / br), ceil(K / bk)] -> values[i // br, j // bk], of size 1 where an axis has a single block."""
    for axis, (size, b) in enumerate(zip((M, K), block, strict=True)):
        if values.shape[axis] > 1 and b > 1:
            values = values.repeat_interleave(b, axis).narrow(axis, 0, size)
    return values


def reduce_blocks(x: Tensor, block: Block, reduce: Callable[..., Tensor]) -> Tensor:
    """[M, K] -> [ceil(M / br), ceil(K / bk)]: the extreme of each block; ragged tails are padded with zeros."""
    (M, K), (br, bk) = x.shape, block
    x = torch.nn.functional.pad(x, (0, -K % bk, 0, -M % br))
    return reduce(x.unflatten(1, (-1, bk)).unflatten(0, (-1, br)), (1, 3))
