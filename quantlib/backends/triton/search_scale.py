"""found[I, J] = the part of scale[I, J] whose codes of block (I, J) of x leave the least error"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.numerics import (
    clamp_zero_point,
    decode_float,
    effective_scale,
    encode_float,
    encode_int,
    int_to_float,
    reciprocal,
    within,
)
from quantlib.backends.triton.tile import codes_at
from quantlib.formats import Format
from quantlib.reference.search_scale import PARTS, SUMS, by_magnitude
from quantlib.spec import SIGNED

COUNT: tl.constexpr = tl.constexpr(len(PARTS))
LANES: tl.constexpr = tl.constexpr(SUMS)
BLOCKS = launch.ELEMENTS // SUMS // 4  # of a program: few registers a thread, as the codes of a book take many


@triton.jit
def narrowed(s, KEPT: tl.constexpr, ARCH: tl.constexpr):
    """s as a number of KEPT: |s| within its smallest above 0 and its largest, rounded to nearest; NaN stays."""
    if KEPT.bits == 32:
        return s
    smallest = decode_float(tl.full(s.shape, 1, tl.uint32), KEPT, 0)
    clamped = within(s, smallest, KEPT.max)
    return tl.where(s == s, decode_float(encode_float(clamped, KEPT, True, ARCH), KEPT, ARCH), s)


@triton.jit
def units(t, z, F: tl.constexpr, AFFINE: tl.constexpr, ARCH: tl.constexpr):
    """Return the values of the codes of t, in units of the scale."""
    if F.is_float:
        return decode_float(encode_float(t, F, True, ARCH), F, ARCH)
    else:
        code = encode_int(t, z, F, AFFINE)
        return int_to_float(code - z if AFFINE else code)


@triton.jit
def in_pairs(sums):
    """[count, n] -> [count]: neighbours are added, until one is left."""
    count: tl.constexpr = sums.shape[0]
    n: tl.constexpr = sums.shape[1]
    if n == 1:
        return sums.reshape(count)
    else:
        even, odd = tl.split(sums.reshape(count, n // 2, 2))
        return in_pairs(even + odd)


@triton.jit
def search_scale_kernel(
    x_ptr,  # [M, K] of row X
    scale_ptr,  # [ceil(M / br), ceil(K / bk)] float32
    zero_point_ptr,  # the same shape, int32, or None
    energy_ptr,  # [K] float32, or None
    found_ptr,  # of scale's shape
    M, K, br, bk, scale_cols, blocks,
    X: tl.constexpr, F: tl.constexpr, AFFINE: tl.constexpr, KEPT: tl.constexpr,
    MAGNITUDE: tl.constexpr, SIGNED: tl.constexpr, WEIGHTED: tl.constexpr, BLOCKS: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i, j = b // scale_cols * br, b % scale_cols * bk
    rows, cols = tl.minimum(br, M - i), tl.minimum(bk, K - j)
    lane = tl.arange(0, LANES)[None, :]
    x_ptr = codes_at(x_ptr, X) + (i * K + j)[:, None] + lane
    s0 = effective_scale(tl.load(scale_ptr + b, b < blocks, 1.0), F)
    r0 = reciprocal(s0)
    z = tl.load(zero_point_ptr + b, b < blocks, 0) if AFFINE else tl.full((BLOCKS,), 0, tl.int32)
    z = clamp_zero_point(z, F)[:, None] if AFFINE else z[:, None]
    best, found = tl.full((BLOCKS,), float("inf"), tl.float32), effective_scale(narrowed(s0, KEPT, ARCH), F)
    for n in range(2 * COUNT if SIGNED else COUNT):
        # 1. a part of the scale, as it will be kept: 32, 31, .., 20, 33, .., 36 of 32, then with the other sign
        k = tl.full((BLOCKS,), 0, tl.int32) + n
        if SIGNED:
            k = tl.where(k < COUNT, k, k - COUNT)
        part = int_to_float(tl.where(k < 13, 32 - k, 20 + k)) * 0.03125
        if SIGNED:
            part = tl.where(k == n, part, -part)
        s = effective_scale(narrowed(s0 * part, KEPT, ARCH), F)
        r = reciprocal(s)[:, None]
        # 2. the errors of the codes in units of that scale
        total = tl.full((BLOCKS,), 0.0, tl.float32)
        for row in range(br):
            sums = tl.full((BLOCKS, LANES), 0.0, tl.float32)
            for column in range(0, bk, LANES):
                exists = ((b < blocks) & (row < rows))[:, None] & (column + lane < cols[:, None])
                t = decode_float(tl.load(x_ptr + tl.cast(row, tl.int64) * K + column, exists, 0), X, 0) * r
                u = units(t, z, F, AFFINE, ARCH) - t
                e = u * u * tl.abs(t) if MAGNITUDE else u * u
                if WEIGHTED:
                    e = e * tl.load(energy_ptr + j[:, None] + column + lane, exists, 0.0)
                sums += tl.where(exists, e, 0.0)  # of a NaN scale, errors of what is not there are NaN
            total += in_pairs(sums)
        # 3. in units of the first scale; a later one must be better
        q = s * r0
        loss = total * q * q
        loss = loss * tl.abs(q) if MAGNITUDE else loss
        better = loss < best
        best, found = tl.where(better, loss, best), tl.where(better, s, found)
    tl.store(found_ptr + b, found, b < blocks)


def search_scale(
    x: torch.Tensor,
    scale: torch.Tensor,
    format: Format,
    block: launch.Shape,
    method: str,
    kept: str,
    zero_point: torch.Tensor | None,
    energy: torch.Tensor | None,
    found: torch.Tensor,
) -> None:
    blocks = found.numel()
    count = min(BLOCKS, launch.power_of_2(blocks))
    launch.launch(
        search_scale_kernel, launch.cdiv(blocks, count), x.device,
        x, scale, zero_point, energy, found, *x.shape, *block, found.shape[1], blocks,
        formats.get(x.dtype), format, zero_point is not None, formats.get(kept),
        by_magnitude(method), method.startswith(SIGNED), energy is not None, count, launch.arch(x.device),
        warps=4,
    )  # fmt: skip
