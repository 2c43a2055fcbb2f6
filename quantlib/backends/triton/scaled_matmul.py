"""y[m, n] = activation(fl(fl(d[m, n] * x_scale[m]) * scale[n]) + bias[n]), d the exact integer product of the codes

Codes are multiplied as signed bytes q; of (q_x - z_x) * (q_w - z_w) the three terms with a zero point follow from the
sums of a row, exact in int32 as long as the whole is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.backend import Kernel
from quantlib.backends.triton import launch, tuning
from quantlib.backends.triton.descriptors import describable, multiply_described
from quantlib.backends.triton.matmul import (
    arrive,
    finish,
    load_byte,
    load_narrow,
    load_scale,
    offset,
    sum_splits,
    zero_points,
)
from quantlib.backends.triton.tile import codes_at, zero_cols
from quantlib.backends.weight import Epilogue, QuantizedWeight


@triton.jit
def sum_groups(
    x_ptr,  # [1, tile_m] where the rows of x begin
    z_x,  # [1, tile_m] their zero points
    codes_ptr,  # [tile_n, 1] where the rows of the weight begin
    scale_ptr, zero_point_ptr, rows, batch, at, z_at, split, K, bk, groups,
    X: tl.constexpr, F: tl.constexpr, X_SHIFTED: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return the exact sum of the last group, and the sum over all groups, times their scales, where there are many."""
    SPLITS: tl.constexpr = T.splits
    W_SHIFTED: tl.constexpr = zero_point_ptr is not None or offset(F) > 0
    total = tl.full((T.tile_n, T.tile_m), 0.0, tl.float32)
    d = tl.full((T.tile_n, T.tile_m), 0, tl.int32)
    for J in range(groups):
        first, end = J * bk, tl.minimum(J * bk + bk, K)
        steps = tl.cdiv(end - first, T.tile_k)
        each = tl.cdiv(steps, SPLITS)
        first, end = first + split * each * T.tile_k, tl.minimum(end, first + (split + 1) * each * T.tile_k)
        d = tl.full((T.tile_n, T.tile_m), 0, tl.int32)
        w_sum, x_sum = tl.full((T.tile_n, 1), 0, tl.int32), tl.full((1, T.tile_m), 0, tl.int32)
        for k in range(first, end, T.tile_k):
            column = k + tl.arange(0, T.tile_k)
            x = load_byte(x_ptr + column[:, None], batch & (column < end)[:, None] if MASKED else batch, X)
            if not F.whole:
                w = load_narrow(codes_ptr, rows, k, end, F, T, MASKED)
            else:
                w = load_byte(codes_ptr + column[None, :], rows & (column < end)[None, :] if MASKED else rows, F)
            d = tl.dot(w, x, d, out_dtype=tl.int32)
            if X_SHIFTED:
                w_sum += tl.sum(w.to(tl.int32), 1, keep_dims=True)
            if W_SHIFTED:
                x_sum += tl.sum(x.to(tl.int32), 0, keep_dims=True)
        z = zero_points(zero_point_ptr, z_at + J, rows, F)
        if X_SHIFTED:
            d -= z_x * w_sum
        if W_SHIFTED:
            d -= z * x_sum
        if X_SHIFTED and W_SHIFTED:
            d += tl.maximum(end - first, 0).to(tl.int32) * z * z_x
        if SPLITS == 1 and groups > 1:
            total += d.to(tl.float32) * load_scale(scale_ptr + at + J, rows, F)
    return d, total


