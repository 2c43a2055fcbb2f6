"""codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array

from . import formulas, graphs, peers
from .case import Call, Case, Contender, Scaled, Tensors, normal, numbers, of_block_rows

QUICK = (("float32", "int8:tensor"),)
MORE = (
    ("float32", "int8:row"),
    ("float32", "int8:group:128"),
    ("float32", "int8:row:affine"),
    ("float32", "float8_e4m3fn:row"),
    ("float32", "int4:group:128"),
    ("bfloat16", "int8:row"),
)


def cases(quick: bool, **common: Any) -> list[Case]:
    chosen = QUICK if quick else QUICK + MORE
    return [
        Quantize(dtype=dtype, spec=QuantSpec.parse(spec), **each)
        for dtype, spec in chosen
        for each in graphs.shaped(common, (dtype, spec) in QUICK)
    ]


class Quantize(Scaled):
    family = "quantize"

    def inputs(self) -> Tensors:
        x = normal(self.shape, self.dtype, self.device)
        return x, *self.given_scales(x)

    def outs(self, x: Tensor, *scales: Tensor) -> Tensors:
        return (self.codes(x),)

    def expected(self, rows: slice, x: Tensor, scale: Tensor, *zero_point: Tensor) -> Iterator[tuple[slice, Array]]:
        block, format = self.block(x), self.spec.format
        scale, *zero_point = (s[of_block_rows(rows, block[0])].cpu().numpy() for s in (scale, *zero_point))
        z = zero_point[0] if zero_point else None
        yield rows, reference.quantize(numbers(x[rows]), scale, format, block=block, zero_point=z)

    def contenders(self) -> list[Contender]:
        f, format, whole = self.spec.row, self.spec.format, self.spec.block(self.shape)

        def ours(inputs: Tensors, outs: Tensors) -> Call:
            (x, scale, zero_point), (out,), block = (*inputs, None)[:3], outs, self.block(inputs[0])
            return lambda: quantlib.quantize(x, scale, format, block=block, zero_point=zero_point, out=out)

        def formula(inputs: Tensors, outs: Tensors) -> None:
            x, *scales = inputs
            scale, zero_point = (*map(formulas.per_block, scales), None)[:2]
            formulas.store(formulas.encode(formulas.blocks(x, whole), scale, zero_point, f), outs[0], f)

        return [
            *self.limits(),
            *self.ours(ours),
            peers.eager(formula),
            peers.compiled(formula),
            *peers.torch_quantize(self.spec, self.dtype),
            *peers.torchao_quantize(self.spec),
        ]
