"""scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array

from . import formulas, graphs, peers
from .case import Call, Case, Contender, Scaled, Tensors, normal, numbers

QUICK = (("float32", "int8:row"),)
MORE = (
    ("float32", "int8:tensor"),
    ("float32", "int8:tile:128"),
    ("float32", "int4:group:128"),
    ("float32", "int8:row:affine"),
    ("bfloat16", "int8:row"),
)


def cases(quick: bool, **common: Any) -> list[Case]:
    chosen = QUICK if quick else QUICK + MORE
    return [
        ComputeScale(dtype=dtype, spec=QuantSpec.parse(spec), **each)
        for dtype, spec in chosen
        for each in graphs.shaped(common, (dtype, spec) in QUICK)
    ]


class Ranged(Scaled):
    """A case whose scale comes from the range of x."""

    def inputs(self) -> Tensors:
        return (normal(self.shape, self.dtype, self.device),)

    def expected(self, rows: slice, x: Tensor) -> Iterator[tuple[slice, Array]]:
        symmetric = self.spec.symmetric
        found = reference.compute_scale(numbers(x), self.spec.format, self.block(x), symmetric=symmetric)
        yield from ((slice(None), s) for s in ((found,) if symmetric else found))


class ComputeScale(Ranged):
    family = "compute_scale"

    def outs(self, x: Tensor) -> Tensors:
        return self.scales(x)

    def contenders(self) -> list[Contender]:
        f, format, symmetric, whole = self.spec.row, self.spec.format, self.spec.symmetric, self.spec.block(self.shape)

        def ours(inputs: Tensors, outs: Tensors) -> Call:
            (x,), block, out = inputs, self.block(inputs[0]), outs[0] if symmetric else outs
            return lambda: quantlib.compute_scale(x, format, block, symmetric=symmetric, out=out)

        def formula(inputs: Tensors, outs: Tensors) -> None:
            found = formulas.compute_scale(formulas.blocks(inputs[0], whole), f, not symmetric)
            for out, s in zip(outs, found, strict=False):
                out.copy_(s.view(out.shape))

        return [
            *self.limits(),
            *self.ours(ours),
            peers.eager(formula),
            peers.compiled(formula),
            *peers.torchao_compute_scale(self.spec),
        ]
