"""y[t, n] = dynamic_matmul(x[t], codes[e], scale[e])[n], e the expert that row t belongs to

Two launches: rows of x become codes, then a program finds out from the offsets which expert's rows it multiplies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch, tuning
from quantlib.backends.triton.dynamic_matmul import quantize_rows
from quantlib.backends.triton.groups import groups_of, part_of, slots_of
from quantlib.backends.triton.matmul import finish, load_scale, zero_points
from quantlib.backends.triton.scaled_matmul import sum_groups
from quantlib.backends.triton.tile import codes_at, zero_cols, zero_row
from quantlib.backends.weight import Epilogue, QuantizedWeight


@triton.jit
def grouped_scaled_matmul_kernel(
    x_ptr,  # [R, K] of row X
    x_scale_ptr,  # [R] float32
    codes_ptr,  # [E, N, K] of row F, or [E, N, ceil(K / 2)] bytes
    scale_ptr,  # [E, ceil(N / br), groups] float32
    zero_point_ptr,  # the same shape, int32, or None
    bias_ptr,  # [E, N] float32, or None
    y_ptr,  # [R, N] of row Y
    offsets_ptr,  # [E] int32
    E, R, N, K, br, bk, scale_rows, groups, stride,
    X: tl.constexpr, F: tl.constexpr, Y: tl.constexpr, ACTIVATION: tl.constexpr, MASKED: tl.constexpr,
    GROUPS: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    # 1. the expert, its rows of x from m = 0 on, and those of its weight
    across = tl.cdiv(N, T.tile_n)
    e, start, M, m_first = part_of(tl.program_id(0) // across, offsets_ptr, E, R, GROUPS, T.tile_m)
    m = (m_first + tl.arange(0, T.tile_m))[None, :]
    n = (tl.program_id(0) % across).to(tl.int64) * T.tile_n + tl.arange(0, T.tile_n)[:, None]
    rows, batch, row = n < N, m < M, start + m
    y_at = row * N + n
    if e < E:
        wide = e.to(tl.int64)
        scale_ptr += wide * scale_rows * groups
        if zero_point_ptr is not None:
            zero_point_ptr = zero_row(zero_point_ptr, wide * scale_rows, groups, F)
        if bias_ptr is not None:
            bias_ptr += wide * N
        # 2. the sums, and the scales
        at, z_at = n // br * groups, n // br * zero_cols(zero_point_ptr, groups, F)
        s_x = load_scale(x_scale_ptr + row, batch, X)
        d, total = sum_groups(
            codes_at(x_ptr, X) + row * K, zero_points(None, row, batch, X),
            codes_at(codes_ptr, F) + (wide * N + n) * stride, scale_ptr, zero_point_ptr, rows, batch, at, z_at, 0, K,
            bk, groups, X, F, False, MASKED, T,
        )  # fmt: skip
        if groups > 1:
            total = total * s_x
        else:
            total = d.to(tl.float32) * s_x * load_scale(scale_ptr + at, rows & (groups > 0), F)
        finish(total, y_ptr + y_at, bias_ptr, n, rows & batch, N, Y, ACTIVATION, ARCH)
    elif e == E:
        tl.store(y_ptr + y_at, tl.full((T.tile_n, T.tile_m), 0, y_ptr.dtype.element_ty), rows & batch)


def grouped_dynamic_matmul(
    x: torch.Tensor, weight: QuantizedWeight, offsets: torch.Tensor, epilogue: Epilogue, y: torch.Tensor
) -> None:
    """Launch with the tile that `tuning` chooses for the rows that an expert has on average: every tile is exact."""
    R, (N, K), bk, device, E = len(x), weight.shape, weight.block[1], x.device, offsets.numel()
    x_codes, x_scale = quantize_rows(x)
    tile = tuning.choose_scaled(
        (launch.cdiv(R, max(E, 1)), N, K), weight.format, bk, launch.device_name(device), launch.shared_memory(device),
        y.dtype, False,
    )  # fmt: skip
    tile, scale = launch.shown(replace(tile, splits=1)), launch.codes_of(weight.scale)
    masked = min(bk, K) % tile.tile_k > 0 or K % bk % tile.tile_k > 0
    launch.launch(
        grouped_scaled_matmul_kernel, slots_of(R, E, tile.tile_m) * launch.cdiv(N, tile.tile_n), device,
        x_codes, x_scale, weight.codes, scale, weight.zero_point, epilogue.bias, y, offsets,
        E, R, N, K, *weight.block, scale.shape[1], scale.shape[2], weight.codes.shape[2],
        formats.get("int8"), weight.format, formats.get(y.dtype), epilogue.activation, masked, groups_of(E), tile,
        launch.arch(device), warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
