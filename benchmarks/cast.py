"""y[...] = encode(decode(x[...]))"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.testing import poisoned
from quantlib.testing.bytes import Array

from . import graphs, peers
from .case import Call, Case, Contender, Tensors, normal, numbers

QUICK = (
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float32", "float8_e4m3fn"),
    ("float32", "float8_e5m2"),
)
MORE = (
    ("bfloat16", "float8_e4m3fn"),
    ("float16", "float32"),
    ("bfloat16", "float32"),
    ("float8_e4m3fn", "float32"),
)


def cases(quick: bool, **common: Any) -> list[Case]:
    chosen = QUICK if quick else QUICK + MORE
    return [
        Cast(dtype=dtype, format=format, **each)
        for dtype, format in chosen
        for each in graphs.shaped(common, (dtype, format) in QUICK)
    ]


@dataclass(frozen=True)
class Cast(Case):
    format: str = "float16"

    family = "cast"

    @property
    def conversion(self) -> str:
        return f"{self.dtype} -> {self.format}"

    def inputs(self) -> Tensors:
        return (normal(self.shape, self.dtype, self.device),)

    def outs(self, x: Tensor) -> Tensors:
        return (poisoned(x.shape, getattr(torch, self.format), self.device),)

    def expected(self, rows: slice, x: Tensor) -> Iterator[tuple[slice, Array]]:
        yield rows, reference.cast(numbers(x[rows]), self.format)

    def contenders(self) -> list[Contender]:
        def ours(inputs: Tensors, outs: Tensors) -> Call:
            (x,), (out,), format = inputs, outs, self.format
            return lambda: quantlib.cast(x, format, out=out)

        def formula(inputs: Tensors, outs: Tensors) -> None:
            outs[0].copy_(inputs[0])

        def fresh(inputs: Tensors, outs: Tensors) -> Call:
            (x,), dtype = inputs, outs[0].dtype
            return lambda: x.to(dtype)

        return [
            *self.limits(),
            *self.ours(ours),
            peers.eager(formula, "torch copy_"),
            peers.compiled(formula),
            Contender("torch to", fresh, note=peers.FRESH),
        ]
