"""codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.numerics import decode_float, encode, reciprocal
from quantlib.backends.triton.tile import (
    at_bytes,
    block_cols,
    block_rows,
    block_scale,
    codes_at,
    load,
    pack,
    place,
    spread,
    store,
)
from quantlib.formats import Format


@triton.jit
def quantize_tile(
    x_ptr, codes_ptr, scale_ptr, zero_point_ptr, here, sizes,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rows, cols, block_i, block_j, edge = here
    M, K, scale_cols, codes_stride = sizes
    i, j = tl.arange(0, T.rows)[:, None], tl.arange(0, T.cols)[None, :]
    x = load(x_ptr + i.to(tl.int64) * K + j, (i < rows) & (j < cols), MASKED)
    s_eff, z = block_scale(scale_ptr, zero_point_ptr, block_i, block_j, M, scale_cols, F, AFFINE)
    t = decode_float(x, X, ARCH) * spread(reciprocal(s_eff), edge, T)
    codes = encode(t, spread(z, edge, T) if AFFINE else z, F, AFFINE, ARCH)
    codes_ptr += i.to(tl.int64) * codes_stride
    if not F.whole:
        if MASKED:  # the bits after the last code of a byte are 0
            codes = tl.where(j < cols, codes, 0)
        codes = pack(codes, F, ARCH)
        j, cols = tl.arange(0, T.cols // F.per_byte)[None, :], (cols + F.per_byte - 1) // F.per_byte
        store(at_bytes(codes_ptr, j, X, F), codes, (i < rows) & (j < cols), MASKED)
    else:
        store(codes_ptr + j, codes, (i < rows) & (j < cols), MASKED)


@triton.jit
def quantize_kernel(
    x_ptr,  # [M, K] of row X
    scale_ptr,  # [ceil(M / br), ceil(K / bk)] float32
    zero_point_ptr,  # the same shape, int32, or None
    codes_ptr,  # [M, K] of row F, or [M, ceil(K / P)] bytes
    M, K, br, bk, scale_cols, codes_stride,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = place(K, T)
    i, rows, block_i = block_rows(row_tile, M, br, T)
    j, cols, block_j, edge = block_cols(col_tile, K, bk, T)
    x_ptr = codes_at(x_ptr, X) + i * K + j
    codes_ptr = codes_at(codes_ptr, F) + i * codes_stride + j // F.per_byte
    here, sizes = (rows, cols, block_i, block_j, edge), (M, K, scale_cols, codes_stride)
    if rows >= T.rows and cols >= T.cols:
        quantize_tile(x_ptr, codes_ptr, scale_ptr, zero_point_ptr, here, sizes, X, F, AFFINE, T, ARCH, False)
    else:
        quantize_tile(x_ptr, codes_ptr, scale_ptr, zero_point_ptr, here, sizes, X, F, AFFINE, T, ARCH, True)


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    format: Format,
    block: launch.Shape,
    zero_point: torch.Tensor | None,
    codes: torch.Tensor,
) -> None:
    shape, block = launch.flatten((x.shape[0], x.shape[1]), block, format)
    tile = launch.choose_tile(shape, block, format, x.dtype.itemsize)
    launch.launch(
        quantize_kernel, launch.tiles(shape, block, tile), x.device,
        x, scale, zero_point, launch.codes_of(codes), *shape, *block, launch.cdiv(shape[1], block[1]), codes.shape[1],
        formats.get(x.dtype), format, zero_point is not None, tile, launch.arch(x.device),
        warps=tile.warps,
    )  # fmt: skip
