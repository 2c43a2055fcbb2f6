"""found[I, J] = the part of scale[I, J] whose codes of block (I, J) of x leave the least error"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantlib import formats
from quantlib.backends.composite.numerics import (
    Block,
    decode_float,
    effective_scale,
    encode_float,
    float_codes,
    spread,
)
from quantlib.formats import FloatFormat, Format
from quantlib.reference.search_scale import SUMS, by_magnitude, parts


def search_scale(
    x: Tensor,
    scale: Tensor,
    format: Format,
    block: Block,
    method: str,
    kept: str,
    zero_point: Tensor | None,
    energy: Tensor | None,
    found: Tensor,
) -> None:
    M, K = x.shape
    x, magnitude = x.float(), by_magnitude(method)
    z = None if zero_point is None else spread(zero_point, M, K, block)
    s0 = effective_scale(scale, format)
    r0, least = s0.reciprocal(), torch.full_like(s0, math.inf)
    found.copy_(effective_scale(narrowed(s0, kept), format))
    for part in parts(method):
        # 1. a part of the scale, as it will be kept
        s = effective_scale(narrowed(s0 * (part / 32), kept), format)
        # 2. the errors of the codes in units of that scale
        t = x * spread(s.reciprocal(), M, K, block)
        u = units(t, format, z) - t
        e = u * u * t.abs() if magnitude else u * u
        total = block_sums(e if energy is None else e * energy, block)
        # 3. in units of the first scale; a later one must be better
        q = (s * r0).abs()
        loss = total * q * q * q if magnitude else total * q * q
        better = loss < least
        least = torch.where(better, loss, least)
        found.copy_(torch.where(better, s, found))


def narrowed(s: Tensor, kept: str) -> Tensor:
    """s as a number of ``kept``: |s| within its smallest above 0 and its largest, rounded to nearest; NaN stays."""
    f = formats.get(kept)
    assert isinstance(f, FloatFormat)
    if f.bits == 32:
        return s
    s = s.abs().clamp(f.smallest, f.max).copysign(s)
    return decode_float(float_codes(encode_float(s, f, saturate=True), f), f)


def units(t: Tensor, f: Format, zero_point: Tensor | None) -> Tensor:
    """Return the values of the codes of t, in units of the scale."""
    if isinstance(f, FloatFormat):
        return decode_float(float_codes(encode_float(t, f, saturate=True), f), f)
    qmin, qmax = f.range(zero_point is not None)
    if zero_point is None:
        return t.clamp(qmin, qmax).round()
    z = zero_point.clamp(qmin, qmax)
    return torch.minimum(torch.maximum(t, (qmin - z).float()), (qmax - z).float()).round()


def block_sums(e: Tensor, block: Block) -> Tensor:
    """[M, K] -> [ceil(M / br), ceil(K / bk)]: the sum of each block, in an order that no backend changes."""
    (M, K), (br, bk) = e.shape, block
    # 1. every row of a block has sums of its own, sum l of the columns l, l + SUMS, ..., from left to right
    laid = pad(e, (0, -K % bk, 0, -M % br)).unflatten(1, (-1, bk))
    laid = pad(laid, (0, -bk % SUMS)).unflatten(2, (-1, SUMS))
    row = torch.zeros_like(laid[:, :, 0])
    for step in laid.unbind(2):
        row += step
    # 2. neighbours are added, until one is left
    while row.shape[-1] > 1:
        row = row[..., ::2] + row[..., 1::2]
    # 3. rows are added from the first on
    rows = row[..., 0].unflatten(0, (-1, br))
    total = torch.zeros_like(rows[:, 0])
    for i in rows.unbind(1):
        total += i
    return total
