"""dx[m, k] = sum over n of dy[m, n] * w[n, k], w = dequantize(codes)

Scales lie along the sum, so that they multiply the weights: float32, or rounded to dy's type where dy has the rows to
fill tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch, tuning
from quantlib.backends.triton.matmul import finish, load_operands, load_scale, load_x, operand_type, subtract_zero_point
from quantlib.backends.triton.slab import multiply_slabs_backward
from quantlib.backends.triton.tile import zero_cols
from quantlib.backends.weight import QuantizedWeight


@triton.jit
def sum_rows(
    dy_ptr,  # [tile_m, 1] where the rows of dy begin
    codes_ptr, scale_ptr, zero_point_ptr, batch, k_tile, k, N, K, br, bk, scale_cols, stride,
    X: tl.constexpr, F: tl.constexpr, D: tl.constexpr, ONE_BLOCK: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Return the sum over the rows n of the weight, [tile_m, tile_k]; ``batch`` says which rows of dy there are."""
    total = tl.full((T.tile_m, T.tile_k), 0.0, tl.float32)
    for step in range(tl.cdiv(N, T.tile_n)):
        n_first = tl.cast(step, tl.int64) * T.tile_n
        n = n_first + tl.arange(0, T.tile_n)
        dy = load_x(dy_ptr + n[None, :], batch & (n < N)[None, :], X, D, ARCH)
        w = load_operands(codes_ptr, n_first, k_tile, stride, N, K, F, tl.float32, T, False, None, True, ARCH)[0]
        if ONE_BLOCK:
            J, exists = k_tile * T.tile_k // bk, (n < N)[:, None]
        else:
            J, exists = k // bk, (n < N)[:, None] & (k < K)
        z_at = (n // br * zero_cols(zero_point_ptr, scale_cols, F))[:, None] + J
        at = (n // br * scale_cols)[:, None] + J
        w = subtract_zero_point(w, zero_point_ptr, z_at, exists, F) * load_scale(scale_ptr + at, exists, F)
        total = tl.dot(dy, w.to(D), total, input_precision="ieee")
    return total


@triton.jit
def dequant_matmul_backward_kernel(
    dy_ptr,  # [M, N] of row X
    codes_ptr,  # [N, K] of row F, or [N, ceil(K / 2)] bytes
    scale_ptr,  # [ceil(N / br), scale_cols] float32
    zero_point_ptr,  # the same shape, int32, or None
    dx_ptr,  # [M, K] of row X
    M, N, K, br, bk, scale_cols, stride,
    X: tl.constexpr, F: tl.constexpr, ROUNDED: tl.constexpr, ONE_BLOCK: tl.constexpr, T: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = operand_type(X, X, ROUNDED, ARCH)
    across = tl.cdiv(K, T.tile_k)
    m_tile, k_tile = tl.program_id(0) // across, tl.program_id(0) % across
    m = (m_tile.to(tl.int64) * T.tile_m + tl.arange(0, T.tile_m))[:, None]
    k = k_tile.to(tl.int64) * T.tile_k + tl.arange(0, T.tile_k)[None, :]
    total = sum_rows(
        dy_ptr + m * N, codes_ptr, scale_ptr, zero_point_ptr, m < M, k_tile, k, N, K, br, bk, scale_cols, stride,
        X, F, D, ONE_BLOCK, T, ARCH,
    )  # fmt: skip
    finish(total, dx_ptr + m * K + k, None, k, (m < M) & (k < K), K, X, None, ARCH)


def dequant_matmul_backward(
    dy: torch.Tensor, weight: QuantizedWeight, dx: torch.Tensor, tile: tuning.MatmulTile | None = None
) -> None:
    """Launch with ``tile``, or with the tile that `tuning` chooses."""
    M, (N, K), device = len(dy), weight.shape, dy.device
    codes, scale, block = launch.codes_of(weight.codes), launch.codes_of(weight.scale), weight.block
    if tile is None:
        tile = tuning.choose_backward(
            (M, N, K), weight.format, dy.dtype, block[1], launch.device_name(device), launch.shared_memory(device)
        )
    if tile.slab:
        multiply_slabs_backward(dy, weight, dx, tile)
        return
    rounded = M >= 64 and dy.dtype != torch.float32
    launch.launch(
        dequant_matmul_backward_kernel, launch.cdiv(M, tile.tile_m) * launch.cdiv(K, tile.tile_k), dy.device,
        dy, codes, scale, weight.zero_point, dx,
        M, N, K, *block, scale.shape[1], codes.shape[1], formats.get(dy.dtype), weight.format, rounded,
        scale.shape[1] == 1 or block[1] % tile.tile_k == 0, tile, launch.arch(dy.device),
        warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
