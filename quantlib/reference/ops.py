"""The numeric meaning of every op, in NumPy, on one page (contract C3-C7, C14).

An n-D x is viewed as [M, K] = [product of the leading sizes, last size]; element (i, j) uses
``scale[i // br, j // bk]`` of a float32 scale of shape [ceil(M / br), ceil(K / bk)]. ``x`` is float32: a narrower
input is decoded first, which is exact. Codes are integers of the format's storage type, packed where it is packed.
"""

from __future__ import annotations

import numpy as np

from quantlib import formats
from quantlib.formats import FloatFormat, IntFormat
from quantlib.reference import numerics, packing
from quantlib.reference.numerics import Array

__all__ = ["cast", "compute_scale", "dequantize", "dequantize_rows", "hadamard", "quantize", "quantize_dynamic"]

Block = tuple[int, int]


def cast(x: Array, format: str, *, saturate: bool | None = None) -> Array:
    """codes[...] = encode(x[...])"""
    with np.errstate(all="ignore"):
        return numerics.encode_float(x, _float(format), saturate)


def compute_scale(x: Array, format: str, block: Block, *, symmetric: bool = True) -> Array | tuple[Array, Array]:
    """scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), or the affine (scale, zero_point) of its range"""
    f, rows = formats.get(format), matrix(x)
    with np.errstate(all="ignore"):
        a = numerics.magnitude_bits(rows)
        if symmetric:
            return numerics.symmetric_scale(reduce_blocks(np.maximum, a, block), f)
        is_nan = reduce_blocks(np.maximum, a, block) > numerics.INFINITY_BITS
        lowest, highest = (reduce_blocks(extreme, rows, block) for extreme in (np.fmin, np.fmax))
        lowest, highest = (np.where(is_nan, numerics.NAN, bound) for bound in (lowest, highest))
        return numerics.affine_scale(lowest, highest, _int(format))


def quantize(x: Array, scale: Array, format: str, *, block: Block, zero_point: Array | None = None) -> Array:
    """codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])"""
    f, rows = formats.get(format), matrix(x)
    with np.errstate(all="ignore"):
        t = numerics.project(rows, spread(numerics.effective_scale(scale, f), rows.shape, block))
        if isinstance(f, FloatFormat):
            codes = numerics.encode_float(t, f, saturate=True)
        else:
            z = np.array(0) if zero_point is None else spread(zero_point, rows.shape, block)
            codes = numerics.encode_int(t, z, f, zero_point is not None)
    if not f.whole:
        shape = (*x.shape[:-1], f.columns(rows.shape[1])) if f.packed else x.shape
        return packing.pack(codes, f).reshape(shape)
    return codes.astype(f.storage).reshape(x.shape)


def dequantize(
    codes: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    zero_point: Array | None = None,
    dtype: str = "float32",
    size: int | None = None,
) -> Array:
    """y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk], as codes of ``dtype``"""
    f, rows = formats.get(format), matrix(codes)
    shape = codes.shape
    if not f.whole:
        K = f.sizes(rows.shape[1])[-1] if size is None else size
        rows = packing.unpack(rows, f, K)
        shape = (*codes.shape[:-1], K) if f.packed else shape
    with np.errstate(all="ignore"):
        s_eff = spread(numerics.effective_scale(scale, f), rows.shape, block)
        if isinstance(f, FloatFormat):
            y = numerics.canonical(numerics.decode_float(rows, f) * s_eff)
        else:
            z = np.array(0) if zero_point is None else spread(zero_point, rows.shape, block)
            y = numerics.decode_int(rows, s_eff, z, f, zero_point is not None)
        return numerics.encode_float(y, _float(dtype)).reshape(shape)


def dequantize_rows(
    indices: Array,
    codes: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    zero_point: Array | None = None,
    dtype: str = "float32",
    size: int | None = None,
) -> Array:
    """y[..., j] = decode(codes[i, j]) * scale[i // br, j // bk], i = indices[...], as codes of ``dtype``"""
    y = dequantize(codes, scale, format, block=block, zero_point=zero_point, dtype=dtype, size=size)
    return y[indices]


def quantize_dynamic(x: Array, format: str, *, block: Block, symmetric: bool = True) -> tuple[Array, ...]:
    """scale = compute_scale(x), codes = quantize(x, scale): (codes, scale) or (codes, scale, zero_point)"""
    result = compute_scale(x, format, block, symmetric=symmetric)
    if isinstance(result, tuple):
        scale, zero_point = result
        return quantize(x, scale, format, block=block, zero_point=zero_point), scale, zero_point
    return quantize(x, result, format, block=block), result


def hadamard(x: Array, block: int, dtype: str = "float32") -> Array:
    """y[..., b n + i] = sum over j of (-1)^(bits that i and j share) x[..., b n + j] / sqrt(n), n the block"""
    y, h = np.asarray(x, np.float32), 1
    with np.errstate(all="ignore"):
        while h < block:
            pairs = y.reshape(-1, 2, h)
            a, b = pairs[:, 0], pairs[:, 1]
            y, h = np.stack([a + b, a - b], 1), 2 * h
        y = y.reshape(np.shape(x)) * np.float32(block**-0.5)
        return numerics.encode_float(y, _float(dtype))


def matrix(x: Array) -> Array:
    """[..., K] -> [M, K]; a 0-d array is [1, 1]."""
    x = np.asarray(x)
    if x.ndim == 0:
        return x.reshape(1, 1)
    K = x.shape[-1]
    return x.reshape(int(np.prod(x.shape[:-1], dtype=np.int64)), K)


def spread(values: Array, shape: tuple[int, int], block: Block) -> Array:
    """[ceil(M / br), ceil(K / bk)] -> [M, K]: values[i // br, j // bk]; an axis of one block stays 1 and broadcasts."""
    for axis, (size, b) in enumerate(zip(shape, block, strict=True)):
        if b < size:
            values = np.take(values, np.arange(size) // b, axis)
    return values


def reduce_blocks(reduce: np.ufunc, x: Array, block: Block) -> Array:
    """[M, K] -> [ceil(M / br), ceil(K / bk)]: the reduction of each block."""
    for axis, (size, b) in enumerate(zip(x.shape, block, strict=True)):
        if size:
            x = reduce.reduceat(x, np.arange(0, size, b), axis)
    return x


def _float(format: str) -> FloatFormat:
    f = formats.get(format)
    if not isinstance(f, FloatFormat):
        raise ValueError(f"format must be a float format, got {f.name}")
    return f


def _int(format: str) -> IntFormat:
    f = formats.get(format)
    if not isinstance(f, IntFormat):
        raise ValueError(f"format must be an integer format for an affine scale, got {f.name}")
    return f