@triton.jit
def scaled_matmul_kernel(
    x_ptr,  # [M, K] of row X
    x_scale_ptr,  # [M] float32, or one for all rows
    x_zero_point_ptr,  # the same shape, int32, or None
    codes_ptr,  # [N, K] of row F, or [N, ceil(K / 2)] bytes
    scale_ptr,  # [ceil(N / br), groups] float32
    zero_point_ptr,  # the same shape, int32, or None
    bias_ptr,  # [N] float32, or None
    y_ptr,  # [M, N] of row Y
    partial_ptr,  # [T.splits, M, N] int32, or None
    ticket_ptr,  # [tiles of y] int32, all 0 before and after, or None
    M, N, K, br, bk, groups, stride,
    X: tl.constexpr, F: tl.constexpr, Y: tl.constexpr, ACTIVATION: tl.constexpr, PER_ROW: tl.constexpr,
    MASKED: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    SPLITS: tl.constexpr = T.splits
    X_SHIFTED: tl.constexpr = x_zero_point_ptr is not None or offset(X) > 0
    # 1. where this program's sums lie: rows of x change fastest, they share the weight
    across = tl.cdiv(M, T.tile_m)
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    n = (tile // across).to(tl.int64) * T.tile_n + tl.arange(0, T.tile_n)[:, None]
    m = (tile % across).to(tl.int64) * T.tile_m + tl.arange(0, T.tile_m)[None, :]
    rows, batch = n < N, m < M
    x_ptr = codes_at(x_ptr, X) + m * K
    codes_ptr = codes_at(codes_ptr, F) + n * stride
    s_x = load_scale(x_scale_ptr + (m if PER_ROW else m * 0), batch, X)
    z_x = zero_points(x_zero_point_ptr, m if PER_ROW else m * 0, batch, X)
    at, z_at = n // br * groups, n // br * zero_cols(zero_point_ptr, groups, F)
    # 2. groups in ascending order, or this split's steps of the only one
    d, total = sum_groups(
        x_ptr, z_x, codes_ptr, scale_ptr, zero_point_ptr, rows, batch, at, z_at, split, K, bk, groups, X, F,
        X_SHIFTED, MASKED, T,
    )  # fmt: skip
    # 3. the last program of a tile adds the splits; the scales follow
    y_at, inside = m * N + n, rows & batch
    if SPLITS > 1:
        size = tl.cast(M, tl.int64) * N
        partial_ptr += y_at
        if arrive(d, partial_ptr + split * size, ticket_ptr + tile, inside, SPLITS):
            d = sum_splits(partial_ptr, size, inside, SPLITS)
            total = d.to(tl.float32) * s_x * load_scale(scale_ptr + at, rows, F)
            finish(total, y_ptr + y_at, bias_ptr, n, inside, N, Y, ACTIVATION, ARCH)
    else:
        if groups > 1:
            total = total * s_x
        else:
            total = d.to(tl.float32) * s_x * load_scale(scale_ptr + at, rows & (groups > 0), F)
        finish(total, y_ptr + y_at, bias_ptr, n, inside, N, Y, ACTIVATION, ARCH)


def scaled_matmul(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    weight: QuantizedWeight,
    x_zero_point: torch.Tensor | None,
    epilogue: Epilogue,
    y: torch.Tensor,
    tile: tuning.MatmulTile | None = None,
) -> None:
    """Launch with ``tile``, or with the tile that `tuning` chooses."""
    tile = tile or chosen(x_codes, weight, x_zero_point, y)
    if tile.described:
        scale, columns = launch.codes_of(weight.scale), (0, weight.shape[0])
        multiply_described(x_codes, weight.codes, x_scale, scale, weight, epilogue, y, columns, tile)
    else:
        with_tile(x_codes, x_scale, weight, x_zero_point, epilogue, y, tile)(
            x_codes, x_scale, weight, x_zero_point, epilogue, y
        )


def chosen(
    x_codes: torch.Tensor, weight: QuantizedWeight, x_zero_point: torch.Tensor | None, y: torch.Tensor
) -> tuning.MatmulTile:
    """The tile that `tuning` chooses."""
    (M, _), (N, K), device = x_codes.shape, weight.shape, y.device
    return tuning.choose_scaled(
        (M, N, K), weight.format, weight.block[1], launch.device_name(device), launch.shared_memory(device), y.dtype,
        describable(x_codes, weight, x_zero_point),
    )  # fmt: skip


def with_tile(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    weight: QuantizedWeight,
    x_zero_point: torch.Tensor | None,
    epilogue: Epilogue,
    y: torch.Tensor,
    tile: tuning.MatmulTile,
) -> Kernel:
    """Return the kernel of calls like this one with ``tile``: it has but to be told where their tensors lie."""
    (br, bk), (N, K), M, device, step = weight.block, weight.shape, x_codes.shape[0], y.device, tile.tile_k
    tiles = launch.cdiv(N, tile.tile_n) * launch.cdiv(M, tile.tile_m)
    constants = (
        M, N, K, br, bk, weight.scale.shape[1], weight.codes.shape[1],
        formats.get(x_codes.dtype), weight.format, formats.get(y.dtype), epilogue.activation, x_scale.shape[0] > 1,
        min(bk, K) % step > 0 or K % bk % step > 0, tile, launch.arch(device),
    )  # fmt: skip
    start = launch.repeated(
        scaled_matmul_kernel, tiles * tile.splits, device, constants, warps=tile.warps, num_stages=tile.stages
    )
    partials = tile.splits, M, N

    def multiply(
        x_codes: torch.Tensor,
        x_scale: torch.Tensor,
        weight: QuantizedWeight,
        x_zero_point: torch.Tensor | None,
        epilogue: Epilogue,
        y: torch.Tensor,
    ) -> None:
        partial, ticket = launch.workspace(partials, torch.int32, tiles, device)
        codes, scale, _, _, zero_point, _, _ = weight
        start(
            x_codes, x_scale, x_zero_point, codes, launch.codes_of(scale), zero_point, epilogue.bias, y, partial, ticket
        )  # fmt: skip

    return multiply


def prepare(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    weight: QuantizedWeight,
    x_zero_point: torch.Tensor | None,
    epilogue: Epilogue,
    y: torch.Tensor,
) -> Kernel | None:
    """Return the kernel of calls like this one; None where its tile depends on addresses."""
    tile = chosen(x_codes, weight, x_zero_point, y)
    if tile.described or (x_codes.data_ptr() | weight.codes.data_ptr()) & 15:
        return None
    return with_tile(x_codes, x_scale, weight, x_zero_point, epilogue, y, tile)


scaled_matmul.prepare = prepare
