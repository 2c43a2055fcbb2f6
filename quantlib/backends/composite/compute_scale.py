"""scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), or the affine scale and zero point of its range"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.numerics import INFINITY, Block, constant, effective_scale, reduce_blocks
from quantlib.formats import Format, IntFormat


def compute_scale(x: Tensor, format: Format, block: Block, scale: Tensor, zero_point: Tensor | None = None) -> None:
    x = x.float()
    amax = reduce_blocks(x.view(torch.int32) & 0x7FFFFFFF, block, torch.amax)
    if zero_point is None:
        scale.copy_(effective_scale(amax.view(torch.float32) / constant(amax, format.max), format))
        return
    assert isinstance(format, IntFormat)
    is_nan = amax > INFINITY
    finite = torch.where(x == x, x, 0)
    qmin, qmax = format.range(affine=True)
    # 1. widen to hold zero, so that zero has a code: the padding of reduce_blocks is zero too
    lowest = torch.where(is_nan, torch.nan, reduce_blocks(finite, block, torch.amin).clamp(max=0))
    highest = torch.where(is_nan, torch.nan, reduce_blocks(finite, block, torch.amax).clamp(min=0))
    # 2. scale; an infinite range gives the largest
    s = effective_scale((highest - lowest) / constant(lowest, qmax - qmin), format)
    # 3. zero point: the code of zero when the lowest value has code qmin; 0 where the scale is NaN
    z = qmin - lowest * s.reciprocal()
    zero_point.copy_(torch.where(z == z, z, 0).clamp(qmin, qmax).round().int())
    scale.copy_(s)
