"""parameter -= rate * m / (sqrt(v) * correction + eps), m and v moving averages in 8 bits

One program holds whole blocks, so that each element is read once and written once, in place where that is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.triton import launch
from quantlib.backends.triton.numerics import (
    NAN,
    SCALE_MIN,
    bits_of,
    canonical,
    decode_float,
    encode_float,
    float_of,
    int_to_float,
    reciprocal,
    round_to_int,
    within,
)
from quantlib.backends.triton.tile import codes_at, load, store
from quantlib.reference.adamw_step import M_CODES, V_CODES

ELEMENTS = 1 << 16 if launch.INTERPRETED else 2048  # of a program
WIDTH = 1024  # columns of a program where the states are float32


@triton.jit
def effective_scale(s, Q: tl.constexpr):
    """|s| clamped to what C4 allows for squares, its sign kept; a NaN stays."""
    clamped = within(s, SCALE_MIN, Q.scale_max)
    return tl.where(s == s, clamped, float_of(tl.full(s.shape, NAN, tl.uint32)))


@triton.jit
def decode(codes, s, Q: tl.constexpr):
    """fl(q |q| * s)"""
    q = codes.to(tl.int32)
    return int_to_float(q * tl.abs(q) if Q.signed else q * q) * s


@triton.jit
def encode(x, Q: tl.constexpr):
    """[blocks, columns] -> codes and a scale a block: |q| is the number of squares (n + 1/2)^2 below |x| / s."""
    magnitude = bits_of(x) & 0x7FFFFFFF
    amax = float_of(tl.max(magnitude.to(tl.int32), 1).to(tl.uint32))
    s = effective_scale(tl.div_rn(amax, tl.full(amax.shape, Q.most * Q.most, tl.float32)), Q)
    y = float_of(magnitude) * reciprocal(s)[:, None]
    y = tl.where(y == y, tl.minimum(y, Q.most * Q.most), 0.0)
    # the nearest root, then one more or less where the border between two codes says so
    q = round_to_int(tl.sqrt_rn(y))
    above, below = int_to_float(q) + 0.5, int_to_float(q) - 0.5
    q += (y > above * above).to(tl.int32)
    q -= ((q > 0) & (y <= below * below)).to(tl.int32)
    return tl.where((bits_of(x) >> 31) != 0, -q, q), s


@triton.jit
def mixed(x):
    """A permutation of 32 bits (C9)"""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def at_random(x, key_ptr, row, column, X: tl.constexpr):
    """[blocks, columns] float32 -> the code of bfloat16 above or below, by the key, the row and the column (C9)."""
    first, second = tl.load(key_ptr).to(tl.uint32, bitcast=True), tl.load(key_ptr + 1).to(tl.uint32, bitcast=True)
    a = mixed(first ^ row.to(tl.uint32))
    b = mixed(a ^ second)
    random = mixed(mixed(b ^ column.to(tl.uint32)) + a) >> 16
    return tl.where(x == x, (bits_of(x) + random) >> 16, X.nan_code)


@triton.jit
def adamw_step_kernel(
    parameter_ptr, gradient_ptr,  # [M, K] of row X
    m_ptr, v_ptr,  # [M, K] int8 and uint8, or float32
    m_scale_ptr, v_scale_ptr,  # [M, ceil(K / block)] float32
    constants_ptr,  # [9] float32
    key_ptr,  # [2] int32, or None
    parameter_out_ptr, m_out_ptr, v_out_ptr, m_scale_out_ptr, v_scale_out_ptr,
    M, K, across, first_row, first_column,
    X: tl.constexpr, KEPT: tl.constexpr, RANDOM: tl.constexpr, MC: tl.constexpr, VC: tl.constexpr,
    COUNT: tl.constexpr, COLS: tl.constexpr, EXACT: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    i, J = b // across, b % across
    j = J[:, None] * COLS + tl.arange(0, COLS)[None, :]
    exists = i < M
    mask = exists[:, None] & (j < K)
    at = i[:, None] * K + j
    decay, l2, beta1 = tl.load(constants_ptr), tl.load(constants_ptr + 1), tl.load(constants_ptr + 2)
    rest1, beta2, rest2 = tl.load(constants_ptr + 3), tl.load(constants_ptr + 4), tl.load(constants_ptr + 5)
    rate, correction, eps = tl.load(constants_ptr + 6), tl.load(constants_ptr + 7), tl.load(constants_ptr + 8)
    x = decode_float(load(codes_at(parameter_ptr, X) + at, mask, not EXACT), X, ARCH)
    g = decode_float(load(codes_at(gradient_ptr, X) + at, mask, not EXACT), X, ARCH)
    m = load(m_ptr + at, mask, not EXACT)
    v = load(v_ptr + at, mask, not EXACT)
    # 1. the states as float32
    if KEPT:
        m = decode(m, effective_scale(tl.load(m_scale_ptr + b, exists, 0.0), MC)[:, None], MC)
        u = decode(v, effective_scale(tl.load(v_scale_ptr + b, exists, 0.0), VC)[:, None], VC)
        v = u * u
    # 2. the moving averages
    g = tl.where(l2 == 0.0, g, g + l2 * x)
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    u = tl.sqrt_rn(v)
    # 3. the parameter
    x = x * decay - tl.div_rn(rate * m, u * correction + eps)
    if RANDOM:
        code = at_random(x, key_ptr, (first_row + i)[:, None], first_column + j, X)
    else:
        code = encode_float(x, X, False, ARCH)
    store(codes_at(parameter_out_ptr, X) + at, code, mask, not EXACT)
    # 4. the states as they are kept
    if KEPT:
        q, s = encode(tl.where(mask, m, 0.0), MC)
        store(m_out_ptr + at, q, mask, not EXACT)
        tl.store(m_scale_out_ptr + b, s, exists)
        q, s = encode(tl.where(mask, u, 0.0), VC)
        store(v_out_ptr + at, q, mask, not EXACT)
        tl.store(v_scale_out_ptr + b, s, exists)
    else:
        store(m_out_ptr + at, canonical(m), mask, not EXACT)
        store(v_out_ptr + at, canonical(v), mask, not EXACT)


def adamw_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    m_scale: torch.Tensor,
    v_scale: torch.Tensor,
    constants: torch.Tensor,
    block: int,
    key: torch.Tensor | None,
    origin: tuple[int, int],
    parameter_out: torch.Tensor,
    m_out: torch.Tensor,
    v_out: torch.Tensor,
    m_scale_out: torch.Tensor,
    v_scale_out: torch.Tensor,
) -> None:
    M, K = parameter.shape
    if not block and key is None:  # the elements stand alone
        M, K = 1, M * K
    cols = block or min(WIDTH, launch.power_of_2(K))
    across = launch.cdiv(K, cols)
    count = min(max(ELEMENTS // cols, 1), launch.power_of_2(M * across))
    exact = K % cols == 0 and M * across % count == 0
    launch.launch(
        adamw_step_kernel, launch.cdiv(M * across, count), parameter.device,
        parameter, gradient, m, v, m_scale, v_scale, constants, key,
        parameter_out, m_out, v_out, m_scale_out, v_scale_out, M, K, across, *origin,
        formats.get(parameter.dtype), block > 0, key is not None, M_CODES, V_CODES, count, cols, exact,
        launch.arch(parameter.device),
        warps=max(1, min(launch.WARPS, count * cols // 256)),
    )  # fmt: skip
