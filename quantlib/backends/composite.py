"""Every op in pure torch: any device, no compiler, no Triton. The steps of ``quantlib/reference/numerics.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantlib import formats
from quantlib.formats import FLOAT32, SCALE_MIN, FloatFormat, Format, IntFormat

Block = tuple[int, int]
NAN = FLOAT32.nan_code
INFINITY = 0x7F800000


def refuses(device: torch.device) -> str | None:
    """Nothing: pure torch runs wherever torch runs."""
    return None


def cast(x: Tensor, x_format: FloatFormat, out: Tensor, out_format: FloatFormat, saturate: bool) -> None:
    """out[n] = encode(decode(x[n]))"""
    _store(out, encode_float(decode_float(x, x_format), out_format, saturate))


def compute_scale(x: Tensor, format: Format, block: Block, scale: Tensor, zero_point: Tensor | None) -> None:
    """scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), or the affine scale and zero point of its range"""
    x = x.float()
    amax = _reduce_blocks(x.view(torch.int32) & 0x7FFFFFFF, block, torch.amax)
    if zero_point is None:
        scale.copy_(effective_scale(amax.view(torch.float32) / _like(amax, format.max), format))
        return
    assert isinstance(format, IntFormat)
    is_nan = amax > INFINITY
    finite = torch.where(x == x, x, 0)
    qmin, qmax = format.range(affine=True)
    # 1. widen to hold zero, so that zero has a code: the padding of _reduce_blocks is zero too
    lowest = torch.where(is_nan, torch.nan, _reduce_blocks(finite, block, torch.amin).clamp(max=0))
    highest = torch.where(is_nan, torch.nan, _reduce_blocks(finite, block, torch.amax).clamp(min=0))
    # 2. scale; an infinite range gives the largest
    s = effective_scale((highest - lowest) / _like(lowest, qmax - qmin), format)
    # 3. zero point: the code of zero when the lowest value has code qmin; 0 where the scale is NaN
    z = qmin - lowest * s.reciprocal()
    zero_point.copy_(torch.where(z == z, z, 0).clamp(qmin, qmax).round().int())
    scale.copy_(s)


def quantize(x: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None, codes: Tensor) -> None:
    """codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])"""
    M, K = x.shape
    t = x.float() * _spread(effective_scale(scale, format).reciprocal(), M, K, block)
    if isinstance(format, FloatFormat):
        code = encode_float(t, format, saturate=True)
    else:
        affine = zero_point is not None
        qmin, qmax = format.range(affine)
        z = _spread(zero_point.clamp(qmin, qmax), M, K, block) if zero_point is not None else _like(scale, 0).int()
        # 1. NaN is the code of zero  2. clamp first, to integers  3. round to nearest even, add the zero point
        t = torch.where(t == t, t, 0)
        code = torch.minimum(torch.maximum(t, (qmin - z).float()), (qmax - z).float()).round().int() + z
    _store(codes, _pack(code) if format.packed else code)


def dequantize(
    codes: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None, out: Tensor
) -> None:
    """out[i, j] = decode(codes[i, j]) * scale[i // br, j // bk]"""
    M, K = out.shape
    if format.packed:
        codes = _unpack(codes, K)
    s_eff = _spread(effective_scale(scale, format), M, K, block)
    if isinstance(format, FloatFormat):
        y = decode_float(codes, format) * s_eff
    else:
        code = codes.int()
        if format.packed:
            code = (code ^ 8) - 8
        if zero_point is not None:
            code = code - _spread(zero_point.clamp(*format.range(affine=True)), M, K, block)
        y = code.float() * s_eff
    y = _canonical(y)
    if out.dtype == torch.float32:
        out.copy_(y)
    else:
        _store(out, encode_float(y, _float(out.dtype), saturate=False))


def quantize_dynamic(
    x: Tensor, format: Format, block: Block, codes: Tensor, scale: Tensor, zero_point: Tensor | None
) -> None:
    """scale = compute_scale(x), codes = quantize(x, scale)"""
    compute_scale(x, format, block, scale, zero_point)
    quantize(x, scale, format, block, zero_point, codes)


KERNELS = {
    "cast": cast,
    "compute_scale": compute_scale,
    "quantize": quantize,
    "dequantize": dequantize,
    "quantize_dynamic": quantize_dynamic,
}


def encode_float(x: Tensor, f: FloatFormat, saturate: bool) -> Tensor:
    """[...] float32 -> [...] int32 code of ``f``: nearest, ties to even, rounded once (C3)."""
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
    # 5. sign; NaN last
    return torch.where(a > INFINITY, f.nan_code, r | sign)


def decode_float(codes: Tensor, f: FloatFormat) -> Tensor:
    """[...] code of ``f``, in its torch dtype or as nibbles -> [...] float32, exact; NaN becomes 0x7FFFFFFF."""
    if f.bits == 32:
        return codes
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
        bits = torch.where(a > f.overflow_code if f.has_inf else a == f.nan_code, NAN, bits)
    return bits.view(torch.float32)


def effective_scale(s: Tensor, f: Format) -> Tensor:
    """[...] float32 -> s clamped to [2^-100, scale_max]; s <= 0 becomes 2^-100, NaN stays (C4)."""
    return _canonical(s.clamp(SCALE_MIN, f.scale_max))


def _canonical(x: Tensor) -> Tensor:
    return torch.where(x == x, x.view(torch.int32), NAN).view(torch.float32)


def _float(dtype: torch.dtype) -> FloatFormat:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    return f


def _like(x: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=x.device)


def _store(out: Tensor, code: Tensor) -> None:
    """The low bits of an int32 code, in out's own type."""
    integer = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[out.element_size()]
    out.view(integer).copy_(code.to(integer))


def _pack(code: Tensor) -> Tensor:
    """[M, K] -> [M, ceil(K / 2)]: element 2j in the low nibble of byte j."""
    code = torch.nn.functional.pad(code & 15, (0, code.shape[-1] % 2))
    return code[..., 0::2] | code[..., 1::2] << 4


def _unpack(codes: Tensor, K: int) -> Tensor:
    """[M, ceil(K / 2)] uint8 -> [M, K] uint8 nibbles."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :K]


def _spread(values: Tensor, M: int, K: int, block: Block) -> Tensor:
    """[ceil(M / br), ceil(K / bk)] -> values[i // br, j // bk], of size 1 where an axis has a single block."""
    for axis, (size, b) in enumerate(zip((M, K), block, strict=True)):
        if values.shape[axis] > 1 and b > 1:
            values = values.repeat_interleave(b, axis).narrow(axis, 0, size)
    return values


def _reduce_blocks(x: Tensor, block: Block, reduce: Callable[..., Tensor]) -> Tensor:
    """[M, K] -> [ceil(M / br), ceil(K / bk)]: the extreme of each block; ragged tails are padded with zeros."""
    (M, K), (br, bk) = x.shape, block
    x = torch.nn.functional.pad(x, (0, -K % bk, 0, -M % br))
    return reduce(x.unflatten(1, (-1, bk)).unflatten(0, (-1, br)), (1, 3))
