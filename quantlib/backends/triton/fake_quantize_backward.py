"""dx[i, j] = m ? dy[i, j] : 0, dscale[I, J] = sum(dy * (m ? c - t : c)), dzero_point[I, J] = sum(m ? 0 : -dy * s)

x and dy are read once, dx is written once. A block that no program holds is summed by a number of programs that no
device decides, and their partial sums by one: the same bytes everywhere on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.fake_quantize import clamped, nearest, shared
from quantlib.backends.triton.numerics import (
    bits_of,
    canonical,
    decode_float,
    encode_float,
    nearest_value,
    reciprocal,
)
from quantlib.backends.triton.tile import block_at, block_sum, chunk_at, codes_at, load, store
from quantlib.formats import Format


@triton.jit
def gradients(
    dy, x, s, r, z,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, Q: tl.constexpr, LSQ: tl.constexpr, ARCH: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """Codes of dy and x -> the code of dx, and the terms of dscale and dzero_point"""
    t = decode_float(x, X, 0) * r  # pairs at once, as of ARCH 80, take a quarter more registers here
    if F.is_float:
        c = decode_float(encode_float(t, F, True, ARCH), F, ARCH) if LOOP else nearest_value(t, F, ARCH)
        inside = (bits_of(t) & 0x7FFFFFFF) <= (F.max_bits if LSQ else F.rounds_to_max_bits)
    else:
        # A t that the clamp moves is no code; far outside, where `nearest` is not exact, neither is what it gives.
        u = clamped(t, z, AFFINE, Q)
        c = nearest(u)
        inside = t == u if LSQ else nearest(t) == c
    value = decode_float(dy, X, 0)
    dscale = value * tl.where(t == t, tl.where(inside, c - t, c), 0.0)
    return tl.where(inside, dy, 0), dscale, tl.where(inside, 0.0, -(value * s))


@triton.jit
def add_chunk(
    pointers, at, mask, of, dscale, dzero_point,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, Q: tl.constexpr, LSQ: tl.constexpr, ARCH: tl.constexpr,
    MASKED: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Write one chunk of dx, and add its terms to the sums, [count, rows, cols]."""
    dy_ptr, x_ptr, dx_ptr = pointers
    s, r, z = of
    dy, x = load(dy_ptr + at, mask, MASKED), load(x_ptr + at, mask, MASKED)
    dx, ds, dz = gradients(dy, x, s, r, z, X, F, AFFINE, Q, LSQ, ARCH, LOOP)
    store(dx_ptr + at, dx, mask, MASKED)
    return dscale + ds, dzero_point + dz if AFFINE else dzero_point


