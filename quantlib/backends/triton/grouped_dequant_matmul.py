"""y[t, n] = activation(sum over k of x[t, k] * w[e, n, k] + bias[e, n]), e the expert that row t belongs to

One launch: a program finds out from the offsets which expert's rows it multiplies, so that the host need not know. It
has the tile of a product of few rows, whatever the number of an expert's rows, and makes its sums in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch, tuning
from quantlib.backends.triton.dequant_matmul import scales, sum_steps
from quantlib.backends.triton.groups import groups_of, part_of, slots_of
from quantlib.backends.triton.matmul import finish
from quantlib.backends.triton.tile import zero_row
from quantlib.backends.weight import Epilogue, QuantizedWeight


@triton.jit
def grouped_dequant_matmul_kernel(
    x_ptr,  # [R, K] of row X
    codes_ptr,  # [E, N, K] of row F, or [E, N, ceil(K / 2)] bytes
    scale_ptr,  # [E, ceil(N / br), scale_cols] float32
    zero_point_ptr,  # the same shape, int32, or None
    bias_ptr,  # [E, N] float32, or None
    y_ptr,  # [R, N] of row X
    offsets_ptr,  # [E] int32
    E, R, N, K, br, bk, per, scale_rows, scale_cols, stride,
    X: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, SCALES: tl.constexpr, MASKED: tl.constexpr,
    GROUPS: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    SPLITS: tl.constexpr = T.splits
    # 1. the expert
    across = tl.cdiv(N, T.tile_n)
    slot, n_first = tl.program_id(0) // across, (tl.program_id(0) % across).to(tl.int64) * T.tile_n
    e, start, M, m_first = part_of(slot, offsets_ptr, E, R, GROUPS, T.tile_m)
    # 2. its rows of x, from m = 0 on, and its weight
    m = m_first + tl.arange(0, T.tile_m)
    n = n_first + tl.arange(0, T.tile_n)
    inside = (n < N)[:, None] & (m < M)[None, :]
    y_at = (start + m[None, :]) * N + n[:, None]
    if e < E:
        wide = e.to(tl.int64)
        blocks = wide * scale_rows * scale_cols
        if zero_point_ptr is not None:
            zero_point_ptr = zero_row(zero_point_ptr, wide * scale_rows, scale_cols, F)
        if bias_ptr is not None:
            bias_ptr += wide * N
        total = tl.full((T.tile_n, T.tile_m), 0.0, tl.float32)
        for split in range(SPLITS):  # as programs that share a tile add their sums
            part = sum_steps(
                x_ptr + start * K, codes_ptr + wide * N * stride, scale_ptr + blocks, zero_point_ptr,
                n_first, n, m, split, M, N, K, br, bk, per, scale_cols, stride, X, F, SCALES, False, MASKED, T, ARCH,
            )  # fmt: skip
            total = tl.where(split == 0, part, total + part)
        finish(total + 0.0, y_ptr + y_at, bias_ptr, n[:, None], inside, N, X, ACTIVATION, ARCH)
    elif e == E:
        tl.store(y_ptr + y_at, tl.full((T.tile_n, T.tile_m), 0, y_ptr.dtype.element_ty), inside)


def grouped_dequant_matmul(
    x: torch.Tensor,
    weight: QuantizedWeight,
    offsets: torch.Tensor,
    epilogue: Epilogue,
    batch_invariant: bool,
    y: torch.Tensor,
) -> None:
    """Launch with the tile that `tuning` chooses for a product that does not depend on the batch."""
    R, (N, K), device, E, bk = x.shape[0], weight.shape, x.device, offsets.numel(), weight.block[1]
    tile = tuning.choose_matmul(
        (R, N, K), weight.format, x.dtype, bk, False, True,
        launch.device_name(device), launch.shared_memory(device),
    )  # fmt: skip
    codes, scale = launch.codes_of(weight.codes), launch.codes_of(weight.scale)
    launch.launch(
        grouped_dequant_matmul_kernel, slots_of(R, E, tile.tile_m) * launch.cdiv(N, tile.tile_n), device,
        x, codes, scale, weight.zero_point, epilogue.bias, y, offsets,
        E, R, N, K, *weight.block, bk // tile.tile_k, scale.shape[1], scale.shape[2], codes.shape[2],
        formats.get(x.dtype), weight.format, epilogue.activation,
        scales(min(R, tile.tile_m), x.dtype, scale.shape[2], bk, False, tile), K % tile.tile_k > 0, groups_of(E), tile,
        launch.arch(device),
        warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
