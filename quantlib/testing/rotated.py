"""The table of Hadamard products: the bytes of contract C14."""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantlib import formats, ops, reference
from quantlib.formats import FloatFormat
from quantlib.testing.bytes import Array, bits, tensor
from quantlib.testing.compare import prove
from quantlib.testing.table import DTYPES

OPS = ("hadamard",)
SPECIAL = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 6e4, 1e-25)
# Rows that fill no register and no chunk of 1024 elements; blocks that are a row, and many of them.
GRID = (((1, 1), 1), ((3, 6), 2), ((5, 12), 4), ((7, 24), 8), ((2, 48), 16), ((3, 96), 32), ((5, 576), 64),
        ((9, 128), 128), ((2, 768), 256), ((3, 1536), 512), ((4, 2048), 1024), ((130, 32), 16))  # fmt: skip


@dataclass(frozen=True)
class Rotated:
    """One call of hadamard."""

    dtype: str
    shape: tuple[int, int]
    block: int
    special: bool = False  # values that are not finite, and sums that overflow
    layout: str = "contiguous"  # or offset
    op: str = "hadamard"

    @property
    def format(self) -> str:
        """The format of x."""
        return self.dtype

    def __str__(self) -> str:
        flags = ["special"] * self.special
        return "-".join([self.op, self.dtype, "x".join(map(str, self.shape)), str(self.block), self.layout, *flags])


@functools.lru_cache(64)
def inputs(case: Rotated) -> Array:
    """Codes of x: magnitudes of many sizes, so that every sum is rounded."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    x = (rng.standard_normal(case.shape) * np.exp2(rng.uniform(-14, 14, case.shape))).astype(np.float32)
    if case.special:
        few = rng.random(case.shape) < 0.3 / case.block
        x = np.where(few, rng.choice(SPECIAL, case.shape), x).astype(np.float32)
    with np.errstate(all="ignore"):
        return bits(reference.encode_float(x, _float(case.dtype), saturate=False))


def _float(dtype: str) -> FloatFormat:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    return f


def expected(case: Rotated) -> tuple[Array, ...]:
    """The codes of y."""
    code = inputs(case)
    x = code.view(np.float32) if case.dtype == "float32" else reference.decode_float(code, _float(case.dtype))
    return (bits(reference.hadamard(x, case.block, case.dtype)),)


def tensors(case: Rotated, device: str = "cpu") -> dict[str, torch.Tensor]:
    """:func:`inputs` as a tensor."""
    x = tensor(inputs(case), case.dtype, device)
    if case.layout == "offset":
        x = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return {"x": x}


def call(case: Rotated, given: dict[str, torch.Tensor], out: Any = None) -> tuple[torch.Tensor, ...]:
    """Run ``case``, into ``out`` where there is one."""
    return (ops.hadamard(given["x"], case.block, out=None if out is None else out[0]),)


def check(case: Rotated, device: str = "cpu") -> None:
    """Check the bytes of ``case``, as :func:`quantlib.testing.check` does."""
    given = tensors(case, device)
    prove(str(case), given, expected(case), ("y",), functools.partial(call, case, given))


def rotated(op: str | None = None, format: str | None = None) -> tuple[Rotated, ...]:
    """The table, or the part of it for one op, one format."""
    return tuple(c for c in _table() if op in (None, c.op) and format in (None, c.format))


@functools.cache
def _table() -> tuple[Rotated, ...]:
    every = itertools.product(DTYPES, GRID, (False, True))
    return tuple(
        Rotated(dtype, shape, block, special, "offset" if n % 3 == 0 else "contiguous")
        for n, (dtype, (shape, block), special) in enumerate(every)
    )
