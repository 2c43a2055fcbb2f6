"""dequant_matmul of a large batch, and its gradient: some rows of the weight at a time, or columns, in x's type, small
enough to stay in the cache between the kernel that makes them and the vendor's matmul that reads them.

If a row of x meets one scale, the operands are q - z, exact, and the scale multiplies the float32 sums. Otherwise, and
in the gradient, they are w, rounded to x's type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.descriptors import multiply_described
from quantlib.backends.triton.matmul import (
    AS_STORED,
    COLUMNS,
    finish,
    in_order,
    load_operands,
    load_scale,
    operand_type,
    split_tiles,
    subtract_zero_point,
)
from quantlib.backends.triton.numerics import convert_16, encode_float
from quantlib.backends.triton.tile import codes_at, store, zero_cols
from quantlib.backends.triton.tuning import MatmulTile, decode_tile
from quantlib.backends.weight import Epilogue, QuantizedWeight

FINISH_ROWS: tl.constexpr = tl.constexpr(16)
FINISH_COLS: tl.constexpr = tl.constexpr(256)


@triton.jit
def slab_kernel(
    codes_ptr,  # [N, K] of row F, [N, ceil(K / 2)] bytes, or tiles [ceil(N / 16), stride, 1024]
    scale_ptr,  # [ceil(N / br), scale_cols] float32
    zero_point_ptr,  # the same shape, int32, or None
    slab_ptr,  # [end - first, width] of row X
    first, end, first_step, width, K, br, bk, scale_cols, stride,
    X: tl.constexpr, F: tl.constexpr, BY_ROW: tl.constexpr, RUN: tl.constexpr, TILED: tl.constexpr,
    MASKED: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = operand_type(X, F, True, ARCH)
    HALF: tl.constexpr = COLUMNS if TILED else T.tile_k
    HALVES: tl.constexpr = F.per_byte if TILED else 1
    steps = tl.cdiv(width, T.tile_k)
    row_tile, step = (tl.program_id(0) // steps).to(tl.int64) * T.tile_n, tl.program_id(0) % steps
    operands = load_operands(
        codes_ptr, first + row_tile, first_step + step, stride, end, K, F, D, T, TILED, AS_STORED, MASKED, ARCH
    )  # fmt: skip
    row = tl.arange(0, T.tile_n)[:, None]
    n = first + row_tile + row
    rows, at, z_at = n < end, n // br * scale_cols, n // br * zero_cols(zero_point_ptr, scale_cols, F)
    slab_ptr = codes_at(slab_ptr, X) + row_tile * width + step * T.tile_k
    for half in tl.static_range(HALVES):
        k = (first_step + step) * T.tile_k + half * HALF
        j = tl.arange(0, HALF)[None, :]
        w = in_order(split_tiles(operands[half], T, AS_STORED), T) if TILED else operands[half]
        if RUN < HALF:
            w = w.reshape(T.tile_n, HALF // RUN, RUN)
            column = k + tl.arange(0, HALF // RUN)[None, :, None] * RUN  # where each run begins
            code = encode_weights(
                w, column, rows[:, :, None], scale_ptr, at[:, :, None], zero_point_ptr, z_at[:, :, None], K, bk,
                X, F, BY_ROW, ARCH,
            ).reshape(T.tile_n, HALF)  # fmt: skip
        else:
            code = encode_weights(w, k, rows, scale_ptr, at, zero_point_ptr, z_at, K, bk, X, F, BY_ROW, ARCH)
        ptr = slab_ptr + (row * width + half * HALF + j)
        store(ptr, code, rows & (k + j < K), MASKED)


@triton.jit
def encode_weights(
    w, column, rows, scale_ptr, at, zero_point_ptr, z_at, K, bk,
    X: tl.constexpr, F: tl.constexpr, BY_ROW: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """[...] operands and the columns where their runs begin -> [...] codes in X of w, or of q - z"""
    J, exists = 0 if BY_ROW else column // bk, rows & (column < K)
    w = subtract_zero_point(w, zero_point_ptr, z_at + J, exists, F)
    if not BY_ROW:
        return scaled(w, load_scale(scale_ptr + at + J, exists, F), scale_ptr.dtype.element_ty, X, ARCH)
    elif ARCH == 0:
        return encode_float(w, X, False, ARCH)
    else:
        return w.to(tl.uint16, bitcast=True)


@triton.constexpr_function
def has_eight_bits(S):
    """True if scales kept as S, codes of E8M0 or bfloat16, have at most eight significant bits."""
    return S in (tl.uint8, tl.bfloat16)


@triton.jit
def scaled(w, s, S: tl.constexpr, X: tl.constexpr, ARCH: tl.constexpr):
    """[...] operands of bfloat16 and their float32 scales, which are kept as S -> [...] codes of fl(w s) rounded to X.
    No NaN is made that of C1: no byte of a slab is an output."""
    if ARCH == 0:
        return encode_float(w * s, X, False, ARCH)
    elif has_eight_bits(S):  # as w has: float32 holds the product, and one rounding is two
        w, s = tl.broadcast(w, s.to(tl.bfloat16))
        return tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r", [w, s], dtype=tl.uint16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return convert_16(w.to(tl.float32) * s, X, False)


@triton.jit
def finish_kernel(
    total_ptr,  # [M, end - first] float32
    scale_ptr,  # [ceil(N / br), 1] float32
    bias_ptr,  # [N] float32, or None
    y_ptr,  # [M, N] of row X
    M, N, first, end, br,
    X: tl.constexpr, F: tl.constexpr, ACTIVATION: tl.constexpr, BY_ROW: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(end - first, FINISH_COLS)
    m = (tl.program_id(0) // across).to(tl.int64) * FINISH_ROWS + tl.arange(0, FINISH_ROWS)[:, None]
    n = first + tl.program_id(0) % across * FINISH_COLS + tl.arange(0, FINISH_COLS)[None, :]
    inside = (m < M) & (n < end)
    total = tl.load(total_ptr + m * (end - first) + (n - first), inside, 0.0)
    if BY_ROW:
        total = total * load_scale(scale_ptr + n // br, n < end, F)
    finish(total + 0.0, y_ptr + m * N + n, bias_ptr, n, inside, N, X, ACTIVATION, ARCH)


def multiply_slabs(
    x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue, y: torch.Tensor, tile: MatmulTile
) -> None:
    """y of x [M, K], rows of the weight at a time."""
    N, K = weight.shape
    by_row = weight.scale.shape[1] == 1
    scale = launch.codes_of(weight.scale) if by_row else None
    decoding = decode_tile(weight.format, weight.tiled, weight.block[1], K) if tile.described else tile
    slab = torch.empty(min(tile.slab, N), K, dtype=x.dtype, device=x.device)
    for first in range(0, N, tile.slab):
        end = min(first + tile.slab, N)
        decode_slab(weight, slab, (first, end), (0, K), by_row, decoding)
        if tile.described:
            multiply_described(x, slab[: end - first], None, scale, weight, epilogue, y, (first, end), tile)
        else:
            finish_slab(product(x, slab[: end - first].T), weight, epilogue, y, (first, end), by_row)


def multiply_slabs_backward(dy: torch.Tensor, weight: QuantizedWeight, dx: torch.Tensor, tile: MatmulTile) -> None:
    """dx of dy [M, N], columns of the weight at a time, ``tile.slab`` of them, which tile_k divides."""
    N, K = weight.shape
    values = torch.empty(N * min(tile.slab, K), dtype=dy.dtype, device=dy.device)
    for first in range(0, K, tile.slab):
        end = min(first + tile.slab, K)
        slab = values[: N * (end - first)].view(N, end - first)
        decode_slab(weight, slab, (0, N), (first, end), False, tile)
        finish_slab(product(dy, slab), weight, Epilogue(), dx, (first, end), False)


def decode_slab(
    weight: QuantizedWeight,
    slab: torch.Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    by_row: bool,
    tile: MatmulTile,
) -> None:
    """w of these rows and columns, or q - z where ``by_row``, into ``slab``; ``run`` columns of a row share a scale."""
    codes, scale, (_, bk) = launch.codes_of(weight.codes), launch.codes_of(weight.scale), weight.block
    most = COLUMNS.value if weight.tiled else tile.tile_k
    run = most if scale.shape[1] == 1 else min(launch.divisor(bk), most)
    (first, end), width = rows, columns[1] - columns[0]
    launch.launch(
        slab_kernel, launch.cdiv(end - first, tile.tile_n) * launch.cdiv(width, tile.tile_k), slab.device,
        codes, scale, weight.zero_point, slab,
        first, end, columns[0] // tile.tile_k, width, weight.shape[1], *weight.block, scale.shape[1], codes.shape[1],
        formats.get(slab.dtype), weight.format, by_row, run, weight.tiled,
        width % tile.tile_k > 0 or (end - first) % tile.tile_n > 0, tile,
        launch.arch(slab.device),
        warps=tile.warps,
    )  # fmt: skip


def finish_slab(
    total: torch.Tensor,
    weight: QuantizedWeight,
    epilogue: Epilogue,
    y: torch.Tensor,
    columns: tuple[int, int],
    by_row: bool,
) -> None:
    """These columns of y of their sums."""
    (M, N), (first, end) = y.shape, columns
    programs = launch.cdiv(M, FINISH_ROWS.value) * launch.cdiv(end - first, FINISH_COLS.value)
    launch.launch(
        finish_kernel, programs, y.device,
        total, launch.codes_of(weight.scale), epilogue.bias, y, M, N, first, end, weight.block[0],
        formats.get(y.dtype), weight.format, epilogue.activation, by_row, launch.arch(y.device),
        warps=4,
    )  # fmt: skip


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """[M, K], [K, n] of one 16-bit type -> [M, n] float32 sums, never rounded to their type"""
    if launch.INTERPRETED:
        return x.float() @ w.float()
    return torch.mm(x, w, out_dtype=torch.float32)
