"""The table of fake quantizations and their gradients: bytes, and sums within the bound of contract C10."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantlib import formats, ops, reference  # noqa: F401 (the ops have to be there)
from quantlib.formats import FloatFormat
from quantlib.reference.numerics import effective_scale, encode_float
from quantlib.reference.ops import reduce_blocks, spread
from quantlib.testing import values
from quantlib.testing.bytes import Array, bits, tensor
from quantlib.testing.call import Block, OneCall
from quantlib.testing.compare import Sum, prove
from quantlib.testing.table import DTYPES

OPS = ("fake_quantize", "fake_quantize_backward")
GRID: tuple[tuple[tuple[int, int], Block], ...] = (
    ((6, 67), (1, -1)),
    ((6, 67), (-1, -1)),
    ((6, 67), (1, 8)),
    ((6, 67), (4, 5)),
    ((33, 130), (32, 32)),
    ((2, 4099), (1, -1)),
    ((3, 20011), (-1, -1)),
    ((259, 5), (-1, 1)),
    ((70, 260), (1, 32)),
)


@dataclass(frozen=True)
class Learned(OneCall):
    """One call of fake_quantize or of its gradient."""

    lsq: bool = False

    def __str__(self) -> str:
        words = [self.op, self.format, self.dtype, "x".join(map(str, self.matrix)), self.block_words, self.layout]
        return "-".join([*words, self.zero_points, "lsq" if self.lsq else "rounded"])


@functools.lru_cache(64)
def inputs(case: Learned) -> dict[str, Array]:
    """x at the midpoints between codes times its scale and beside them; then what is special. float32, all of it."""
    rng, f, grid, shape = case.random(), formats.get(case.format), case.grid, case.matrix
    scale = np.exp2(rng.uniform(-8, 8, grid)).astype(np.float32)
    z = None if case.symmetric else (rng.standard_normal(grid) * 40).astype(np.float32)
    backward = case.op.endswith("backward")
    with np.errstate(all="ignore"):
        s = spread(effective_scale(scale, f), shape, case.resolved)
        x = (rng.choice(values.midpoints(case.format, not case.symmetric), shape) * s).astype(np.float32)
        x = np.where(rng.random(shape) < 0.3, np.nextafter(x, np.float32(np.inf)), x)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38], np.float32)
    x = np.where(rng.random(shape) < (0.001 if backward else 0.1), rng.choice(special, shape), x)
    given = {"x": _rounded(x.astype(np.float32), case.dtype), "scale": scale} | ({} if z is None else {"zero_point": z})
    dy = rng.standard_normal(shape).astype(np.float32)
    return given | ({"dy": _rounded(dy, case.dtype)} if backward else {})


def _rounded(x: Array, dtype: str) -> Array:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    return x if f.bits == 32 else reference.decode_float(_encoded(x, dtype), f)


def _encoded(x: Array, dtype: str) -> Array:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    with np.errstate(all="ignore"):
        return bits(x) if f.bits == 32 else encode_float(x, f)


def expected(case: Learned) -> tuple[Array | Sum, ...]:
    """Return the results of ``case``: y, or dx and the sums of the scales and the zero points."""
    given, options = inputs(case), {"block": case.resolved}
    x, scale, z = given["x"], given["scale"], given.get("zero_point")
    if case.op == "fake_quantize":
        return (_encoded(reference.fake_quantize(x, scale, case.format, **options, zero_point=z), case.dtype),)
    more: dict[str, Any] = {**options, "zero_point": z, "lsq_mask": case.lsq}
    terms = reference.fake_quantize_backward(given["dy"], x, scale, case.format, **more)
    sums = [terms.dscale] + [terms.dzero_point] * (not case.symmetric)
    return (_encoded(terms.dx, case.dtype), *(_sum(term, case.resolved) for term in sums))


def _sum(terms: Array, block: Block) -> Sum:
    with np.errstate(all="ignore"):
        exact = reduce_blocks(np.add, terms.astype(np.float64), block)
        size = reduce_blocks(np.add, np.abs(terms).astype(np.float64), block)
        allowed = block[0] * block[1] * 2.0**-24 * size
        return Sum(exact, np.where(size < np.finfo(np.float32).max, allowed, np.inf))  # else a partial sum may overflow


def tensors(case: Learned, device: str = "cpu") -> dict[str, torch.Tensor]:
    """:func:`inputs` as tensors."""
    given = {}
    for name, array in inputs(case).items():
        dtype = case.dtype if name in ("x", "dy") else "float32"
        given[name] = tensor(_encoded(array, dtype), dtype, device)
    if case.layout == "offset":
        given |= {
            n: t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for n, t in given.items() if n in ("x", "dy")
        }
    return given


def call(case: Learned, given: dict[str, torch.Tensor], out: Any = None) -> tuple[torch.Tensor, ...]:
    """Run ``case``, into ``out`` where there is one."""
    z, block, rest = given.get("zero_point"), case.resolved, (None, case.lsq, 1.0)
    forward, backward = torch.ops.quantlib.fake_quantize, torch.ops.quantlib.fake_quantize_backward
    if case.op == "fake_quantize":
        args: tuple[Any, ...] = (given["x"], given["scale"], case.format, block, z, *rest)
        if out is not None:
            forward.out(*args, out=out[0])
        return (forward(*args),) if out is None else tuple(out)
    leaves = (given["scale"],) if z is None else (given["scale"], z)
    args = (given["dy"], given["x"], *leaves, case.format, block, *rest)
    if out is None:
        return tuple(backward(*args) if z is None else backward.affine(*args))
    named = dict(zip(("dx", "dscale", "dzero_point"), out, strict=False))
    (backward.out if z is None else backward.affine_out)(*args, **named)
    return tuple(out)


def check(case: Learned, device: str = "cpu") -> None:
    """Check as :func:`quantlib.testing.check`; the sums within their bound, and the same bytes in every run."""
    given = tensors(case, device)
    names = ("dx", "dscale", "dzero_point") if case.op.endswith("backward") else ("y",)
    want = expected(case)
    prove(str(case), given, want, names[: len(want)], functools.partial(call, case, given))


def learned(op: str | None = None, format: str | None = None) -> tuple[Learned, ...]:
    """The table, or the part of it for one op, one format."""
    return tuple(c for c in _table() if op in (None, c.op) and format in (None, c.format))


@functools.cache
def _table() -> tuple[Learned, ...]:
    cases = []
    for n, (op, f, dtype, symmetric) in enumerate(itertools.product(OPS, formats.TABLE, DTYPES, (True, False))):
        if not (f.is_float and not symmetric):
            for k, (shape, block) in enumerate(GRID):
                if dtype == "float32" or (k + n) % 3 == 0:
                    layout = "offset" if (k + n) % 4 == 3 else "contiguous"
                    cases.append(Learned(op, f.name, dtype, shape, block, layout, symmetric, (k + n) % 2 == 1))
    return tuple(cases)
