"""The table of lookups that decode: the bytes of contract C7, in rows of a table of codes."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantlib import formats, ops, reference
from quantlib.backends.packing import kept_zero_points
from quantlib.testing import compare
from quantlib.testing.bytes import Array
from quantlib.testing.call import Block, OneCall
from quantlib.testing.compare import Tensors, prove
from quantlib.testing.generate import inputs as inputs_of
from quantlib.testing.table import DTYPES, Case

OPS = ("dequantize_rows",)
KEPT = (*DTYPES, "float8_e8m0fnu")  # the dtypes of scales
# (table, block, indices, layout): rows longer than a chunk, ragged bytes and blocks, rows that share a scale, no rows
GRID: tuple[tuple[tuple[int, int], Block, tuple[int, ...], str], ...] = (
    ((6, 35), (1, -1), (9,), "contiguous"),
    ((6, 35), (1, 8), (2, 3), "offset"),
    ((6, 34), (4, 16), (7,), "strided"),
    ((6, 35), (-1, -1), (1, 2, 2), "transposed"),
    ((5, 9), (2, 3), (8,), "contiguous"),
    ((5, 2), (100, 1), (3,), "contiguous"),
    ((3, 2051), (1, 64), (4,), "offset"),
    ((3, 2050), (1, -1), (2, 2), "contiguous"),
    ((70, 96), (1, 32), (40,), "contiguous"),
    ((9, 1500), (3, 7), (5,), "contiguous"),
    ((7, 16), (1, -1), (), "contiguous"),
    ((7, 16), (1, -1), (0, 3), "contiguous"),
    ((7, 0), (1, -1), (4,), "contiguous"),
)


@dataclass(frozen=True)
class Rows(OneCall):
    """One call of dequantize_rows: ``shape`` is that of the table."""

    indices: tuple[int, ...] = (1,)
    index: str = "int64"
    kept: str = "float32"  # the dtype of the scales
    zero_codes: bool = False  # zero points are kept as codes, not int32

    def __str__(self) -> str:
        words = [self.op, self.format, self.dtype, "x".join(map(str, self.matrix)), self.block_words, self.layout]
        words += ["x".join(map(str, self.indices)) or "scalar", self.index, self.kept, self.zero_points]
        words += ["codes"] * self.zero_codes
        return "-".join(words)

    @property
    def of_table(self) -> Case:
        """The call of dequantize whose codes and scales these are."""
        return Case("dequantize", self.format, self.dtype, self.shape, self.block, self.layout, self.symmetric)


@functools.lru_cache(64)
def inputs(case: Rows) -> dict[str, Array]:
    """A table of the case table of dequantize, and indices, among them the first and the last row."""
    rng, N = case.random(), case.matrix[0]
    indices = rng.integers(0, N, case.indices).astype(case.index)
    if indices.size > 1:
        indices.flat[0], indices.flat[-1] = N - 1, 0
    return inputs_of(case.of_table) | {"indices": np.asarray(indices)}


def tensors(case: Rows, device: str = "cpu") -> Tensors:
    """:func:`inputs` as tensors."""
    given = compare.tensors(case.of_table, device)
    scale = given["scale"]
    assert scale is not None
    indices = torch.from_numpy(inputs(case)["indices"].copy()).to(device)
    given = given | {"scale": scale.to(getattr(torch, case.kept)), "indices": indices}
    if case.zero_codes and (z := given["zero_point"]) is not None:
        given["zero_point"] = kept_zero_points(z, formats.get(case.format))
    return given


def expected(case: Rows) -> tuple[Array, ...]:
    """Return the result of ``case``, bit for bit."""
    given, scale = inputs(case), tensors(case)["scale"]
    assert scale is not None
    options: dict[str, Any] = {"block": case.resolved, "zero_point": given.get("zero_point"), "dtype": case.dtype}
    rows = reference.dequantize_rows(
        given["indices"], given["codes"], scale.float().numpy(), case.format, size=case.matrix[1], **options
    )
    return (np.asarray(rows),)


def call(case: Rows, given: Tensors, out: Any = None) -> tuple[torch.Tensor, ...]:
    """Run ``case``, into ``out`` where there is one."""
    indices, codes, scale = (given[name] for name in ("indices", "codes", "scale"))
    assert indices is not None
    assert codes is not None
    assert scale is not None
    K = case.matrix[1]
    found = ops.dequantize_rows(
        indices,
        codes,
        scale,
        case.format,
        block=case.block,
        zero_point=given.get("zero_point"),
        dtype=getattr(torch, case.dtype),
        size=K if K % formats.get(case.format).per_byte else None,
        out=None if out is None else out[0],
    )
    return (found,)


def check(case: Rows, device: str = "cpu") -> None:
    """Check the bytes of ``case``, as :func:`quantlib.testing.check` does."""
    given = tensors(case, device)
    prove(str(case), given, expected(case), ("y",), functools.partial(call, case, given))


def rows(op: str | None = None, format: str | None = None) -> tuple[Rows, ...]:
    """The table, or the part of it for one op, one format."""
    return tuple(c for c in _table() if op in (None, c.op) and format in (None, c.format))


@functools.cache
def _table() -> tuple[Rows, ...]:
    cases = []
    for n, (f, symmetric) in enumerate(itertools.product(formats.TABLE, (True, False))):
        if not (f.is_float and not symmetric):
            for k, (shape, block, indices, layout) in enumerate(GRID):
                dtype, kept = DTYPES[(n + k) % 3], KEPT[(n // 2 + 2 * n + k) % 4]
                codes = not symmetric and k % 2 > 0
                index = ("int64", "int32")[(n + k // 2) % 2]
                cases.append(Rows(OPS[0], f.name, dtype, shape, block, layout, symmetric, indices, index, kept, codes))
    return tuple(cases)
