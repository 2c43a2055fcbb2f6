"""Products of a large batch on sm_90 and sm_100: a unit of its own (TMA) copies the tiles of both operands to shared
memory, where the matrix instructions read them.

`scaled_matmul` multiplies symmetric int8 codes with one scale a row as they lie; `dequant_matmul` multiplies x with a
slab of the weight in x's own 16-bit type (slab.py), whose sums are scaled, finished and rounded in registers. Rows are
a multiple of 16 bytes. The tensors are described by the host at every launch, so that a CUDA graph holds the
descriptors and nothing allocates memory for them.
"""

from __future__ import annotations

import importlib.util

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.matmul import finish, load_scale
from quantlib.backends.triton.numerics import decode_float
from quantlib.backends.triton.tuning import MatmulTile
from quantlib.backends.weight import Epilogue, QuantizedWeight

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# sm_103 has no matrix instruction for integers. Before Triton 3.8 those of sm_100 are not used, which int8 then gains
# nothing from.
ARCHS = (90, 100) if VERSION >= (3, 8) else (90,)
FLOAT_ARCHS = (90, 100)
INSTALLED = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None  # from Triton 3.4 on
GROUP = 8  # rows of tiles that go through the weight together, while it is in the L2 cache
REGISTERS = 1 << 16  # of a multiprocessor
OTHER = 64  # registers of a thread beside its sums
PARTS: tl.constexpr = tl.constexpr(4)  # of a tile that are finished one after the other: it needs fewer registers


@triton.jit
def described_matmul_kernel(
    x,  # descriptor of [M, K] of row X, in tiles [T.tile_m, T.tile_k]
    w,  # descriptor of [end - first, K] of row X, in tiles [T.tile_n, T.tile_k]; both are 0 past their ends
    x_scale_ptr,  # [M] float32, one for all rows, or None
    scale_ptr,  # [ceil(N / br)] float32, or None
    bias_ptr,  # [N] float32, or None
    y_ptr,  # [M, N] of row Y, whose columns first to end are written
    M, N, K, first, end, br,
    X: tl.constexpr, F: tl.constexpr, Y: tl.constexpr, ACTIVATION: tl.constexpr, PER_ROW: tl.constexpr,
    GROUP: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = T.tile_n // PARTS
    SUM: tl.constexpr = tl.float32 if X.is_float else tl.int32
    tl.assume(K > 0)
    down, across = tl.cdiv(M, T.tile_m), tl.cdiv(end - first, T.tile_n)
    # Few programs take many tiles each: the first steps of a tile are loaded while the one before it is finished.
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        group, member = tile // (GROUP * across), tile % (GROUP * across)
        height = tl.minimum(down - group * GROUP, GROUP)
        m_first, n_first = (group * GROUP + member % height) * T.tile_m, member // height * T.tile_n
        d = tl.full((T.tile_m, T.tile_n), 0, SUM)
        for k in range(0, K, T.tile_k):
            a, b = load_tile(x, m_first, k, X, ARCH), load_tile(w, n_first, k, X, ARCH)
            d = tl.dot(a, b.T, d, input_precision="ieee", out_dtype=SUM)
        m = tl.cast(m_first, tl.int64) + tl.arange(0, T.tile_m)[:, None]
        parts = columns(d, PARTS)
        for part in tl.static_range(PARTS):
            total = parts[part].to(tl.float32)
            n = first + n_first + part * PART + tl.arange(0, PART)[None, :]
            if x_scale_ptr is not None:
                total = total * load_scale(x_scale_ptr + (m if PER_ROW else m * 0), m < M, F)
            if scale_ptr is not None:
                total = total * load_scale(scale_ptr + n // br, n < end, F)
            if X.is_float:
                total = total + 0.0
            finish(total, y_ptr + m * N + n, bias_ptr, n, (m < M) & (n < end), N, Y, ACTIVATION, ARCH)


@triton.jit
def load_tile(x, row, k, X: tl.constexpr, ARCH: tl.constexpr):
    """A tile as operands of a dot: in the interpreter, whose 16-bit dots are wrong, float32 of codes"""
    if ARCH == 0 and X.is_float:
        return decode_float(x.load([row, k]), X, ARCH)
    else:
        return x.load([row, k])


@triton.jit
def columns(d, PARTS: tl.constexpr):
    """[rows, cols] -> PARTS parts side by side; a thread keeps its own"""
    if PARTS == 1:
        return (d,)
    else:
        left, right = d.reshape(d.shape[0], 2, d.shape[1] // 2).permute(0, 2, 1).split()
        return columns(left, PARTS // 2) + columns(right, PARTS // 2)


def describable(x_codes: torch.Tensor, weight: QuantizedWeight, x_zero_point: torch.Tensor | None) -> bool:
    """True if the kernel above can multiply these codes on their device."""
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


def slab_describable(x: torch.Tensor) -> bool:
    """True if the kernel above can multiply values of x with slabs of a weight on their device."""
    K = x.shape[1]
    return (
        INSTALLED
        and launch.arch(x.device) in FLOAT_ARCHS
        and x.dtype in (torch.bfloat16, torch.float16)
        and K > 0
        and K % 16 == 0
        and x.data_ptr() % 16 == 0
    )


def multiply_described(
    x: torch.Tensor,
    w: torch.Tensor,
    x_scale: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: QuantizedWeight,
    epilogue: Epilogue,
    y: torch.Tensor,
    columns: tuple[int, int],
    tile: MatmulTile,
) -> None:
    """These columns of y of x and their rows w of ``weight``, both codes or both of one 16-bit type."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (M, K), N, device, (first, end) = x.shape, y.shape[1], y.device, columns
    X = formats.get(x.dtype)
    if launch.INTERPRETED and X.is_float:
        x, w = x.view(torch.int16), w.view(torch.int16)
    programs = resident(tile, x.dtype.itemsize, device) * launch.processors(device)
    tiles = launch.cdiv(M, tile.tile_m) * launch.cdiv(end - first, tile.tile_n)
    launch.launch(
        described_matmul_kernel, min(tiles, programs), device,
        TensorDescriptor(x, [M, K], [K, 1], [tile.tile_m, tile.tile_k]),
        TensorDescriptor(w, [end - first, K], [K, 1], [tile.tile_n, tile.tile_k]),
        x_scale, scale, epilogue.bias, y,
        M, N, K, first, end, weight.block[0], X, weight.format, formats.get(y.dtype), epilogue.activation,
        x_scale is not None and x_scale.numel() > 1, GROUP, tile, launch.arch(device),
        warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def resident(tile: MatmulTile, itemsize: int, device: torch.device) -> int:
    """Programs that a multiprocessor holds at a time: a second multiplies while the first finishes its sums."""
    loads, sums = tile.stages * (tile.tile_m + tile.tile_n) * tile.tile_k * itemsize, tile.tile_m * tile.tile_n
    registers = sums + 32 * tile.warps * OTHER
    two = 2 * (loads + 4 * sums // PARTS.value + 1024) <= launch.shared_memory(device) and 2 * registers <= REGISTERS
    return 2 if two else 1
