"""out[i, j] = c[i, j] * scale[i // br, j // bk], c the value of x's code in units of the scale"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.numerics import (
    Block,
    constant,
    decode_float,
    effective_scale,
    encode_float,
    float_codes,
    float_format,
    spread,
    store,
)
from quantlib.formats import FloatFormat, Format

Limits = tuple[int, int]


def fake_quantize(
    x: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None, limits: Limits, out: Tensor
) -> None:
    t, c, _, s = project(x, scale, format, block, zero_point, limits, lsq_mask=False)
    store(out, encode_float(torch.where(t == t, c * s, torch.nan), float_format(out.dtype), saturate=False))


def project(
    x: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None, limits: Limits, lsq_mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[M, K] -> t, the value c of its code in units of the scale, whether it is inside (m), and the scale (C10)."""
    M, K = x.shape
    s = effective_scale(scale, format)
    t = x.float() * spread(s.reciprocal(), M, K, block)
    s = spread(s, M, K, block)
    if isinstance(format, FloatFormat):
        c = decode_float(float_codes(encode_float(t, format, saturate=True), format), format)
        a = t.view(torch.int32) & 0x7FFFFFFF
        inside = a <= (format.max_bits if lsq_mask else format.rounds_to_max_bits)
        return t, torch.where(t == t, c, 0), inside, s
    qmin, qmax = limits
    z = constant(scale, 0) if zero_point is None else spread(zero_point, M, K, block)
    # 1. z as it is used forward and backward: rounded, a code. A NaN is 0
    z = torch.where(z == z, z, 0).clamp(qmin, qmax).round()
    lo, hi = qmin - z, qmax - z
    # 2. one step beyond the range is as good as any further; NaN stays
    t = torch.minimum(torch.maximum(t, lo - 1), hi + 1)
    # 3. round, clamp; adding zero makes -0 the +0 that an integer has
    k = t.round()
    c = torch.where(t == t, torch.minimum(torch.maximum(k, lo), hi), 0) + 0
    # 4. inside by the rounded value, or by t itself as LSQ has it; NaN is outside
    v = t if lsq_mask else k
    return t, c, (lo <= v) & (v <= hi), s
