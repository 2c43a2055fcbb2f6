"""parameter -= rate * m / (sqrt(v) * correction + eps), m and v moving averages in 8 bits"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.numerics import (
    canonical,
    constant,
    decode_float,
    encode_float,
    float_format,
    reduce_blocks,
    spread,
    store,
)
from quantlib.formats import SCALE_MIN
from quantlib.reference.adamw_step import M_CODES, V_CODES, Squares

WORD = 0xFFFFFFFF


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    constants: Tensor,
    block: int,
    key: Tensor | None,
    origin: tuple[int, int],
    parameter_out: Tensor,
    m_out: Tensor,
    v_out: Tensor,
    m_scale_out: Tensor,
    v_scale_out: Tensor,
) -> None:
    decay, l2, beta1, rest1, beta2, rest2, rate, correction, eps = constants.unbind()
    f = float_format(parameter.dtype)
    x, g = (decode_float(t, f) for t in (parameter, gradient))
    # 1. the states as float32
    if block:
        m = decode(m, m_scale, M_CODES, block)
        u = decode(v, v_scale, V_CODES, block)
        v = u * u
    # 2. the moving averages
    g = torch.where(l2 == 0, g, g + l2 * x)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    u = square_root(v)
    # 3. the parameter
    x = x * decay - rate * m / (u * correction + eps)
    store(parameter_out, encode_float(x, f, saturate=False) if key is None else at_random(x, f.nan_code, key, origin))
    # 4. the states as they are kept
    if block:
        encode(m, M_CODES, block, m_out, m_scale_out)
        encode(u, V_CODES, block, v_out, v_scale_out)
    else:
        m_out.copy_(canonical(m))
        v_out.copy_(canonical(v))


def square_root(x: Tensor) -> Tensor:
    """The nearest float32: torch's own, of a vector library on the CPU, is often the next one.

    The root of a float32 is never so near to a midpoint between two that the last places of a float64 decide.
    """
    return x.double().sqrt().float()


def decode(codes: Tensor, scale: Tensor, f: Squares, block: int) -> Tensor:
    """fl(q |q| * s), NaN where the scale is."""
    q, (M, K) = codes.int(), codes.shape
    return (q * q.abs()).float() * spread(effective_scale(scale, f), M, K, (1, block))


def encode(x: Tensor, f: Squares, block: int, codes: Tensor, scale: Tensor) -> None:
    """s = clamp(fl(amax / most^2)), |q| the number of squares (n + 1/2)^2 below fl(|x| / s)"""
    M, K = x.shape
    amax = reduce_blocks(x.view(torch.int32) & 0x7FFFFFFF, (1, block), torch.amax).view(torch.float32)
    s = effective_scale(amax / constant(x, f.most**2), f)
    y = x.abs() * spread(s.reciprocal(), M, K, (1, block))
    halves = (torch.arange(f.most, dtype=torch.float32, device=x.device) + 0.5).square()
    q = torch.where(y == y, torch.bucketize(y, halves), 0)
    codes.copy_(torch.where(x < 0, -q, q))
    scale.copy_(s)


def effective_scale(scale: Tensor, f: Squares) -> Tensor:
    clamped = scale.abs().clamp(SCALE_MIN, f.scale_max)
    return canonical(torch.where(scale < 0, -clamped, clamped))


def at_random(x: Tensor, nan_code: int, key: Tensor, origin: tuple[int, int]) -> Tensor:
    """[M, K] float32 -> the code of bfloat16 above or below, by the key and each element's row and column (C9)."""
    (M, K), (first, second) = x.shape, key.long() & WORD
    row = origin[0] + torch.arange(M, device=x.device)[:, None]
    column = origin[1] + torch.arange(K, device=x.device)[None, :]
    a = _mixed(first ^ (row & WORD))
    b = _mixed(a ^ second)
    random = _mixed((_mixed(b ^ (column & WORD)) + a) & WORD) >> 16
    code = (x.view(torch.int32).long() & WORD) + random >> 16
    return torch.where(x == x, code, nan_code)


def _mixed(x: Tensor) -> Tensor:
    """A permutation of 32 bits, in int64."""
    x = _times(x ^ x >> 16, 0x7FEB352D)
    x = _times(x ^ x >> 15, 0x846CA68B)
    return x ^ x >> 16


def _times(x: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product of 32-bit numbers, half a factor at a time: int64 holds 48 bits."""
    return (x * (factor & 0xFFFF) + ((x * (factor >> 16) & 0xFFFF) << 16)) & WORD