@triton.jit
def fake_quantize_backward_kernel(
    dy_ptr, x_ptr,  # [M, K] of row X
    scale_ptr, zero_point_ptr,  # [ceil(M / br), ceil(K / bk)] float32; the latter, or None
    dx_ptr,  # [M, K] of row X
    dscale_ptr, dzero_point_ptr,  # as scale_ptr and zero_point_ptr
    M, K, br, bk, scale_cols, blocks, factor,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, Q: tl.constexpr, LSQ: tl.constexpr, B: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * B.count + tl.arange(0, B.count)
    s, z = shared(scale_ptr, zero_point_ptr, b, b < blocks, F, AFFINE, Q)
    s, z, exists = s[:, None, None], z[:, None, None], (b < blocks)[:, None, None]
    i, j, rows, cols = block_at(b[:, None, None], M, K, br, bk, scale_cols, B)
    first, of = i * K + j, (s, reciprocal(s), z)
    pointers = codes_at(dy_ptr, X) + first, codes_at(x_ptr, X) + first, codes_at(dx_ptr, X) + first
    dscale = tl.full((B.count, B.rows, B.cols), 0.0, tl.float32)
    dzero_point = tl.full((B.count, B.rows, B.cols), 0.0, tl.float32)
    CHUNKS: tl.constexpr = B.chunks
    for u in tl.static_range(CHUNKS):
        r, c = chunk_at(u, B)
        mask = exists & (r < rows) & (c < cols)
        dscale, dzero_point = add_chunk(
            pointers, r * K + c, mask, of, dscale, dzero_point, X, F, AFFINE, Q, LSQ, ARCH, not B.exact, False
        )
    tl.store(dscale_ptr + b, canonical(block_sum(dscale) * factor), b < blocks)
    if AFFINE:
        tl.store(dzero_point_ptr + b, canonical(block_sum(dzero_point) * factor), b < blocks)


@triton.jit
def partial_gradients_kernel(
    dy_ptr, x_ptr,  # [M, K] of row X
    scale_ptr, zero_point_ptr,  # [ceil(M / br), ceil(K / bk)] float32; the latter, or None
    dx_ptr,  # [M, K] of row X
    partial_ptr,  # [2, blocks, B.parts] float32, of scale and zero point
    M, K, br, bk, scale_cols, blocks,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, Q: tl.constexpr, LSQ: tl.constexpr, B: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    b, part = (program // B.parts).to(tl.int64), program % B.parts
    of_block = b + tl.arange(0, 1)[None, None, :]
    s, z = shared(scale_ptr, zero_point_ptr, of_block, of_block < blocks, F, AFFINE, Q)
    i, j, rows, cols = block_at(b, M, K, br, bk, scale_cols, B)
    first, of = i * K + j, (s, reciprocal(s), z)
    pointers = codes_at(dy_ptr, X) + first, codes_at(x_ptr, X) + first, codes_at(dx_ptr, X) + first
    dscale = tl.full((1, B.rows, B.cols), 0.0, tl.float32)
    dzero_point = tl.full((1, B.rows, B.cols), 0.0, tl.float32)
    if B.rows == 1:  # whole chunks without a mask, which the compiler can load several of ahead, and one with it
        r, c = chunk_at(0, B)
        whole = cols // B.cols
        for u in tl.range(part, whole, B.parts, loop_unroll_factor=2):
            at = tl.cast(u, tl.int64) * B.cols + c
            dscale, dzero_point = add_chunk(
                pointers, at, None, of, dscale, dzero_point, X, F, AFFINE, Q, LSQ, ARCH, False, True
            )
        last = tl.cast(whole, tl.int64) * B.cols
        mask = (c < cols - last) & (part == whole % B.parts)
        dscale, dzero_point = add_chunk(
            pointers, last + c, mask, of, dscale, dzero_point, X, F, AFFINE, Q, LSQ, ARCH, True, True
        )
    else:
        across = tl.cdiv(cols, B.cols)
        for u in tl.range(part, tl.cdiv(rows, B.rows) * across, B.parts):
            r, c = chunk_at(u // across, B)
            c += u % across * B.cols
            mask = (r < rows) & (c < cols)
            dscale, dzero_point = add_chunk(
                pointers, r * K + c, mask, of, dscale, dzero_point, X, F, AFFINE, Q, LSQ, ARCH, True, True
            )
    at = partial_ptr + program + tl.arange(0, 1)
    tl.store(at, block_sum(dscale))
    if AFFINE:
        tl.store(at + blocks * B.parts, block_sum(dzero_point))


@triton.jit
def combine_gradients_kernel(
    partial_ptr,  # [2, blocks, PARTS] float32
    dscale_ptr, dzero_point_ptr,  # [blocks] float32; the latter, or None
    blocks, factor,
    AFFINE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0) + tl.arange(0, 1)
    at = partial_ptr + b[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    tl.store(dscale_ptr + b, canonical(tl.sum(tl.load(at), 1) * factor))
    if AFFINE:
        tl.store(dzero_point_ptr + b, canonical(tl.sum(tl.load(at + blocks * PARTS), 1) * factor))


def fake_quantize_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    format: Format,
    block: launch.Shape,
    zero_point: torch.Tensor | None,
    limits: tuple[int, int],
    lsq_mask: bool,
    grad_factor: float,
    dx: torch.Tensor,
    dscale: torch.Tensor,
    dzero_point: torch.Tensor | None = None,
) -> None:
    shape, block = launch.flatten((x.shape[0], x.shape[1]), block, formats.FLOAT32)
    chosen = launch.choose_blocks(shape, block, 2 * x.dtype.itemsize, formats.FLOAT32)  # of x and dy
    affine, scale_cols, blocks = zero_point is not None, scale.shape[1], scale.numel()
    meaning = (formats.get(x.dtype), format, affine, limits, lsq_mask, chosen, launch.arch(x.device))
    if chosen.chunks:
        launch.launch(
            fake_quantize_backward_kernel, launch.cdiv(blocks, chosen.count), x.device,
            dy, x, scale, zero_point, dx, dscale, dzero_point,
            *shape, *block, scale_cols, blocks, float(grad_factor), *meaning,
            warps=chosen.warps,
        )  # fmt: skip
        return
    partial = torch.empty((2, blocks, chosen.parts), dtype=torch.float32, device=x.device)
    launch.launch(
        partial_gradients_kernel, blocks * chosen.parts, x.device,
        dy, x, scale, zero_point, dx, partial, *shape, *block, scale_cols, blocks, *meaning,
        warps=chosen.warps,
    )  # fmt: skip
    launch.launch(
        combine_gradients_kernel, blocks, x.device,
        partial, dscale, dzero_point, blocks, float(grad_factor), affine, chosen.parts,
        warps=launch.WARPS if chosen.parts > 256 else 1,
    )  # fmt: skip
