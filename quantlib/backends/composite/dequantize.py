"""out[i, j] = decode(codes[i, j]) * scale[i // br, j // bk]"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.numerics import (
    canonical,
    decode_float,
    effective_scale,
    encode_float,
    float_format,
    spread,
    store,
)
from quantlib.backends.packing import unpack, wide_zero_points
from quantlib.backends.weight import QuantizedWeight
from quantlib.formats import FloatFormat


def dequantize(weight: QuantizedWeight, out: Tensor) -> None:
    codes, scale, format, block, zero_point, *_ = weight
    M, K = out.shape
    if not format.whole:
        codes = unpack(codes, format, K)
    s_eff = spread(effective_scale(scale, format), M, K, block)
    if isinstance(format, FloatFormat):
        y = decode_float(codes, format) * s_eff
    else:
        code = codes.int()
        if zero_point is not None:
            z = wide_zero_points(zero_point, format, scale.shape[1]).clamp(*format.range(affine=True))
            code = code - spread(z, M, K, block)
        y = code.float() * s_eff
    y = canonical(y)
    if out.dtype == torch.float32:
        out.copy_(y)
    else:
        store(out, encode_float(y, float_format(out.dtype), saturate=False))
