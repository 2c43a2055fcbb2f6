"""The table of searches for scales: the bytes of contract C4."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantlib import formats, ops, reference
from quantlib.formats import FloatFormat
from quantlib.spec import SEARCHES
from quantlib.testing.bytes import Array, bits, tensor
from quantlib.testing.call import Block, OneCall
from quantlib.testing.compare import prove
from quantlib.testing.generate import inputs as inputs_of
from quantlib.testing.table import DTYPES, Case

OPS = ("search_scale",)
# The last columns of a block fill no register, or no sixteen sums; blocks of several rows; a row longer than a chunk.
GRID: tuple[tuple[tuple[int, int], Block], ...] = (
    ((6, 35), (1, 8)),
    ((6, 35), (4, 16)),
    ((3, 130), (1, 128)),
    ((5, 96), (1, 32)),
    ((33, 50), (-1, -1)),
    ((7, 5), (-1, 1)),
    ((2, 2051), (1, -1)),
)


@dataclass(frozen=True)
class Searched(OneCall):
    """One call of search_scale."""

    method: str = "mse"
    kept: str = "float32"
    weighted: bool = False

    def __str__(self) -> str:
        words = [self.op, self.format, self.dtype, "x".join(map(str, self.matrix)), self.block_words, self.layout]
        words += [self.method, self.kept, self.zero_points, "weighted" if self.weighted else "plain"]
        return "-".join(words)


@functools.lru_cache(64)
def inputs(case: Searched) -> dict[str, Array]:
    """x whose blocks take turns: normal values, those of compute_scale's table, and outliers; scales beside theirs."""
    rng, (M, K) = case.random(), case.matrix
    x = rng.standard_normal((M, K)).astype(np.float32) * np.exp2(rng.integers(-40, 40, (M, 1))).astype(np.float32)
    x = np.where(rng.random((M, K)) < 0.02, x * np.float32(20), x)
    special = inputs_of(Case("compute_scale", case.format, "float32", case.shape, case.block, symmetric=case.symmetric))
    rows = rng.random((M, 1)) < 0.4
    x = np.where(rows, special["x"].view(np.float32), x).astype(np.float32)
    code = _encoded(x, case.dtype)
    x = code.view(np.float32) if case.dtype == "float32" else reference.decode_float(code, _float(case.dtype))
    found = reference.compute_scale(x, case.format, case.resolved, symmetric=case.symmetric)
    scale, *zero_point = found if isinstance(found, tuple) else (found,)
    others = np.array([0, 1e-45, 2.0**-100, 1, -0.3, -0.0, 3e38, -np.inf, np.inf, np.nan], np.float32)
    scale = np.where(rng.random(scale.shape) < 0.1, rng.choice(others, scale.shape), scale)
    given = {"x": x, "scale": scale.astype(np.float32)}
    if zero_point:
        given["zero_point"] = zero_point[0]
    if case.weighted:
        given["energy"] = rng.choice(np.array([0, 1e-45, 0.3, 1, 7, 1e30, 3e38], np.float32), K)
    return given


def _encoded(x: Array, dtype: str) -> Array:
    with np.errstate(all="ignore"):
        return bits(reference.encode_float(x, _float(dtype), saturate=False))


def _float(dtype: str) -> FloatFormat:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    return f


def expected(case: Searched) -> tuple[Array, ...]:
    """Return the result of ``case``, bit for bit."""
    given = inputs(case)
    found = reference.search_scale(
        given["x"],
        given["scale"],
        case.format,
        block=case.resolved,
        method=case.method,
        kept=case.kept,
        zero_point=given.get("zero_point"),
        energy=given.get("energy"),
    )
    return (bits(found),)


def tensors(case: Searched, device: str = "cpu") -> dict[str, torch.Tensor]:
    """:func:`inputs` as tensors."""
    given = {name: torch.from_numpy(array.copy()).to(device) for name, array in inputs(case).items()}
    x = tensor(_encoded(inputs(case)["x"], case.dtype), case.dtype, device)
    if case.layout == "offset":
        x = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return given | {"x": x}


def call(case: Searched, given: dict[str, torch.Tensor], out: Any = None) -> tuple[torch.Tensor, ...]:
    """Run ``case``, into ``out`` where there is one."""
    found = ops.search_scale(
        given["x"],
        given["scale"],
        case.format,
        block=case.block,
        method=case.method,
        kept=case.kept,
        zero_point=given.get("zero_point"),
        energy=given.get("energy"),
        out=None if out is None else out[0],
    )
    return (found,)


def check(case: Searched, device: str = "cpu") -> None:
    """Check the bytes of ``case``, as :func:`quantlib.testing.check` does."""
    given = tensors(case, device)
    prove(str(case), given, expected(case), ("found",), functools.partial(call, case, given))


def searched(op: str | None = None, format: str | None = None) -> tuple[Searched, ...]:
    """The table, or the part of it for one op, one format."""
    return tuple(c for c in _table() if op in (None, c.op) and format in (None, c.format))


@functools.cache
def _table() -> tuple[Searched, ...]:
    cases = []
    for n, (f, method, symmetric) in enumerate(itertools.product(formats.TABLE, SEARCHES, (True, False))):
        if not (f.is_float and not symmetric):
            for k, (shape, block) in enumerate(GRID):
                dtype, kept = DTYPES[(n + k) % 3], DTYPES[(n + 2 * k + n // 3) % 3]
                weighted, layout = (n // 2 + k) % 2 == 1, "offset" if (k + n) % 4 == 3 else "contiguous"
                cases.append(Searched(OPS[0], f.name, dtype, shape, block, layout, symmetric, method, kept, weighted))
    return tuple(cases)
