"""y = activation(x) in torch: the steps of ``quantlib/reference/activation.py``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quantlib.backends.composite.numerics import canonical, constant
from quantlib.reference.activation import (
    EXP,
    GELU_A,
    GELU_B,
    LN2_HIGH,
    LN2_LOW,
    LOG2_E,
    TAIL,
    TAIL_END,
    TAIL_SLOPE,
)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """[...] float32 -> [...] float32; NaN as 0x7FFFFFFF."""
    if activation == "relu":
        x = torch.where(x < 0, 0, x)
    elif activation == "gelu":
        x = _gelu(x)
    elif activation is not None:
        low = x.clamp(min=-torch.finfo(torch.float32).max)
        t = low * (_of(x, GELU_A) + _of(x, GELU_B) * (low * low)) if activation == "gelu_tanh" else low
        x = low / (1 + _exp(-t))
    return canonical(x)


def _exp(x: Tensor) -> Tensor:
    """e^x = 2^k * e^r, |r| <= ln(2) / 2"""
    x = x.clamp(-104, 89)
    k = (x * _of(x, LOG2_E)).round()
    r = (x - k * _of(x, LN2_HIGH)) - k * _of(x, LN2_LOW)
    p = _horner(EXP, r)
    p = (p * (r * r) + r) + 1
    # a NaN has no power of two: any will do
    k = torch.where(k == k, k, 0).int()
    half = k >> 1
    return p * (half + 127 << 23).view(torch.float32) * (k - half + 127 << 23).view(torch.float32)


def _gelu(x: Tensor) -> Tensor:
    """max(x, 0) - z * Phi(-z), z = |x|"""
    z = x.abs().clamp(max=float(TAIL_END))
    t = (1 + _of(x, TAIL_SLOPE) * z).reciprocal()
    return torch.where(x > 0, x, 0) - z * (_exp(-(z * z) * 0.5) * (t * _horner(TAIL, t)))


def _horner(coefficients: Sequence[np.float32], t: Tensor) -> Tensor:
    p = _of(t, coefficients[0])
    for c in coefficients[1:]:
        p = p * t + _of(t, c)
    return p


def _of(x: Tensor, value: np.float32) -> Tensor:
    """A float32 on x's device: what a Python number becomes is for torch to say."""
    return constant(x, float(value))
