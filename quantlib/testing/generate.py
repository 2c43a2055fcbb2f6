"""The inputs of a case: values where something is decided for it, dealt out over its shape and blocks."""

from __future__ import annotations

import functools
import math

import numpy as np

from quantlib import formats, reference
from quantlib.formats import FloatFormat, IntFormat
from quantlib.reference.numerics import effective_scale, encode_float
from quantlib.reference.ops import spread
from quantlib.testing import values
from quantlib.testing.table import Case
from quantlib.testing.values import Array


@functools.lru_cache(64)
def inputs(case: Case) -> dict[str, Array]:
    """The tensors that ``case`` is called with, as bits: x or codes, scale and zero_point where it has them."""
    rng = case.random()
    if case.op == "cast":
        return {"x": _cast_x(case, rng)}
    if case.op == "dequantize":
        return _dequantize_inputs(case, rng)
    if case.op == "quantize":
        return _quantize_inputs(case, rng)
    x = values.ranges() if case.shape is None else _dynamic_x(case, rng)
    return {"x": _narrowed(_placed(x, case), case.dtype, rng)}


def _cast_x(case: Case, rng: np.random.Generator) -> Array:
    if case.shape is not None:
        if case.dtype == "float32":
            x: Array = rng.choice(_cast_pool(case.format), case.shape).view(np.uint32)
        else:
            x = rng.choice(values.codes(case.dtype), case.shape)
        return _placed(x, case)
    return _cast_pool(case.format).view(np.uint32) if case.dtype == "float32" else values.codes(case.dtype)


@functools.cache
def _cast_pool(format: str) -> Array:
    """Float32 inputs where casting to ``format`` is decided."""
    if format == "float32":
        return values.edges()
    return np.concatenate([values.edges(), values.neighbours(values.midpoints(format))])


