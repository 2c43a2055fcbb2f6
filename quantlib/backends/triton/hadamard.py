"""y[..., b n + i] = sum over j of (-1)^(bits that i and j share) x[..., b n + j] / sqrt(n), n the block

One program holds whole blocks in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.numerics import decode_float, encode_float
from quantlib.backends.triton.tile import codes_at, load, store

ELEMENTS = 1 << 16 if launch.INTERPRETED else 4096  # of a program


@triton.jit
def butterflies(x, COUNT: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr):
    """a + b and a - b of the elements a and b that are H apart: x [COUNT, BLOCK]"""
    pairs = tl.permute(tl.reshape(x, [COUNT, BLOCK // (2 * H), 2, H]), [0, 1, 3, 2])
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [COUNT, BLOCK])


@triton.jit
def hadamard_kernel(
    x_ptr, y_ptr,  # [blocks, BLOCK] of row X
    blocks, factor,
    X: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)[:, None]
    at = b * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (b < blocks) & (at >= 0)
    x = decode_float(load(codes_at(x_ptr, X) + at, mask, not EXACT), X, ARCH)
    for stage in tl.static_range(STAGES):
        x = butterflies(x, COUNT, BLOCK, 1 << stage)
    store(codes_at(y_ptr, X) + at, encode_float(x * factor, X, False, ARCH), mask, not EXACT)


def hadamard(x: torch.Tensor, block: int, y: torch.Tensor) -> None:
    blocks = x.numel() // block
    count = min(max(ELEMENTS // block, 1), launch.power_of_2(blocks))
    launch.launch(
        hadamard_kernel, launch.cdiv(blocks, count), x.device,
        x, y, blocks, block**-0.5, formats.get(x.dtype), count, block, block.bit_length() - 1, blocks % count == 0,
        launch.arch(x.device),
        warps=max(1, min(launch.WARPS, count * block // 256)),
    )  # fmt: skip
