"""y = activation(x) in binary32, written so that every backend gives the same bytes: no library's exp, erf or tanh.

``csrc/activation.h``, ``backends/triton/activation.py`` and ``backends/composite/activation.py`` are this file in three
other languages: the same names and the same numbered steps, one rounding an operation.
"""

from __future__ import annotations

import numpy as np

from quantlib.reference.numerics import Array, canonical

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")

LOG2_E = np.float32(1.44269502)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)  # k * LN2_HIGH is exact for |k| < 2^15
# e^r = 1 + r + r^2 * P(r) for |r| <= ln(2) / 2 (Cephes, expf), the highest power first
EXP = tuple(map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 0.16666665459, 0.5)))
# Phi(-z) = exp(-z^2 / 2) * t * Q(t), t = 1 / (1 + 0.34 z): a minimax fit on [0, 16], 0.8 * 2^-24 off at most
TAIL = tuple(
    map(
        np.float32,
        (-0.02517484, 0.13509157, -0.26445132, 0.1927802, -0.03861637, 0.112938516, 0.11576874, 0.13603917, 0.13562436),
    )
)
TAIL_SLOPE, TAIL_END = np.float32(0.34), np.float32(16)  # exp(-16^2 / 2) is 0 in binary32
# gelu_tanh(x) = x * sigmoid(x * (A + B * x^2)), A = 2 sqrt(2 / pi), B = 0.044715 A
GELU_A, GELU_B = np.float32(1.5957691), np.float32(0.071354814)
LOWEST = np.float32(-3.4028235e38)  # stands in for -inf


def activate(x: Array, activation: str | None) -> Array:
    """[...] float32 -> [...] float32; NaN as 0x7FFFFFFF. -inf gives its limit, a zero, and not the NaN of -inf * 0."""
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        if activation == "relu":
            x = np.where(x < 0, np.float32(0), x)
        elif activation == "gelu":
            x = gelu(x)
        elif activation == "gelu_tanh":
            low = np.maximum(x, LOWEST)
            x = low / (np.float32(1) + exp(-(low * (GELU_A + GELU_B * (low * low)))))
        elif activation == "silu":
            low = np.maximum(x, LOWEST)
            x = low / (np.float32(1) + exp(-low))
        elif activation is not None:
            raise ValueError(f"activation must be None, {', '.join(ACTIVATIONS)}, got {activation!r}")
        return canonical(x)


def exp(x: Array) -> Array:
    """e^x, within 2 units in the last place; 0 from -104 on, infinity from 89 on."""
    # 1. e^x = 2^k * e^r, |r| <= ln(2) / 2
    x = np.minimum(np.maximum(x, np.float32(-104)), np.float32(89))
    k = np.rint(x * LOG2_E)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    # 2. e^r
    p = EXP[0]
    for c in EXP[1:]:
        p = p * r + c
    p = (p * (r * r) + r) + np.float32(1)
    # 3. times 2^k in two steps, each a normal number
    k = k.astype(np.int32)
    half = k >> 1
    return p * _power_of_two(half) * _power_of_two(k - half)


def gelu(x: Array) -> Array:
    """x * Phi(x) = max(x, 0) - z * Phi(-z), z = |x|."""
    z = np.minimum(np.abs(x), TAIL_END)
    t = np.float32(1) / (np.float32(1) + TAIL_SLOPE * z)
    q = TAIL[0]
    for c in TAIL[1:]:
        q = q * t + c
    tail = exp(-(z * z) * np.float32(0.5)) * (t * q)
    return np.where(x > 0, x, np.float32(0)) - z * tail


def _power_of_two(k: Array) -> Array:
    return ((k + np.int32(127)) << np.int32(23)).view(np.float32)
