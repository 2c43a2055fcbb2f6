"""The case table: op x format x dtype x shape x block x layout, every way to call an op."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from quantlib import formats
from quantlib.testing import values
from quantlib.testing.call import Block, OneCall

OPS = ("cast", "compute_scale", "quantize", "dequantize", "quantize_dynamic")
DTYPES = ("float32", "float16", "bfloat16")  # of x, and of what dequantize returns
CASTS = tuple(f.name for f in formats.FORMATS.values() if f.is_float and f.whole)

# (shape, block, layout): every granularity, tails that do not fill a block or a vector, and every way to lie in memory
GRID: tuple[tuple[tuple[int, ...], Block, str], ...] = (
    ((), (1, 1), "contiguous"),
    ((), (-1, -1), "contiguous"),
    ((1,), (1, 1), "contiguous"),
    ((7,), (1, 3), "offset"),
    ((0,), (1, 4), "contiguous"),
    ((0, 5), (1, -1), "contiguous"),
    ((3, 0), (-1, -1), "contiguous"),
    ((6, 35), (-1, -1), "contiguous"),
    ((6, 35), (1, -1), "offset"),
    ((6, 35), (1, 8), "strided"),
    ((6, 35), (2, 3), "transposed"),
    ((6, 35), (4, 16), "expanded"),
    ((6, 35), (100, 100), "contiguous"),
    ((6, 35), (-1, 1), "contiguous"),
    ((5, 9), (1, 1), "transposed"),
    ((2, 3, 34), (2, 16), "strided"),
    ((1, 515), (1, 128), "contiguous"),
    ((259, 5), (1, -1), "contiguous"),
    ((259, 5), (-1, 1), "offset"),
    ((33, 130), (32, 32), "contiguous"),
    ((33, 130), (1, 64), "offset"),
    ((2, 4099), (1, -1), "contiguous"),
    ((2, 4098), (-1, -1), "contiguous"),
    ((70, 260), (1, 32), "contiguous"),
)


@dataclass(frozen=True)
class Case(OneCall):
    """One call of one op. Without a shape its inputs are all that :mod:`quantlib.testing.values` has for the format."""

    saturate: bool | None = None  # cast only

    @property
    def matrix(self) -> tuple[int, int]:
        """[M, K]; in a case without a shape, a row for each scale and zero point, a column for each value."""
        if self.shape is not None:
            return super().matrix
        if self.op in ("compute_scale", "quantize_dynamic"):
            rows, columns = values.ranges().shape
            return rows, columns
        affine = not self.symmetric
        rows = len(values.scales(self.format)) * (len(values.zero_points(self.format)) if affine else 1)
        if self.op == "dequantize":
            return rows, len(values.few_codes(self.format))
        return rows, 3 * len(values.few_midpoints(self.format, affine)) + len(values.edges())

    def __str__(self) -> str:
        words = [self.op, self.format, self.dtype]
        if self.shape is None:
            words.append("every")
        else:
            words += ["x".join(map(str, self.shape)) or "scalar", self.layout]
        if self.op == "cast":
            words.append({None: "default", True: "saturate", False: "overflow"}[self.saturate])
        else:
            words += [self.block_words, self.zero_points]
        return "-".join(words)


def cases(op: str | None = None, format: str | None = None) -> tuple[Case, ...]:
    """The table, or the part of it for one op, one format."""
    return tuple(c for c in _table() if op in (None, c.op) and format in (None, c.format))


@functools.cache
def _table() -> tuple[Case, ...]:
    return tuple(case for op in OPS for case in (_casts() if op == "cast" else _projections(op)))


def _casts() -> Iterator[Case]:
    placed = [(shape, layout) for shape, block, layout in GRID if block in ((1, -1), (1, 1), (2, 3), (4, 16), (1, 8))]
    for x, name in enumerate(CASTS):
        for y, format in enumerate(CASTS):
            for saturate in (None, True, False):
                yield Case("cast", format, name, saturate=saturate)
            for n, (shape, layout) in enumerate(placed):
                if (n + x + y) % 3 == 0:
                    yield Case("cast", format, name, shape, layout=layout)


def _projections(op: str) -> Iterator[Case]:
    for n, f in enumerate(formats.TABLE):
        for symmetric in (True,) if f.is_float else (True, False):
            for d, dtype in enumerate(DTYPES):
                case = Case(op, f.name, dtype, symmetric=symmetric)
                yield case
                for k, (shape, block, layout) in enumerate(GRID):
                    if d == 0 or (k + d + n + symmetric) % 3 == 0:  # narrower ones take turns
                        yield replace(case, shape=shape, block=block, layout=layout)
