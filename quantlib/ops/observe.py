"""scale[I, J] of a range lowest[I, J]..highest[I, J], and the ranges and scales that one takes of x[i, j]

Observers are made of these expressions over whole tensors: nothing here waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.composite.numerics import reduce_blocks
from quantlib.ops.check import Block
from quantlib.ops.compute_scale import compute_scale
from quantlib.ops.fake_quantize import fake_quantize
from quantlib.spec import matrix_shape

Scale = tuple[Tensor, Tensor | None]  # [I, J] float32, and the zero point, int32 of its shape, of an affine range
STEPS = 64  # ranges that a search tries


def range_of(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each block of x [M, K] float32, widened to hold 0; NaN counts as 0."""
    br, bk = block
    x = torch.where(x == x, x, 0)  # as the padding of reduce_blocks: 0 is in the range anyway
    return tuple(reduce_blocks(x, (br, bk), reduce) for reduce in (torch.amin, torch.amax))  # type: ignore[return-value]


def scale_of_range(lowest: Tensor, highest: Tensor, format: str, symmetric: bool) -> Scale:
    """Return the scales (C4) of blocks whose least and largest values [I, J] are known."""
    ends = torch.stack([lowest, highest], -1)
    result = compute_scale(ends, format, (1, 2), symmetric=symmetric)
    scale, zero_point = (result, None) if isinstance(result, Tensor) else result
    return scale.view(lowest.shape), None if zero_point is None else zero_point.view(lowest.shape)


def lsq_scale(x: Tensor, format: str, block: Block) -> Tensor:
    """2 mean|x| / sqrt(Q) of each block of x [M, K] float32: [I, J].

    Notes
    -----
    Esser et al., Learned Step Size Quantization, 2020, section 2.1.
    """
    br, bk = block
    count = reduce_blocks(torch.ones_like(x), (br, bk), torch.sum)
    mean = reduce_blocks(x.abs(), (br, bk), torch.sum) / count
    return (2 / math.sqrt(formats.get(format).max) * mean).clamp(min=formats.SCALE_MIN)


def mse_scale(
    x: Tensor, lowest: Tensor, highest: Tensor, format: str, block: Block, symmetric: bool, counts: Tensor | None = None
) -> Scale:
    """The scale of that part i / STEPS of each block's range which leaves the least sum of squared errors.

    Parameters
    ----------
    x : Tensor [M, K] float32
    lowest, highest : Tensor [I, J]
        The range of each block; the wider one is taken of two that are equally good.
    counts : Tensor [M, K], optional
        How often each x occurs.
    """
    (M, K), (br, bk) = matrix_shape(x.shape), block
    best = torch.full_like(lowest, math.inf, dtype=torch.float64)
    scale, zero_point = scale_of_range(lowest, highest, format, symmetric)
    for i in range(STEPS, 0, -1):
        s, z = scale_of_range(lowest * (i / STEPS), highest * (i / STEPS), format, symmetric)
        error = (fake_quantize(x, s, format, block=(br, bk), zero_point=z) - x).double().square()
        error = reduce_blocks(error if counts is None else error * counts, (min(br, M), min(bk, K)), torch.sum)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, s, scale)
        zero_point = None if zero_point is None or z is None else torch.where(better, z, zero_point)
    return scale, zero_point
