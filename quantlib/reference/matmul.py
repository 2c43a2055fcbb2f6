"""Products with quantized weights, in NumPy (contract C11).

x is viewed as [M, K], a weight is codes [N, K] (several a byte where the format is packed) with a float32 scale and
maybe an int32 zero point of shape [ceil(N / br), ceil(K / bk)]. Element (n, k) stands for
w[n, k] = fl(fl32(code - zero_point) * scale), which is what ``dequantize`` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from quantlib.reference import numerics, packing
from quantlib.reference.activation import activate
from quantlib.reference.numerics import Array
from quantlib.reference.ops import Block, _float, _int, dequantize, matrix, quantize_dynamic, spread


def dequant_matmul(
    x: Array,
    codes: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    zero_point: Array | None = None,
    bias: Array | None = None,
    activation: str | None = None,
    dtype: str = "float32",
) -> Array:
    """y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), as codes of ``dtype``

    The sum is that of float64, rounded once. A backend sums in binary32, in an order of its own, and lands within
    ``2 * K * 2^-23 * sum |x| |w|`` of it; where every partial sum is exact, as with small integers times powers of
    two, it has these bytes. A sum starts at +0, so that none is -0.
    """
    rows = matrix(x)
    w = dequantize(codes, scale, format, block=block, zero_point=zero_point, size=rows.shape[1]).view(np.float32)
    with np.errstate(all="ignore"):
        total = (rows.astype(np.float64) @ w.astype(np.float64).T).astype(np.float32) + np.float32(0)
    return epilogue(total, bias, activation, dtype).reshape(*np.shape(x)[:-1], len(w))


def dequant_matmul_backward(
    dy: Array,
    codes: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    zero_point: Array | None = None,
    dtype: str = "float32",
    size: int | None = None,
) -> Array:
    """dx[m, k] = sum over n of dy[m, n] * w[n, k], as codes of ``dtype``"""
    w = dequantize(codes, scale, format, block=block, zero_point=zero_point, size=size).view(np.float32)
    with np.errstate(all="ignore"):
        total = (matrix(dy).astype(np.float64) @ w.astype(np.float64)).astype(np.float32) + np.float32(0)
    return numerics.encode_float(numerics.canonical(total), _float(dtype)).reshape(*np.shape(dy)[:-1], w.shape[1])


def dequant_matmul_backward_scale(
    dy: Array, x: Array, codes: Array, scale: Array, format: str, *, block: Block, zero_point: Array | None = None
) -> Array:
    """dscale[I, J] = sum over block (I, J) of (sum over m of dy[m, n] * x[m, k]) * decode(codes[n, k])"""
    rows = matrix(x)
    ones = np.ones_like(scale)
    unscaled = dequantize(codes, ones, format, block=block, zero_point=zero_point, size=rows.shape[1]).view(np.float32)
    with np.errstate(all="ignore"):
        terms = (matrix(dy).astype(np.float64).T @ rows.astype(np.float64)) * unscaled
        for axis, b in enumerate(block):
            if terms.shape[axis]:
                terms = np.add.reduceat(terms, np.arange(0, terms.shape[axis], b), axis)
        return numerics.canonical(terms.astype(np.float32) + np.float32(0))


def scaled_matmul(
    x_codes: Array,
    x_scale: Array,
    codes: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    x_zero_point: Array | None = None,
    zero_point: Array | None = None,
    bias: Array | None = None,
    activation: str | None = None,
    dtype: str = "float32",
) -> Array:
    """y[m, n] = activation(fl(fl(d[m, n] * x_scale[m]) * scale[n]) + bias[n]), as codes of ``dtype``

    d[m, n] is the sum over k of (x_codes[m, k] - x_zero_point[m]) * (codes[n, k] - zero_point[n]): exact, an int32,
    then rounded to binary32. Where a row of the weight has several scales, d is fl(a + fl(d_J * scale[n, J])) over
    its blocks J in ascending order, from a = +0, and only x_scale follows. ``x_scale`` has one column, and a row for
    each row of x or one for all of them; x_codes are int8 or uint8.
    """
    rows, f, x_f = matrix(x_codes), _int(format), _int(str(np.asarray(x_codes).dtype))
    K = rows.shape[1]
    q = matrix(codes) if f.whole else packing.unpack(matrix(codes), f, K)
    N = len(q)
    z = np.zeros((), np.int32) if zero_point is None else spread(zero_point, (N, K), block)
    z_x = np.zeros((), np.int32) if x_zero_point is None else x_zero_point
    w = q.astype(np.int64) - numerics.clamp_zero_point(z, f, zero_point is not None)
    a = rows.astype(np.int64) - numerics.clamp_zero_point(z_x, x_f, x_zero_point is not None)
    s_x, s = numerics.effective_scale(x_scale, x_f), numerics.effective_scale(scale, f)
    s = spread(s, (N, s.shape[1]), (block[0], 1))  # [N or 1, blocks of a row]
    with np.errstate(all="ignore"):
        if s.shape[1] == 1:
            total = (a @ w.T).astype(np.float32) * s_x * s.T
        else:
            total = np.zeros((len(rows), N), np.float32)
            for J in range(s.shape[1]):
                k = slice(J * block[1], (J + 1) * block[1])
                total = total + (a[:, k] @ w[:, k].T).astype(np.float32) * s[:, J]
            total = total * s_x
    return epilogue(total, bias, activation, dtype).reshape(*np.shape(x_codes)[:-1], N)


def dynamic_matmul(
    x: Array,
    codes: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    zero_point: Array | None = None,
    bias: Array | None = None,
    activation: str | None = None,
    dtype: str = "float32",
) -> Array:
    """scaled_matmul of the int8 codes of x, one scale a row"""
    rows = matrix(x)
    x_codes, x_scale = quantize_dynamic(rows, "int8", block=(1, max(rows.shape[1], 1)))
    if not rows.shape[1]:
        x_scale = np.ones((len(rows), 1), np.float32)
    y = scaled_matmul(
        x_codes,
        x_scale,
        codes,
        scale,
        format,
        block=block,
        zero_point=zero_point,
        bias=bias,
        activation=activation,
        dtype=dtype,
    )
    return y.reshape(*np.shape(x)[:-1], y.shape[1])


def grouped_dequant_matmul(x: Array, codes: Array, scale: Array, format: str, offsets: Array, **options: Any) -> Array:
    """y[t, n] = activation(sum over k of x[t, k] * w[e, n, k] + bias[e, n]), offsets[e - 1] <= t < offsets[e]

    A row from the last offset on belongs to no expert, and its y is 0. ``options`` are those of `dequant_matmul`.
    """
    return _grouped(dequant_matmul, x, codes, scale, format, offsets, codes.shape[1], options)


def grouped_dynamic_matmul(x: Array, codes: Array, scale: Array, format: str, offsets: Array, **options: Any) -> Array:
    """`dynamic_matmul` of the rows of each expert"""
    return _grouped(dynamic_matmul, x, codes, scale, format, offsets, codes.shape[1], options)


def grouped_dequant_matmul_backward(
    dy: Array, codes: Array, scale: Array, format: str, offsets: Array, *, size: int, **options: Any
) -> Array:
    """dx[t, k] = sum over n of dy[t, n] * w[e, n, k], offsets[e - 1] <= t < offsets[e]; 0 for rows of no expert"""
    return _grouped(dequant_matmul_backward, dy, codes, scale, format, offsets, size, {"size": size, **options})


def _grouped(
    op: Callable[..., Array],
    x: Array,
    codes: Array,
    scale: Array,
    format: str,
    offsets: Array,
    columns: int,
    options: dict[str, Any],
) -> Array:
    """``op`` of the rows of each expert with what is its own of the weight."""
    storage = _float(options.get("dtype", "float32")).storage
    y = np.zeros((len(x), columns), storage)
    for e, (start, end) in enumerate(zip([0, *offsets], offsets, strict=False)):
        own = {name: options[name][e] for name in ("zero_point", "bias") if options.get(name) is not None}
        y[start:end] = op(x[start:end], codes[e], scale[e], format, **{**options, **own})
    return y


def epilogue(total: Array, bias: Array | None, activation: str | None, dtype: str) -> Array:
    """[M, N] float32 sums -> codes of ``dtype``: encode(activation(fl(total + bias[n])))"""
    with np.errstate(all="ignore"):
        y = total if bias is None else total + np.asarray(bias, np.float32)
        return numerics.encode_float(activate(y, activation), _float(dtype))


def bound(x: Array, w: Array) -> Array:
    """[M, K], [N, K] -> [M, N] float64: how far binary32 may land from the exact sum, 2 K 2^-23 sum |x| |w| (C11)."""
    K = x.shape[1]
    return 2 * K * 2.0**-23 * (np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T)
