"""One call of one op, as every table of :mod:`quantlib.testing` writes it down."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

Block = tuple[int, int]


@dataclass(frozen=True)
class OneCall:
    """An op, its format, the type, shape and layout of x, and what shares a scale.

    The record of a table adds what its ops take besides. ``str(case)`` has every field: it names the case and seeds it.
    """

    op: str
    format: str
    dtype: str = "bfloat16"  # of x; for dequantize and scaled_matmul of the result
    shape: tuple[int, ...] | None = None  # of x; of a product M, N, K
    block: Block = (1, -1)
    layout: str = "contiguous"  # of x; offset: it begins at no address that a vector load likes
    symmetric: bool = True

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns that ``block`` divides."""
        *rows, columns = self.shape or (1,)
        return int(np.prod(rows)), columns

    @property
    def resolved(self) -> Block:
        """``block`` with the size of the axis, 1 at least, for -1."""
        rows, columns = (max(n, 1) if b == -1 else b for b, n in zip(self.block, self.matrix, strict=True))
        return rows, columns

    @property
    def grid(self) -> tuple[int, int]:
        """The shape of the scales."""
        rows, columns = (-(-n // b) for n, b in zip(self.matrix, self.resolved, strict=True))
        return rows, columns

    @property
    def block_words(self) -> str:
        """The name of the block in ``str``."""
        rows, columns = ("all" if b == -1 else b for b in self.block)
        return f"block{rows}x{columns}"

    @property
    def zero_points(self) -> str:
        """The words of ``str`` for symmetric or affine."""
        return "symmetric" if self.symmetric else "affine"

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    def random(self) -> np.random.Generator:
        """The generator of its inputs: the same on every machine, another one for every case."""
        return np.random.default_rng(self.seed)
