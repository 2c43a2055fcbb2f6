"""codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.numerics import Block, constant, effective_scale, encode_float, spread, store
from quantlib.backends.packing import pack
from quantlib.formats import FloatFormat, Format


def quantize(x: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None, codes: Tensor) -> None:
    M, K = x.shape
    t = x.float() * spread(effective_scale(scale, format).reciprocal(), M, K, block)
    if isinstance(format, FloatFormat):
        code = encode_float(t, format, saturate=True)
    else:
        affine = zero_point is not None
        qmin, qmax = format.range(affine)
        z = spread(zero_point.clamp(qmin, qmax), M, K, block) if zero_point is not None else constant(scale, 0).int()
        # 1. NaN is the code of zero  2. clamp first, to integers  3. round to nearest even, add the zero point
        t = torch.where(t == t, t, 0)
        code = torch.minimum(torch.maximum(t, (qmin - z).float()), (qmax - z).float()).round().int() + z
    store(codes, code if format.whole else pack(code, format))
