"""scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), or the affine (scale, zero_point) of its range"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.numerics import range_scale, widen
from quantlib.backends.triton.tile import block_at, block_max, block_min, chunk_at, codes_at, load
from quantlib.formats import Format


@triton.jit
def block_range(lowest, highest, AFFINE: tl.constexpr):
    """[count, rows, cols] int32 -> [count] int32, twice"""
    highest = block_max(highest)
    return block_min(lowest) if AFFINE else highest * 0, highest


@triton.jit
def store_scale(scale_ptr, zero_point_ptr, b, s, z, exists, AFFINE: tl.constexpr):
    tl.store(scale_ptr + b, s, exists)
    if AFFINE:
        tl.store(zero_point_ptr + b, z, exists)


@triton.jit
def read_blocks(x_ptr, K, rows, cols, exists, X: tl.constexpr, AFFINE: tl.constexpr, B: tl.constexpr):
    """One read of x: the chunks of this program's blocks, which stay in registers, and the range of each block."""
    CHUNKS: tl.constexpr = B.chunks
    chunks = ()
    for u in tl.static_range(CHUNKS):
        r, c = chunk_at(u, B)
        x = load(x_ptr + r * K + c, exists & (r < rows) & (c < cols), not B.exact)
        chunks = chunks + (x,)  # noqa: RUF005 (Triton knows no starred tuple)
    lowest = tl.full((B.count, B.rows, B.cols), 0, tl.int32)
    highest = tl.full((B.count, B.rows, B.cols), 0, tl.int32)
    for u in tl.static_range(CHUNKS):
        lowest, highest = widen(lowest, highest, chunks[u], X, AFFINE)
    lowest, highest = block_range(lowest, highest, AFFINE)
    return chunks, lowest, highest


@triton.jit
def compute_scale_kernel(
    x_ptr,  # [M, K] of row X
    scale_ptr,  # [ceil(M / br), ceil(K / bk)] float32
    zero_point_ptr,  # the same shape, int32, or None
    M, K, br, bk, scale_cols, blocks,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * B.count + tl.arange(0, B.count)
    i, j, rows, cols = block_at(b[:, None, None], M, K, br, bk, scale_cols, B)
    x_ptr = codes_at(x_ptr, X) + (i * K + j)
    _, lowest, highest = read_blocks(x_ptr, K, rows, cols, b[:, None, None] < blocks, X, AFFINE, B)
    s, z = range_scale(lowest, highest, X, F, AFFINE)
    store_scale(scale_ptr, zero_point_ptr, b, s, z, b < blocks, AFFINE)


@triton.jit
def partial_range_kernel(
    x_ptr,  # [M, K] of row X
    partial_ptr,  # [blocks, B.parts, 2] int32
    M, K, br, bk, scale_cols,
    X: tl.constexpr, AFFINE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b = (program // B.parts).to(tl.int64)
    i, j, rows, cols = block_at(b, M, K, br, bk, scale_cols, B)
    x_ptr = codes_at(x_ptr, X) + (i * K + j)
    lowest = tl.full((1, B.rows, B.cols), 0, tl.int32)
    highest = tl.full((1, B.rows, B.cols), 0, tl.int32)
    part = program % B.parts
    if B.rows == 1:  # whole chunks without a mask, which the compiler can load several of ahead, and one with it
        r, c = chunk_at(0, B)
        whole = cols // B.cols
        for u in tl.range(part, whole, B.parts, loop_unroll_factor=4):
            code = load(x_ptr + tl.cast(u, tl.int64) * B.cols + c, None, False)
            lowest, highest = widen(lowest, highest, code, X, AFFINE)
        last = tl.cast(whole, tl.int64) * B.cols
        code = load(x_ptr + last + c, (c < cols - last) & (part == whole % B.parts), True)
        lowest, highest = widen(lowest, highest, code, X, AFFINE)
    else:
        across = tl.cdiv(cols, B.cols)
        for u in tl.range(part, tl.cdiv(rows, B.rows) * across, B.parts, loop_unroll_factor=4):
            r, c = chunk_at(u // across, B)
            c += u % across * B.cols
            code = load(x_ptr + r * K + c, (r < rows) & (c < cols), True)
            lowest, highest = widen(lowest, highest, code, X, AFFINE)
    lowest, highest = block_range(lowest, highest, AFFINE)
    at = partial_ptr + 2 * (program + tl.arange(0, 1))
    tl.store(at, lowest)
    tl.store(at + 1, highest)


@triton.jit
def combine_range_kernel(
    partial_ptr,  # [blocks, PARTS, 2] int32
    scale_ptr,  # [blocks] float32
    zero_point_ptr,  # [blocks] int32, or None
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    at = partial_ptr + 2 * (b * PARTS + tl.arange(0, PARTS)[None, None, :])
    lowest, highest = block_range(tl.load(at), tl.load(at + 1), AFFINE)
    s, z = range_scale(lowest, highest, X, F, AFFINE)
    store_scale(scale_ptr, zero_point_ptr, b + tl.arange(0, 1), s, z, None, AFFINE)


def compute_scale(
    x: torch.Tensor, format: Format, block: launch.Shape, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> None:
    shape, block = launch.flatten((x.shape[0], x.shape[1]), block, formats.FLOAT32)
    chosen = launch.choose_blocks(shape, block, x.dtype.itemsize, formats.FLOAT32)
    X, affine, scale_cols, blocks = formats.get(x.dtype), zero_point is not None, scale.shape[1], scale.numel()
    if chosen.chunks:
        launch.launch(
            compute_scale_kernel, launch.cdiv(blocks, chosen.count), x.device,
            x, scale, zero_point, *shape, *block, scale_cols, blocks, X, format, affine, chosen,
            warps=chosen.warps,
        )  # fmt: skip
        return
    partial = torch.empty((blocks, chosen.parts, 2), dtype=torch.int32, device=x.device)
    launch.launch(
        partial_range_kernel, blocks * chosen.parts, x.device,
        x, partial, *shape, *block, scale_cols, X, affine, chosen,
        warps=chosen.warps,
    )  # fmt: skip
    launch.launch(
        combine_range_kernel, blocks, x.device,
        partial, scale, zero_point, X, format, affine, chosen.parts,
        warps=launch.WARPS if chosen.parts > 256 else 1,
    )  # fmt: skip
