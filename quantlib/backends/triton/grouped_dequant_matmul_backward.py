"""dx[t, k] = sum over n of dy[t, n] * w[e, n, k], e the expert that row t belongs to

One launch: a program finds out from the offsets which expert's rows it multiplies, so that the host need not know.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch, tuning
from quantlib.backends.triton.dequant_matmul_backward import sum_rows
from quantlib.backends.triton.groups import groups_of, part_of, slots_of
from quantlib.backends.triton.matmul import finish, operand_type
from quantlib.backends.triton.tile import zero_row
from quantlib.backends.weight import QuantizedWeight


@triton.jit
def grouped_dequant_matmul_backward_kernel(
    dy_ptr,  # [R, N] of row X
    codes_ptr,  # [E, N, K] of row F, or [E, N, ceil(K / 2)] bytes
    scale_ptr,  # [E, ceil(N / br), scale_cols] float32
    zero_point_ptr,  # the same shape, int32, or None
    dx_ptr,  # [R, K] of row X
    offsets_ptr,  # [E] int32
    E, R, N, K, br, bk, scale_rows, scale_cols, stride,
    X: tl.constexpr, F: tl.constexpr, ROUNDED: tl.constexpr, ONE_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = operand_type(X, X, ROUNDED, ARCH)
    across = tl.cdiv(K, T.tile_k)
    k_tile = tl.program_id(0) % across
    e, start, M, m_first = part_of(tl.program_id(0) // across, offsets_ptr, E, R, GROUPS, T.tile_m)
    m = (m_first + tl.arange(0, T.tile_m))[:, None]
    k = k_tile.to(tl.int64) * T.tile_k + tl.arange(0, T.tile_k)[None, :]
    inside, dx_at = (m < M) & (k < K), (start + m) * K + k
    if e < E:
        wide = e.to(tl.int64)
        blocks = wide * scale_rows * scale_cols
        if zero_point_ptr is not None:
            zero_point_ptr = zero_row(zero_point_ptr, wide * scale_rows, scale_cols, F)
        total = sum_rows(
            dy_ptr + (start + m) * N, codes_ptr + wide * N * stride, scale_ptr + blocks, zero_point_ptr, m < M,
            k_tile, k, N, K, br, bk, scale_cols, stride, X, F, D, ONE_BLOCK, T, ARCH,
        )  # fmt: skip
        finish(total, dx_ptr + dx_at, None, k, inside, K, X, None, ARCH)
    elif e == E:
        tl.store(dx_ptr + dx_at, tl.full((T.tile_m, T.tile_k), 0, dx_ptr.dtype.element_ty), inside)


def grouped_dequant_matmul_backward(
    dy: torch.Tensor, weight: QuantizedWeight, offsets: torch.Tensor, dx: torch.Tensor
) -> None:
    """Launch with the tile that `tuning` chooses for the rows that an expert has on average, none of them a slab."""
    R, (N, K), device, block, E = len(dy), weight.shape, dy.device, weight.block, offsets.numel()
    rows = launch.cdiv(R, max(E, 1))
    tile = tuning.choose_backward(
        (min(rows, tuning.SLABS_FROM), N, K), weight.format, dy.dtype, block[1], launch.device_name(device),
        launch.shared_memory(device),
    )  # fmt: skip
    codes, scale = launch.codes_of(weight.codes), launch.codes_of(weight.scale)
    launch.launch(
        grouped_dequant_matmul_backward_kernel, slots_of(R, E, tile.tile_m) * launch.cdiv(K, tile.tile_k), device,
        dy, codes, scale, weight.zero_point, dx, offsets,
        E, R, N, K, *block, scale.shape[1], scale.shape[2], codes.shape[2], formats.get(dy.dtype), weight.format,
        rows >= 64 and dy.dtype != torch.float32, scale.shape[2] == 1 or block[1] % tile.tile_k == 0,
        groups_of(E), tile, launch.arch(device),
        warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
