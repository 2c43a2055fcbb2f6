"""y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = dequantize(codes)

The weight lies on the left of the dot, so that a batch of eight fills a matrix instruction, and its codes become
operands in the registers they were loaded to; `is_right` says where it does not. A scale of a row multiplies the sum;
one of a group the sum of a step, or of half of one. From a batch of 64 on it multiplies bfloat16 weights where a step
has no more of them than of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.backend import Kernel
from quantlib.backends.triton import launch, tuning
from quantlib.backends.triton.descriptors import slab_describable
from quantlib.backends.triton.matmul import (
    COLUMNS,
    add_scaled,
    arrive,
    chunk_bits,
    finish,
    in_order,
    is_right,
    load_operands,
    load_scale,
    load_x,
    multiply,
    operand_type,
    split_tiles,
    subtract_zero_point,
    sum_splits,
    tile_rows,
)
from quantlib.backends.triton.slab import multiply_slabs
from quantlib.backends.triton.tile import zero_cols
from quantlib.backends.weight import Epilogue, QuantizedWeight


@triton.jit
def sum_steps(
    x_ptr, codes_ptr, scale_ptr, zero_point_ptr, n_first, n, m, split, M, N, K, br, bk, per, scale_cols, stride,
    X: tl.constexpr, F: tl.constexpr, SCALES: tl.constexpr, TILED: tl.constexpr, MASKED: tl.constexpr,
    T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Sum the steps of K that are those of ``split``: [tile_n, tile_m] float32, for rows n from n_first on and m.

    ``per`` steps share a scale where SCALES is "step": a step has one then.
    """
    D: tl.constexpr = operand_type(X, F, SCALES != "element", ARCH)
    CHUNKS: tl.constexpr = chunk_bits(X, F, SCALES, T, ARCH)
    HALF: tl.constexpr = COLUMNS if TILED else T.tile_k
    HALVES: tl.constexpr = F.per_byte if TILED else 1
    x_ptr += m[None, :] * K
    rows, batch = (n < N)[:, None], (m < M)[None, :]
    at = (n // br * scale_cols)[:, None]
    in_tile = tile_rows(n_first, T)
    z_cols = zero_cols(zero_point_ptr, scale_cols, F)
    z_at, z_in_tile, rows_in_tile = (n // br * z_cols)[:, None], in_tile // br * z_cols, in_tile < N
    total = tl.full((T.tile_n, T.tile_m), 0.0, tl.float32)
    steps = tl.cdiv(K, T.tile_k)
    each = tl.cdiv(steps, T.splits)
    for step in range(split * each, tl.minimum(split * each + each, steps)):
        operands = load_operands(codes_ptr, n_first, step, stride, N, K, F, D, T, TILED, CHUNKS, MASKED, ARCH)
        if SCALES == "step":
            s = load_scale(scale_ptr + at + step // per, rows, F)
            part = tl.full((T.tile_n, T.tile_m), 0.0, tl.float32)
        for half in tl.static_range(HALVES):
            k = step * T.tile_k + half * HALF
            column = k + tl.arange(0, HALF)
            x = load_x(x_ptr + column[:, None], batch & (column < K)[:, None] if MASKED else batch, X, D, ARCH)
            w = operands[half]
            if SCALES == "element":
                J, exists = (column // bk)[None, :], rows & (column < K)[None, :]
            else:
                J, exists = 0 if SCALES == "row" else k // bk, rows & (k < K)
            if TILED:
                w = split_tiles(w, T, CHUNKS)
                if SCALES != "element":  # before a thread's values are put in order: then they need not leave it
                    w = subtract_zero_point(w, zero_point_ptr, z_in_tile + J, rows_in_tile & (k < K), F)
                w = in_order(w, T)
            if SCALES == "element" or not TILED:
                w = subtract_zero_point(w, zero_point_ptr, z_at + J, exists, F)
            if SCALES == "row":
                total = multiply(w, x, total, is_right(X, F, SCALES, T, ARCH), T, ARCH)
            elif SCALES == "step":
                part = tl.dot(w, x, part, input_precision="ieee")
            elif SCALES == "half":
                part = tl.dot(w, x, input_precision="ieee")
                total = add_scaled(total, part, load_scale(scale_ptr + at + J, exists, F), D, T)
            else:
                w = (w.to(tl.float32) * load_scale(scale_ptr + at + J, exists, F)).to(D)
                total = multiply(w, x, total, False, T, ARCH)
        if SCALES == "step":
            total = add_scaled(total, part, s, D, T)
    if SCALES == "row":
        total = total * load_scale(scale_ptr + at, rows & (scale_cols > 0), F)
    return total


@triton.jit
def dequant_matmul_kernel(
    x_ptr,  # [M, K] of row X
    codes_ptr,  # [N, K] of row F, [N, ceil(K / 2)] bytes, or tiles [ceil(N / 16), stride, 1024]
    scale_ptr,  # [ceil(N / br), scale_cols] float32
    zero_point_ptr,  # the same shape, int32, or None
    bias_ptr,  # [N] float32, or None
    y_ptr,  # [M, N] of row X
    partial_ptr,  # [T.splits, M, N] float32, or None
    ticket_ptr,  # [tiles of y] int32, all 0 before and after, or None
    M, N, K, br, bk, per, scale_cols, stride,
    X: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, SCALES: tl.constexpr, TILED: tl.constexpr,
    MASKED: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    SPLITS: tl.constexpr = T.splits
    # 1. where this program's sums lie: rows of x change fastest, they share the weight
    across = tl.cdiv(M, T.tile_m)
    tile, split = tl.program_id(0) // T.splits, tl.program_id(0) % T.splits
    n_first, m_first = (tile // across).to(tl.int64) * T.tile_n, (tile % across).to(tl.int64) * T.tile_m
    n, m = n_first + tl.arange(0, T.tile_n), m_first + tl.arange(0, T.tile_m)
    rows, batch = (n < N)[:, None], (m < M)[None, :]
    # 2. sums over this split's steps of K
    total = sum_steps(
        x_ptr, codes_ptr, scale_ptr, zero_point_ptr, n_first, n, m, split, M, N, K, br, bk, per, scale_cols, stride,
        X, F, SCALES, TILED, MASKED, T, ARCH,
    )  # fmt: skip
    # 3. the last program of a tile adds the splits in order
    y_at = m[None, :] * N + n[:, None]
    inside = rows & batch
    if SPLITS > 1:
        size = tl.cast(M, tl.int64) * N
        partial_ptr += y_at
        if arrive(total, partial_ptr + split * size, ticket_ptr + tile, inside, SPLITS):
            total = sum_splits(partial_ptr, size, inside, SPLITS)
            finish(total + 0.0, y_ptr + y_at, bias_ptr, n[:, None], inside, N, X, ACTIVATION, ARCH)
    else:
        finish(total + 0.0, y_ptr + y_at, bias_ptr, n[:, None], inside, N, X, ACTIVATION, ARCH)


def dequant_matmul(
    x: torch.Tensor,
    weight: QuantizedWeight,
    epilogue: Epilogue,
    batch_invariant: bool,
    y: torch.Tensor,
    tile: tuning.MatmulTile | None = None,
) -> None:
    """Launch with ``tile``, or with the tile that `tuning` chooses."""
    tile = tile or chosen(x, weight, batch_invariant)
    if tile.slab:
        multiply_slabs(x, weight, epilogue, y, tile)
    else:
        with_tile(x, weight, epilogue, tile)(x, weight, epilogue, batch_invariant, y)


def chosen(x: torch.Tensor, weight: QuantizedWeight, batch_invariant: bool) -> tuning.MatmulTile:
    """The tile that `tuning` chooses."""
    return tuning.choose_matmul(
        (x.shape[0], *weight.shape), weight.format, x.dtype, weight.block[1], weight.tiled, batch_invariant,
        launch.device_name(x.device), launch.shared_memory(x.device), slab_describable(x),
    )  # fmt: skip


def with_tile(x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue, tile: tuning.MatmulTile) -> Kernel:
    """Return the kernel of calls like this one with ``tile``: it has but to be told where their tensors lie."""
    M, (N, K), (br, bk), device = x.shape[0], weight.shape, weight.block, x.device
    format, tiled, columns = weight.format, weight.tiled, weight.scale.shape[1]
    tiles = launch.cdiv(N, tile.tile_n) * launch.cdiv(M, tile.tile_m)
    constants = (
        M, N, K, br, bk, bk // tile.tile_k, columns, weight.codes.shape[1],
        formats.get(x.dtype), format, epilogue.activation, scales(M, x.dtype, columns, bk, tiled, tile), tiled,
        K % tile.tile_k > 0, tile, launch.arch(device),
    )  # fmt: skip
    start = launch.repeated(
        dequant_matmul_kernel, tiles * tile.splits, device, constants, warps=tile.warps, num_stages=tile.stages
    )
    partials = tile.splits, M, N

    def multiply(
        x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue, batch_invariant: bool, y: torch.Tensor
    ) -> None:
        partial, ticket = launch.workspace(partials, torch.float32, tiles, device)
        codes, scale, _, _, zero_point, _, _ = weight
        x = paired(x) if tile.paired else x
        start(x, launch.codes_of(codes), launch.codes_of(scale), zero_point, epilogue.bias, y, partial, ticket)

    return multiply


def prepare(
    x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue, batch_invariant: bool, y: torch.Tensor
) -> Kernel | None:
    """Return the kernel of calls like this one; None for slabs, which take longer than to prepare them."""
    tile = chosen(x, weight, batch_invariant)
    return None if tile.slab else with_tile(x, weight, epilogue, tile)


dequant_matmul.prepare = prepare


def scales(rows: int, dtype: torch.dtype, columns: int, bk: int, tiled: bool, tile: tuning.MatmulTile) -> str:
    """Return what a scale multiplies: the sum of a row, of a step or of half a step, the weights of a step, or one.

    ``rows`` and ``dtype`` are those of x; a row of the weight has ``columns`` scales, of ``bk`` columns each.

    A weight times its scale is rounded to x's type, for which it may be too large where that is float16. A sum comes
    before its scale, and overflows where that of |x| |q - z| does: with values of x from 1e31 on.
    """
    if columns <= 1:
        return "row"
    if bk % (COLUMNS.value if tiled else tile.tile_k):
        return "element"
    few = rows < 64 or tile.tile_m <= tuning.FEW
    if few or dtype == torch.float16 or tile.tile_k > COLUMNS.value:  # a step has more weights than sums
        return "step" if bk % tile.tile_k == 0 else "half"
    return "weights"


def paired(x: torch.Tensor) -> torch.Tensor:
    """x [M, K] of 16 bits with each 16 columns in another order: 0 1 4 5 8 9 12 13, then 2 3 6 7 10 11 14 15.

    `in_order` puts those of the weight in the same, in which a thread of a warpgroup has them side by side in a tile.
    In their own it would load its codes in twos, two of which lie in one bank of shared memory.
    """
    M, K = x.shape
    return x.view(M, K // 16, 4, 2, 2).transpose(2, 3).reshape(M, K)
