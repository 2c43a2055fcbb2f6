"""y[t, n] = sum over k of x[t, k] * w[e, n, k], e the expert of row t: 64 experts of a mixture with a few rows each."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import quantlib
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array, poisoned

from . import graphs
from .case import Call, Case, Contender, Tensors
from .matmul import W4A16, W8A8, W8A16, Product, exact_weight, exact_x, exact_y, turns

EXPERTS, SHAPE = 64, (1408, 2048)  # (N, K): DeepSeek-V2-Lite
ROWS = (1, 2, 4, 8)  # of each expert


def cases(quick: bool, **common: Any) -> list[Case]:
    """Every number of rows, by eight bits and by four, x as it is and quantized too."""
    small = math.prod(common["shape"]) < graphs.SMALL
    N, K = tuple(common["shape"]) if small else SHAPE
    return [
        GroupedMatmul(**{**common, "shape": (experts * rows, N, K), "spec": spec, "dtype": dtype, "experts": experts})
        for experts in [4 if small else EXPERTS]
        for spec in (W8A16, W4A16, W8A8)
        for dtype in ("bfloat16", "float32")
        for rows in ((1, 8) if quick else ROWS)
    ]


@functools.lru_cache(maxsize=1)
def exact_stack(experts: int, shape: tuple[int, int], spec: QuantSpec, device: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of every expert, no two alike."""
    codes, scale = zip(*(exact_weight(shape, spec, device, 1 + e) for e in range(experts)), strict=True)
    return torch.stack(codes), torch.stack(scale)


@dataclass(frozen=True)
class GroupedMatmul(Product):
    """``shape`` is (rows of all experts, N, K)."""

    experts: int = EXPERTS
    family = "grouped_matmul"

    @property
    def op(self) -> str:
        return f"{self.experts}x{self.shape[1]}x{self.shape[2]} M={self.rows}"

    @property
    def rows(self) -> int:
        return self.shape[0] // self.experts

    @property
    def codes_shape(self) -> tuple[int, ...]:
        return self.experts, *self.spec.codes_shape(self.shape[1:])

    def inputs(self) -> Tensors:
        """x [E * M, K], codes [E, N, K], scale [E, N, groups]"""
        x = exact_x((self.shape[0], self.shape[2]), self.dynamic).to(self.device, getattr(torch, self.dtype))
        return x, *exact_stack(self.experts, self.shape[1:], self.spec.weight_only, self.device)

    def outs(self, *inputs: Tensor) -> Tensors:
        return (poisoned(self.shape[:2], getattr(torch, self.dtype), self.device),)

    def expected(self, rows: slice, x: Tensor, codes: Tensor, scale: Tensor) -> Iterator[tuple[slice, Array]]:
        parts = []
        for start in range(rows.start - rows.start % self.rows, rows.stop, self.rows):
            own, e = slice(max(start, rows.start), min(start + self.rows, rows.stop)), start // self.rows
            parts.append(exact_y(x[own], codes[e], scale[e], self.spec))
        yield rows, np.concatenate(parts)

    def contenders(self) -> list[Contender]:
        others = [Contender("quantlib loop", self.loop), Contender(f"F.linear {self.dtype} loop", self.in_floats)]
        return [*self.plain_read(), *self.ours(self.our_op), *others]

    def our_op(self, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        ends = torch.arange(self.rows, len(x) + 1, self.rows, dtype=torch.int32, device=self.device)
        op = quantlib.grouped_dynamic_matmul if self.dynamic else quantlib.grouped_dequant_matmul
        return turns([functools.partial(op, x, codes, scale, self.spec.format, ends, block=self.block, out=outs[0])])

    def loop(self, inputs: Tensors, outs: Tensors) -> Call:
        """The single product, an expert at a time."""
        op = quantlib.dynamic_matmul if self.dynamic else quantlib.dequant_matmul
        parts = [t.unflatten(0, (self.experts, self.rows)) for t in (inputs[0], outs[0])]

        def call() -> None:
            for x, codes, scale, y in zip(parts[0], *inputs[1:], parts[1], strict=True):
                op(x, codes, scale, self.spec.format, block=self.block, out=y)

        return turns([call])

    def in_floats(self, inputs: Tensors, outs: Tensors) -> Call:
        """The product with the weights in x's dtype, an expert at a time."""
        x, *weight = inputs
        w = [self.values(*parts).to(x.dtype) for parts in zip(*weight, strict=True)]
        parts = [t.unflatten(0, (self.experts, self.rows)) for t in (x, outs[0])]

        def call() -> None:
            for x, of_expert, y in zip(parts[0], w, parts[1], strict=True):
                y.copy_(F.linear(x, of_expert))

        return turns([call])
