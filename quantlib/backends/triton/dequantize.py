"""y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk]"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.packing import wide_zero_points
from quantlib.backends.triton import launch
from quantlib.backends.triton.numerics import decode, encode_product, int_to_float, product
from quantlib.backends.triton.tile import (
    at_bytes,
    block_cols,
    block_rows,
    block_scale,
    codes_at,
    load,
    place,
    spread,
    store,
    unpack_values,
)
from quantlib.backends.weight import QuantizedWeight


@triton.jit
def dequantize_tile(
    codes_ptr, y_ptr, scale_ptr, zero_point_ptr, here, sizes,
    F: tl.constexpr, Y: tl.constexpr, AFFINE: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    rows, cols, block_i, block_j, edge = here
    M, K, scale_cols, codes_stride = sizes
    i, j = tl.arange(0, T.rows)[:, None], tl.arange(0, T.cols)[None, :]
    codes_ptr += i.to(tl.int64) * codes_stride
    s_eff, z = block_scale(scale_ptr, zero_point_ptr, block_i, block_j, M, scale_cols, F, AFFINE)
    s_eff, z = spread(s_eff, edge, T), spread(z, edge, T) if AFFINE else z
    if not F.whole:
        byte = tl.arange(0, T.cols // F.per_byte)[None, :]
        ptr = at_bytes(codes_ptr, byte, Y, F)
        q = unpack_values(load(ptr, (i < rows) & (byte * F.per_byte < cols), MASKED), F, ARCH)
        y = product(q - int_to_float(z) if AFFINE else q, s_eff, ARCH)
    else:
        y = decode(load(at_bytes(codes_ptr, j, Y, F), (i < rows) & (j < cols), MASKED), s_eff, z, F, AFFINE, ARCH)
    y = encode_product(y, Y, ARCH)
    store(y_ptr + i.to(tl.int64) * K + j, y, (i < rows) & (j < cols), MASKED)


@triton.jit
def dequantize_kernel(
    codes_ptr,  # [M, K] of row F, or [M, ceil(K / P)] bytes
    scale_ptr,  # [ceil(M / br), ceil(K / bk)] float32
    zero_point_ptr,  # the same shape, int32, or None
    y_ptr,  # [M, K] of row Y
    M, K, br, bk, scale_cols, codes_stride,
    F: tl.constexpr, Y: tl.constexpr, AFFINE: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = place(K, T)
    i, rows, block_i = block_rows(row_tile, M, br, T)
    j, cols, block_j, edge = block_cols(col_tile, K, bk, T)
    codes_ptr = codes_at(codes_ptr, F) + i * codes_stride + j // F.per_byte
    y_ptr = codes_at(y_ptr, Y) + i * K + j
    here, sizes = (rows, cols, block_i, block_j, edge), (M, K, scale_cols, codes_stride)
    if rows >= T.rows and cols >= T.cols:
        dequantize_tile(codes_ptr, y_ptr, scale_ptr, zero_point_ptr, here, sizes, F, Y, AFFINE, T, ARCH, False)
    else:
        dequantize_tile(codes_ptr, y_ptr, scale_ptr, zero_point_ptr, here, sizes, F, Y, AFFINE, T, ARCH, True)


def dequantize(weight: QuantizedWeight, out: torch.Tensor) -> None:
    codes, format, zero_point = launch.codes_of(weight.codes), weight.format, weight.zero_point
    if zero_point is not None:  # a row of codes may be a part of a longer one
        zero_point = wide_zero_points(zero_point, format, weight.scale.shape[1])
    shape, block = launch.flatten(weight.shape, weight.block, format)
    tile = launch.choose_tile(shape, block, format, out.dtype.itemsize)
    launch.launch(
        dequantize_kernel, launch.tiles(shape, block, tile), out.device,
        codes, launch.codes_of(weight.scale), zero_point, out, *shape, *block, launch.cdiv(shape[1], block[1]),
        codes.shape[1], format, formats.get(out.dtype), zero_point is not None, tile, launch.arch(out.device),
        warps=tile.warps,
    )  # fmt: skip
