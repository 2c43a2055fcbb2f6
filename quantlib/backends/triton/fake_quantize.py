"""y[i, j] = c[i, j] * scale[i // br, j // bk], c the value of x's code in units of the scale (C10)"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.numerics import (
    INTEGER,
    NAN,
    decode_float,
    effective_scale,
    encode_product,
    float_of,
    nearest_value,
    reciprocal,
)
from quantlib.backends.triton.tile import block_cols, block_rows, codes_at, load, place, spread, store
from quantlib.formats import Format


@triton.jit
def nearest(t):
    """[...] float32, |t| < 2^22 -> [...] float32, ties to even; its zero is +0"""
    return (t + INTEGER) - INTEGER


@triton.jit
def shared(scale_ptr, zero_point_ptr, at, exists, F: tl.constexpr, AFFINE: tl.constexpr, Q: tl.constexpr):
    """Effective scale and zero point of blocks: the zero point is a code, 0 where it is NaN."""
    s = effective_scale(tl.load(scale_ptr + at, exists, 1.0), F)
    if AFFINE:
        z = tl.load(zero_point_ptr + at, exists, 0.0)
        z = nearest(tl.minimum(tl.maximum(tl.where(z == z, z, 0.0), Q[0]), Q[1]))
    else:
        z = s * 0.0
    return s, z


@triton.jit
def clamped(t, z, AFFINE: tl.constexpr, Q: tl.constexpr):
    """t within the codes less the zero point"""
    if AFFINE:
        return tl.minimum(tl.maximum(t, Q[0] - z), Q[1] - z)
    else:
        return tl.minimum(tl.maximum(t, Q[0]), Q[1])


@triton.jit
def fake_quantize_tile(
    x_ptr, y_ptr, scale_ptr, zero_point_ptr, here, sizes,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    rows, cols, block_i, block_j, edge = here
    M, K, scale_cols = sizes
    i, j = tl.arange(0, T.rows)[:, None], tl.arange(0, T.cols)[None, :]
    x = load(x_ptr + i.to(tl.int64) * K + j, (i < rows) & (j < cols), MASKED)
    at, exists = block_i * scale_cols + block_j, (block_i < M) & (block_j < scale_cols)
    s, z = shared(scale_ptr, zero_point_ptr, at, exists, F, AFFINE, Q)
    t = decode_float(x, X, ARCH) * spread(reciprocal(s), edge, T)
    c = nearest_value(t, F, ARCH) if F.is_float else nearest(clamped(t, spread(z, edge, T) if AFFINE else z, AFFINE, Q))
    y = tl.where(t == t, c * spread(s, edge, T), float_of(tl.full(t.shape, NAN, tl.uint32)))
    store(y_ptr + i.to(tl.int64) * K + j, encode_product(y, X, ARCH), (i < rows) & (j < cols), MASKED)


@triton.jit
def fake_quantize_kernel(
    x_ptr,  # [M, K] of row X
    scale_ptr,  # [ceil(M / br), ceil(K / bk)] float32
    zero_point_ptr,  # the same shape, or None
    y_ptr,  # [M, K] of row X
    M, K, br, bk, scale_cols,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, Q: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = place(K, T)
    i, rows, block_i = block_rows(row_tile, M, br, T)
    j, cols, block_j, edge = block_cols(col_tile, K, bk, T)
    x_ptr, y_ptr = codes_at(x_ptr, X) + (i * K + j), codes_at(y_ptr, X) + (i * K + j)
    here, sizes = (rows, cols, block_i, block_j, edge), (M, K, scale_cols)
    if rows >= T.rows and cols >= T.cols:
        fake_quantize_tile(x_ptr, y_ptr, scale_ptr, zero_point_ptr, here, sizes, X, F, AFFINE, Q, T, ARCH, False)
    else:
        fake_quantize_tile(x_ptr, y_ptr, scale_ptr, zero_point_ptr, here, sizes, X, F, AFFINE, Q, T, ARCH, True)


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    format: Format,
    block: launch.Shape,
    zero_point: torch.Tensor | None,
    limits: tuple[int, int],
    out: torch.Tensor,
) -> None:
    shape, block = launch.flatten((x.shape[0], x.shape[1]), block, formats.FLOAT32)
    tile = launch.choose_tile(shape, block, formats.FLOAT32)
    launch.launch(
        fake_quantize_kernel, launch.tiles(shape, block, tile), x.device,
        x, scale, zero_point, out, *shape, *block, launch.cdiv(shape[1], block[1]),
        formats.get(x.dtype), format, zero_point is not None, limits, tile, launch.arch(x.device),
        warps=tile.warps,
    )  # fmt: skip
