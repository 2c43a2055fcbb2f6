"""found[I, J] = the part of scale[I, J] whose codes of block (I, J) of x leave the least error (contract C4)"""

from __future__ import annotations

import numpy as np

from quantlib import formats
from quantlib.formats import FloatFormat, Format, IntFormat
from quantlib.reference import numerics
from quantlib.reference.numerics import Array
from quantlib.reference.ops import Block, matrix, spread
from quantlib.spec import SIGNED

PARTS = (*range(32, 19, -1), *range(33, 37))  # of 32: the parts of a scale that are tried, in this order
SUMS = 16  # of a row of a block, which are then added in pairs


def search_scale(
    x: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    method: str = "mse",
    kept: str = "float32",
    zero_point: Array | None = None,
    energy: Array | None = None,
) -> Array:
    """found[I, J] = the part of scale[I, J] whose codes of block (I, J) of x leave the least error"""
    f, rows = formats.get(format), matrix(x)
    with np.errstate(all="ignore"):
        s0 = numerics.effective_scale(scale, f)
        r0, found = np.float32(1) / s0, numerics.effective_scale(narrowed(s0, kept), f)
        least = np.full(s0.shape, np.inf, np.float32)
        for part in parts(method):
            # 1. a part of the scale, as it will be kept
            s = numerics.effective_scale(narrowed(s0 * np.float32(part / 32), kept), f)
            # 2. and 3. its loss; a later one must be better
            loss = loss_of(rows, s, r0, f, block, method, zero_point, energy)
            better = loss < least
            least, found = np.where(better, loss, least), np.where(better, s, found)
        return found


def parts(method: str) -> tuple[int, ...]:
    """The parts of 32 that ``method`` tries, in its order: the signed ones follow with the other sign."""
    return (*PARTS, *(-part for part in PARTS)) if method.startswith(SIGNED) else PARTS


def by_magnitude(method: str) -> bool:
    """True if ``method`` counts an error by the magnitude of its element."""
    return method.removeprefix(SIGNED) == "magnitude"


def loss_of(
    x: Array, s: Array, r0: Array, f: Format, block: Block, method: str, zero_point: Array | None, energy: Array | None
) -> Array:
    """loss[I, J] = sum(|u - t|^2 |t|^p energy) |s r0|^(2 + p), where u are the values of the codes of t = x / s."""
    # 2. the errors of the codes in units of the scale
    t = numerics.project(x, spread(s, x.shape, block))
    u = units(t, f, None if zero_point is None else spread(zero_point, x.shape, block)) - t
    e = u * u * np.abs(t) if by_magnitude(method) else u * u
    total = block_sums(e if energy is None else e * energy, block)
    # 3. in units of the first scale
    q = np.abs(s * r0)
    return total * q * q * q if by_magnitude(method) else total * q * q


def narrowed(s: Array, kept: str) -> Array:
    """s as a number of ``kept``: |s| within its smallest above 0 and its largest, rounded to nearest; NaN stays."""
    f = formats.get(kept)
    assert isinstance(f, FloatFormat)
    if f.bits == 32:
        return s
    s = np.copysign(np.clip(np.abs(s), np.float32(f.smallest), np.float32(f.max)), s)
    return numerics.decode_float(numerics.encode_float(s, f, saturate=True), f)


def units(t: Array, f: Format, zero_point: Array | None) -> Array:
    """Return the values of the codes of t, in units of the scale."""
    if isinstance(f, FloatFormat):
        return numerics.decode_float(numerics.encode_float(t, f, saturate=True), f)
    assert isinstance(f, IntFormat)
    affine = zero_point is not None
    z = numerics.clamp_zero_point(np.zeros((), np.int32) if zero_point is None else zero_point, f, affine)
    return (numerics.encode_int(t, z, f, affine) - z).astype(np.float32)


def block_sums(e: Array, block: Block) -> Array:
    """[M, K] -> [ceil(M / br), ceil(K / bk)]: the sum of each block, in an order that no backend changes."""
    (M, K), (br, bk) = e.shape, (max(min(b, n), 1) for b, n in zip(block, e.shape, strict=True))
    down, across, steps = -(-M // br), -(-K // bk), -(-bk // SUMS)
    # 1. every row of a block has sums of its own, sum l of the columns l, l + SUMS, ..., from left to right
    laid = np.zeros((down * br, across * steps * SUMS), np.float32)
    columns = np.arange(K)
    laid[:M, columns // bk * steps * SUMS + columns % bk] = e
    laid = laid.reshape(down, br, across, steps, SUMS)
    row = np.zeros((down, br, across, SUMS), np.float32)
    for step in range(steps):
        row = row + laid[:, :, :, step]
    # 2. neighbours are added, until one is left
    while row.shape[-1] > 1:
        row = row[..., ::2] + row[..., 1::2]
    # 3. rows are added from the first on
    total = np.zeros((down, across), np.float32)
    for i in range(br):
        total = total + row[:, i, :, 0]
    return total
