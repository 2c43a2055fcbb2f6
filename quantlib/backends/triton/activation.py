"""y = activation(x) in Triton: the steps of ``quantlib/reference/activation.py``."""

import triton
import triton.language as tl

from quantlib.backends.triton.numerics import INTEGER, INTEGER_BITS, NAN, canonical, float_of
from quantlib.reference import activation as reference

LOG2_E: tl.constexpr = tl.constexpr(float(reference.LOG2_E))
LN2_HIGH: tl.constexpr = tl.constexpr(float(reference.LN2_HIGH))
LN2_LOW: tl.constexpr = tl.constexpr(float(reference.LN2_LOW))
EXP: tl.constexpr = tl.constexpr(tuple(map(float, reference.EXP)))
TAIL: tl.constexpr = tl.constexpr(tuple(map(float, reference.TAIL)))
EXP_DEGREE: tl.constexpr = tl.constexpr(len(reference.EXP) - 1)
TAIL_DEGREE: tl.constexpr = tl.constexpr(len(reference.TAIL) - 1)
TAIL_SLOPE: tl.constexpr = tl.constexpr(float(reference.TAIL_SLOPE))
TAIL_END: tl.constexpr = tl.constexpr(float(reference.TAIL_END))
GELU_A: tl.constexpr = tl.constexpr(float(reference.GELU_A))
GELU_B: tl.constexpr = tl.constexpr(float(reference.GELU_B))
LOWEST: tl.constexpr = tl.constexpr(float(reference.LOWEST))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """[...] float32 -> [...] float32; NaN as 0x7FFFFFFF. A minimum or maximum here may lose a NaN: it is put back."""
    if ACTIVATION is None:
        return canonical(x)
    elif ACTIVATION == "relu":
        return canonical(tl.where(x < 0.0, 0.0, x))
    else:
        if ACTIVATION == "gelu":
            y = gelu(x)
        else:
            low = tl.maximum(x, LOWEST)
            t = low * (GELU_A + GELU_B * (low * low)) if ACTIVATION == "gelu_tanh" else low
            y = tl.div_rn(low, 1.0 + exp(-t))
        return tl.where(x == x, y, float_of(tl.full(x.shape, NAN, tl.uint32)))


@triton.jit
def exp(x):
    """e^x, within 2 units in the last place; 0 from -104 on, infinity from 89 on."""
    # 1. e^x = 2^k * e^r, |r| <= ln(2) / 2
    x = tl.minimum(tl.maximum(x, -104.0), 89.0)
    rounded = x * LOG2_E + INTEGER
    k = rounded - INTEGER
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    # 2. e^r
    p = horner(r, EXP, EXP_DEGREE)
    p = (p * (r * r) + r) + 1.0
    # 3. times 2^k in two steps, each a normal number
    n = rounded.to(tl.int32, bitcast=True) - INTEGER_BITS
    half = n >> 1
    return p * power_of_two(half) * power_of_two(n - half)


@triton.jit
def gelu(x):
    """x * Phi(x) = max(x, 0) - z * Phi(-z), z = |x|."""
    z = tl.minimum(tl.abs(x), TAIL_END)
    t = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + TAIL_SLOPE * z)
    tail = exp(-(z * z) * 0.5) * (t * horner(t, TAIL, TAIL_DEGREE))
    return tl.where(x > 0.0, x, 0.0) - z * tail


@triton.jit
def horner(t, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """The polynomial of t, its highest power first."""
    p = tl.full(t.shape, COEFFICIENTS[0], tl.float32)
    for i in tl.static_range(1, DEGREE + 1):
        p = p * t + COEFFICIENTS[i]
    return p


@triton.jit
def power_of_two(k):
    return ((k + 127) << 23).to(tl.float32, bitcast=True)
