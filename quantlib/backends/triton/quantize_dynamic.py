"""scale = compute_scale(x), codes = quantize(x, scale), in one read of x where a block fits in registers"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.backend import Kernel
from quantlib.backends.triton import launch
from quantlib.backends.triton.compute_scale import compute_scale, read_blocks, store_scale
from quantlib.backends.triton.numerics import decode_float, encode, range_scale, reciprocal
from quantlib.backends.triton.quantize import quantize
from quantlib.backends.triton.tile import at_bytes, block_at, chunk_at, codes_at, pack, store
from quantlib.formats import Format


@triton.jit
def quantize_dynamic_kernel(
    x_ptr,  # [M, K] of row X
    codes_ptr,  # [M, K] of row F, or [M, ceil(K / P)] bytes
    scale_ptr,  # [ceil(M / br), ceil(K / bk)] float32
    zero_point_ptr,  # the same shape, int32, or None
    M, K, br, bk, scale_cols, blocks, codes_stride,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, B: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * B.count + tl.arange(0, B.count)
    i, j, rows, cols = block_at(b[:, None, None], M, K, br, bk, scale_cols, B)
    x_ptr = codes_at(x_ptr, X) + (i * K + j)
    codes_ptr = codes_at(codes_ptr, F) + (i * codes_stride + j // F.per_byte)
    exists = b[:, None, None] < blocks
    chunks, lowest, highest = read_blocks(x_ptr, K, rows, cols, exists, X, AFFINE, B)
    s, z = range_scale(lowest, highest, X, F, AFFINE)
    store_scale(scale_ptr, zero_point_ptr, b, s, z, b < blocks, AFFINE)
    r_scale, s, z = reciprocal(s)[:, None, None], s[:, None, None], z[:, None, None]
    CHUNKS: tl.constexpr = B.chunks
    WIDTH: tl.constexpr = B.cols // F.per_byte  # of the bytes of a chunk
    for u in tl.static_range(CHUNKS):
        r, c = chunk_at(u, B)
        t = decode_float(chunks[u], X, ARCH if B.cols >= 32 else 0) * r_scale  # pairs of narrow blocks: 8 bytes spilled
        codes = encode(t, z, F, AFFINE, ARCH, s if B.cols >= 32 else None)
        inside = exists & (r < rows)
        if not F.whole:
            if not B.exact:  # the bits after the last code of a byte are 0
                codes = tl.where(c < cols, codes, 0)
            codes = pack(codes.reshape(B.count * B.rows, B.cols), F, ARCH).reshape(B.count, B.rows, WIDTH)
            c = tl.arange(0, WIDTH)[None, None, :] + (0 if B.rows > 1 else u * WIDTH)
            ptr = at_bytes(codes_ptr + r * codes_stride, c, X, F)
            store(ptr, codes, inside & (c * F.per_byte < cols), not B.exact)
        else:
            store(codes_ptr + r * codes_stride + c, codes, inside & (c < cols), not B.exact)


def quantize_dynamic(
    x: torch.Tensor,
    format: Format,
    block: launch.Shape,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
) -> None:
    project = prepare(x, format, block, codes, scale, zero_point)
    if project is None:
        compute_scale(x, format, block, scale, zero_point)
        quantize(x, scale, format, block, zero_point, codes)
    else:
        project(x, format, block, codes, scale, zero_point)


def prepare(
    x: torch.Tensor,
    format: Format,
    block: launch.Shape,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
) -> Kernel | None:
    """Return the kernel of calls like this one, which has but to be told where their tensors lie; None for two."""
    shape, flat_block = launch.flatten((x.shape[0], x.shape[1]), block, format)
    chosen = launch.choose_blocks(shape, flat_block, x.dtype.itemsize, format)
    shares_a_byte = flat_block[1] % format.per_byte > 0 and not chosen.across
    if not chosen.chunks or shares_a_byte:
        return None
    scale_size = scale.shape[1], scale.numel()
    constants = (
        *shape, *flat_block, *scale_size, codes.shape[1],
        formats.get(x.dtype), format, zero_point is not None, chosen, launch.arch(x.device),
    )  # fmt: skip
    programs = launch.cdiv(scale.numel(), chosen.count)
    start = launch.repeated(quantize_dynamic_kernel, programs, x.device, constants, warps=chosen.warps)

    def project(
        x: torch.Tensor,
        format: Format,
        block: launch.Shape,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None = None,
    ) -> None:
        start(x, launch.codes_of(codes), scale, zero_point)

    return project


quantize_dynamic.prepare = prepare
