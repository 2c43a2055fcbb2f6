"""y[r, j] = decode(codes[i, j]) * scale[i // br, j // bk], i = indices[r]"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.packing import wide_zero_points
from quantlib.backends.triton import launch
from quantlib.backends.triton.dequantize import dequantize_tile
from quantlib.backends.triton.tile import block_cols, codes_at, place
from quantlib.backends.weight import QuantizedWeight


@triton.jit
def dequantize_rows_kernel(
    indices_ptr,  # [R] int64 or int32
    codes_ptr,  # [N, K] of row F, or [N, ceil(K / P)] bytes
    scale_ptr,  # [ceil(N / br), ceil(K / bk)] float32
    zero_point_ptr,  # the same shape, int32, or None
    y_ptr,  # [R, K] of row Y
    N, K, br, bk, scale_cols, codes_stride,
    F: tl.constexpr, Y: tl.constexpr, AFFINE: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    r, col_tile = place(K, T)
    i = tl.minimum(tl.maximum(tl.load(indices_ptr + r).to(tl.int64), 0), N - 1)
    j, cols, block_j, edge = block_cols(col_tile, K, bk, T)
    codes_ptr = codes_at(codes_ptr, F) + i * codes_stride + j // F.per_byte
    y_ptr = codes_at(y_ptr, Y) + r.to(tl.int64) * K + j
    block_i = tl.full((1, 1), 0, tl.int64) + i // br
    here, sizes = (1, cols, block_i, block_j, edge), (N, K, scale_cols, codes_stride)
    if cols >= T.cols:
        dequantize_tile(codes_ptr, y_ptr, scale_ptr, zero_point_ptr, here, sizes, F, Y, AFFINE, T, ARCH, False)
    else:
        dequantize_tile(codes_ptr, y_ptr, scale_ptr, zero_point_ptr, here, sizes, F, Y, AFFINE, T, ARCH, True)


def dequantize_rows(indices: torch.Tensor, weight: QuantizedWeight, out: torch.Tensor) -> None:
    codes, format, zero_point = launch.codes_of(weight.codes), weight.format, weight.zero_point
    (N, K), (br, bk), R = weight.shape, weight.block, len(indices)
    if zero_point is not None:  # a row of codes may be a part of a longer one
        zero_point = wide_zero_points(zero_point, format, weight.scale.shape[1])
    tile = dataclasses.replace(launch.choose_tile((R, K), (1, bk), format, out.dtype.itemsize), rows=1, flat=False)
    tile = launch.shown(dataclasses.replace(tile, warps=min(tile.warps, max(1, tile.cols // 512))))
    launch.launch(
        dequantize_rows_kernel, R * launch.cdiv(K, tile.cols), out.device,
        indices, codes, launch.codes_of(weight.scale), zero_point, out, N, K, br, bk, launch.cdiv(K, bk),
        codes.shape[1], format, formats.get(out.dtype), zero_point is not None, tile, launch.arch(out.device),
        warps=tile.warps,
    )  # fmt: skip
