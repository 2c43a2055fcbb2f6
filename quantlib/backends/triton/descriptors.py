"""scaled_matmul of a large batch on sm_90 and sm_100: a unit of its own (TMA) copies the tiles of both operands to
shared memory, where the matrix instructions read them.

For symmetric int8 codes with one scale a row, which are multiplied as they lie; K is a multiple of 16. The tensors are
described by the host at every launch, so that a CUDA graph holds the descriptors and nothing allocates memory for them.
"""

from __future__ import annotations

import importlib.util

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.matmul import finish, load_scale
from quantlib.backends.triton.tuning import MatmulTile
from quantlib.backends.weight import Epilogue, QuantizedWeight

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# sm_103 has no matrix instruction for integers. Before Triton 3.8 those of sm_100 are not used, which int8 then gains
# nothing from.
ARCHS = (90, 100) if VERSION >= (3, 8) else (90,)
INSTALLED = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None  # from Triton 3.4 on
GROUP = 8  # rows of tiles that go through the weight together, while it is in the L2 cache


@triton.jit
def described_matmul_kernel(
    x,  # descriptor of [M, K] int8, in tiles [T.tile_m, T.tile_k]
    codes,  # descriptor of [N, K] int8, in tiles [T.tile_n, T.tile_k]; both are 0 past their ends
    x_scale_ptr,  # [M] float32, or one for all rows
    scale_ptr,  # [ceil(N / br)] float32
    bias_ptr,  # [N] float32, or None
    y_ptr,  # [M, N] of row Y
    M, N, K, br,
    F: tl.constexpr, Y: tl.constexpr, ACTIVATION: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr,
    T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = T.tile_n // 4
    tl.assume(K > 0)
    down, across = tl.cdiv(M, T.tile_m), tl.cdiv(N, T.tile_n)
    # Few programs take many tiles each: the first steps of a tile are loaded while the one before it is finished.
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        group, member = tile // (GROUP * across), tile % (GROUP * across)
        height = tl.minimum(down - group * GROUP, GROUP)
        m_first, n_first = (group * GROUP + member % height) * T.tile_m, member // height * T.tile_n
        d = tl.full((T.tile_m, T.tile_n), 0, tl.int32)
        for k in range(0, K, T.tile_k):
            d = tl.dot(x.load([m_first, k]), codes.load([n_first, k]).T, d, out_dtype=tl.int32)
        m = tl.cast(m_first, tl.int64) + tl.arange(0, T.tile_m)[:, None]
        s_x = load_scale(x_scale_ptr + (m if PER_ROW else m * 0), m < M, F)
        # A quarter at a time, which needs fewer registers than the whole.
        halves = split_columns(d)
        for part in tl.static_range(4):
            quarter = split_columns(halves[part // 2])[part % 2]
            n = n_first + part * PART + tl.arange(0, PART)[None, :]
            total = quarter.to(tl.float32) * s_x * load_scale(scale_ptr + n // br, n < N, F)
            finish(total, y_ptr + m * N + n, bias_ptr, n, (m < M) & (n < N), N, Y, ACTIVATION, ARCH)


@triton.jit
def split_columns(d):
    """[rows, cols] -> its left and its right half; a thread keeps its own"""
    return d.reshape(d.shape[0], 2, d.shape[1] // 2).permute(0, 2, 1).split()


def describable(x_codes: torch.Tensor, weight: QuantizedWeight, x_zero_point: torch.Tensor | None) -> bool:
    """True if the kernel above can multiply these operands on their device."""
    codes, K = weight.codes, x_codes.shape[1]
    return (
        INSTALLED
        and launch.arch(codes.device) in ARCHS
        and x_codes.dtype == codes.dtype == torch.int8
        and x_zero_point is weight.zero_point is None
        and weight.scale.shape[1] == 1
        and K > 0
        and K % 16 == 0
        and x_codes.data_ptr() % 16 == codes.data_ptr() % 16 == 0
    )


def multiply_described(
    x_codes: torch.Tensor,
    x_scale: torch.Tensor,
    weight: QuantizedWeight,
    epilogue: Epilogue,
    y: torch.Tensor,
    tile: MatmulTile,
) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    M, (N, K), device = len(x_codes), weight.shape, y.device
    tiles = launch.cdiv(M, tile.tile_m) * launch.cdiv(N, tile.tile_n)
    launch.launch(
        described_matmul_kernel, min(tiles, launch.processors(device)), device,
        TensorDescriptor(x_codes, [M, K], [K, 1], [tile.tile_m, tile.tile_k]),
        TensorDescriptor(weight.codes, [N, K], [K, 1], [tile.tile_n, tile.tile_k]),
        x_scale, launch.codes_of(weight.scale), epilogue.bias, y,
        M, N, K, weight.block[0], weight.format, formats.get(y.dtype), epilogue.activation, x_scale.numel() > 1, GROUP,
        tile, launch.arch(device),
        warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