def _quantize_inputs(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    (M, K), f = case.matrix, formats.get(case.format)
    scale, zero_point = _scales(case)
    halves = values.midpoints(case.format, not case.symmetric)
    if case.shape is None:
        pool = values.neighbours(values.few_midpoints(case.format, not case.symmetric))
        rows = np.broadcast_to(np.concatenate([pool, values.edges()]), (M, K)).copy()
        t = rows[:, : len(pool)]
        s = effective_scale(scale, f)
    else:
        rows = t = rng.choice(values.neighbours(halves), (M, K))
        s = spread(effective_scale(scale, f), (M, K), case.resolved)
    with np.errstate(all="ignore"):
        z = np.int32(0) if zero_point is None else spread(zero_point, (M, t.shape[1]), case.resolved)
        t[:] = (t - z) * s  # back from units of the scale
        t[:] = np.nextafter(t, rng.choice(np.array([-np.inf, 0, np.inf], np.float32), t.shape))
    if case.shape is not None:
        other = np.where(
            rng.random((M, K)) < 0.5,
            rng.choice(values.edges(), (M, K)),
            rng.integers(0, 2**32, (M, K), dtype=np.uint32).view(np.float32),
        )
        rows = np.where(rng.random((M, K)) < 0.3, other, rows)
    given: dict[str, Array] = {"x": _narrowed(_placed(rows, case), case.dtype, rng), "scale": scale}
    return given if zero_point is None else given | {"zero_point": zero_point}


def _dequantize_inputs(case: Case, rng: np.random.Generator) -> dict[str, Array]:
    (M, K), f = case.matrix, formats.get(case.format)
    shape = (M, K) if case.shape is None else case.shape
    if case.shape is None:
        codes = np.broadcast_to(values.few_codes(case.format), shape).copy()
    else:
        codes = _placed(rng.choice(values.codes(case.format), shape), case)
    if not f.whole:
        columns = f.columns(K) if f.packed else K
        codes = reference.pack(codes.reshape(M, K), f).reshape((*shape[:-1], columns) if f.packed else shape)
        beyond = np.uint8(0xAA << (K % f.per_byte or f.per_byte) * f.bits & 0xFF)
        codes.reshape(M, f.columns(K))[:, -1:] |= beyond  # past the row, or past a code in a byte of its own: nobody's
    scale, zero_point = _scales(case)
    given: dict[str, Array] = {"codes": codes, "scale": scale}
    return given if zero_point is None else given | {"zero_point": zero_point}


def _scales(case: Case) -> tuple[Array, Array | None]:
    """All scales and zero points over the blocks of ``case``, beginning anywhere."""
    every = values.scales(case.format)
    first = 0 if case.shape is None else case.seed
    index = (np.arange(math.prod(case.grid)) + first).reshape(case.grid)
    scale = every[index % len(every)]
    if case.symmetric:
        return scale, None
    points = np.array(values.zero_points(case.format), np.int32)
    return scale, points[(index // len(every) if case.shape is None else index * 7) % len(points)]


def _dynamic_x(case: Case, rng: np.random.Generator) -> Array:
    """[M, K] whose blocks take turns: ties under the block's own scale, and ranges that are special."""
    (M, K), f, block, grid = case.matrix, formats.get(case.format), case.resolved, case.grid

    def over(per_block: Array) -> Array:
        return spread(per_block, (M, K), block)

    # ties: halves times a scale, the block's extremes at the extreme codes; in some affine blocks it is the zero point
    # that lies halfway between two codes
    s = over((np.exp2(rng.integers(-30, 30, grid)) * rng.uniform(1, 2, grid)).astype(np.float32))
    halves = values.midpoints(case.format, not case.symmetric)
    lowest, highest = f.range(not case.symmetric) if isinstance(f, IntFormat) else (-f.max, f.max)
    ends = np.array([lowest, highest])
    z = 0 if case.symmetric else over(rng.integers(int(lowest), int(highest), grid) + rng.choice([0, 0.5], grid))
    inside = halves[(halves > ends[0]) & (halves < ends[1])]
    with np.errstate(all="ignore"):
        ties = ((rng.choice(inside, (M, K)) - z) * s).astype(np.float32)
        ties = np.nextafter(ties, rng.choice(np.array([-np.inf, 0, np.inf], np.float32), (M, K)))
        i, j = np.arange(M)[:, None] % block[0], np.arange(K)[None, :] % block[1]
        side = over(rng.integers(0, 2, grid))
        for place, end in ((0, ends[side]), (1, ends[1 - side])):
            ties = np.where(i + j == place, ((end - z) * s).astype(np.float32), ties)
        random = rng.integers(0, 2**32, (M, K), dtype=np.uint32).view(np.float32)
        finite = np.where(np.isfinite(random), random, np.float32(1))
        one = (i == over(rng.integers(0, block[0], grid))) & (j == over(rng.integers(0, block[1], grid)))
        infinity = rng.choice(np.array([-np.inf, np.inf], np.float32), (M, K))
        payload = np.where(random.view(np.uint32) & 1, np.uint32(0x7F800001), np.uint32(0xFFC12345)).view(np.float32)
        kinds = [
            ties,
            finite,
            np.where(one, infinity, ties),
            np.where(one, payload, ties),
            np.abs(ties),
            finite * np.float32(2.0**-126),
            -np.abs(ties),
            np.zeros((M, K), np.float32) * np.sign(infinity),
            random,
            np.where(one, payload, infinity),
        ]
        turn = over((np.arange(grid[0] * grid[1]).reshape(grid) + case.seed) % (2 * len(kinds)))
        return np.choose(np.where(turn < len(kinds), turn, 0), kinds).astype(np.float32)


def _narrowed(x: Array, dtype: str, rng: np.random.Generator) -> Array:
    """``x`` as bits of ``dtype``, its NaNs with every payload."""
    if dtype == "float32":
        return x.view(np.uint32)
    f = _float(dtype)
    with np.errstate(all="ignore"):
        code = encode_float(x, f, saturate=False)
    random = rng.integers(0, 2**16, x.shape, dtype=np.uint16)
    return np.where(x == x, code, random | np.uint16(f.overflow_code | 1)).astype(f.storage)


def _placed(x: Array, case: Case) -> Array:
    """``x`` in the shape of ``case``; where it is expanded, its first row everywhere."""
    if case.shape is None:
        return x
    x = x.reshape(*case.shape[:-1], x.shape[-1]) if case.shape else x.reshape(())
    return np.broadcast_to(x[:1], x.shape).copy() if case.layout == "expanded" else x


def _float(name: str) -> FloatFormat:
    f = formats.get(name)
    assert isinstance(f, FloatFormat)
    return f
