"""Fake quantization, forward and backward, in NumPy (contract C10).

y[i, j] = dequantize(quantize(x[i, j])), and the gradients of a straight-through rounding whose scale is learned. ``x``
and ``dy`` are float32: a narrower one is decoded first, and y and dx are cast back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantlib import formats
from quantlib.formats import FloatFormat
from quantlib.reference import numerics
from quantlib.reference.numerics import Array
from quantlib.reference.ops import Block, matrix, spread


@dataclass(frozen=True)
class Gradients:
    """The gradient terms of each element; the op returns dx, and the sums of the other two over each block."""

    dx: Array  # [M, K] float32: m ? dy : +0
    dscale: Array  # [M, K] float32: dy * (m ? fl(k - t) : c)
    dzero_point: Array  # [M, K] float32: m ? +0 : -fl(dy * s)


def fake_quantize(
    x: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    zero_point: Array | None = None,
    limits: tuple[int, int] | None = None,
) -> Array:
    """y[i, j] = c * scale[i // br, j // bk], c the code of x[i, j] less its zero point"""
    with np.errstate(all="ignore"):
        t, c, _, s = _project(matrix(x), scale, format, block, zero_point, limits, lsq_mask=False)
        return np.where(t == t, c * s, numerics.NAN).reshape(np.shape(x))


def fake_quantize_backward(
    dy: Array,
    x: Array,
    scale: Array,
    format: str,
    *,
    block: Block,
    zero_point: Array | None = None,
    limits: tuple[int, int] | None = None,
    lsq_mask: bool = False,
) -> Gradients:
    """dx[i, j] = m ? dy[i, j] : 0, and the terms of dscale and dzero_point"""
    dy = matrix(dy)
    with np.errstate(all="ignore"):
        t, c, m, s = _project(matrix(x), scale, format, block, zero_point, limits, lsq_mask)
        dscale = dy * np.where(m, c - t, c)
        return Gradients(np.where(m, dy, np.float32(0)), dscale, np.where(m, np.float32(0), -(dy * s)))


def grad_factor(n: int, qmax: float) -> float:
    """1 / sqrt(n * qmax), n elements a scale: LSQ's factor of dscale, as float32 (Esser et al. 2020, 2.2)."""
    return float(np.float32(1.0 / np.sqrt(float(n) * float(qmax))))


def _project(
    x: Array,
    scale: Array,
    format: str,
    block: Block,
    zero_point: Array | None,
    limits: tuple[int, int] | None,
    lsq_mask: bool,
) -> tuple[Array, Array, Array, Array]:
    """[M, K] -> t, the value c of its code in units of the scale, whether it is inside (m), and the scale."""
    f = formats.get(format)
    s = spread(numerics.effective_scale(scale, f), x.shape, block)
    t = numerics.project(x, s)
    if isinstance(f, FloatFormat):
        c = numerics.decode_float(numerics.encode_float(t, f, saturate=True), f)
        inside = numerics.magnitude_bits(t) <= np.uint32(f.max_bits if lsq_mask else f.rounds_to_max_bits)
        return t, np.where(t == t, c, np.float32(0)), inside, s
    qmin, qmax = limits or f.range(affine=zero_point is not None)
    z = np.zeros((), np.float32) if zero_point is None else spread(zero_point, x.shape, block)
    # 1. z as it is used forward and backward: rounded, a code. A NaN is 0
    z = np.rint(np.clip(np.where(z == z, z, 0), qmin, qmax)).astype(np.float32)
    lo, hi = np.float32(qmin) - z, np.float32(qmax) - z
    # 2. one step beyond the range is as good as any further; NaN stays
    t = np.where(t == t, np.minimum(np.maximum(t, lo - np.float32(1)), hi + np.float32(1)), t)
    # 3. round, clamp; adding zero makes -0 the +0 that an integer has
    k = np.rint(t)
    c = np.where(t == t, np.minimum(np.maximum(k, lo), hi), np.float32(0)) + np.float32(0)
    # 4. inside by the rounded value, or by t itself as LSQ has it; NaN is outside
    v = t if lsq_mask else k
    return t, c, (lo <= v) & (v <= hi), s
