"""scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array

from . import formulas, graphs, peers
from .case import Call, Case, Contender, Tensors, numbers, of_block_rows
from .compute_scale import Ranged

QUICK = (("float32", "int8:row"),)
MORE = (
    ("float32", "int8:tensor"),
    ("float32", "int8:group:128"),
    ("float32", "int8:row:affine"),
    ("float32", "float8_e4m3fn:row"),
    ("float32", "int4:group:128"),
    ("bfloat16", "int8:row"),
)


def cases(quick: bool, **common: Any) -> list[Case]:
    chosen = QUICK if quick else QUICK + MORE
    return [
        QuantizeDynamic(dtype=dtype, spec=QuantSpec.parse(spec), **each)
        for dtype, spec in chosen
        for each in graphs.shaped(common, (dtype, spec) in QUICK)
    ]


class QuantizeDynamic(Ranged):
    family = "quantize_dynamic"

    def outs(self, x: Tensor) -> Tensors:
        return self.codes(x), *self.scales(x)

    def expected(self, rows: slice, x: Tensor) -> Iterator[tuple[slice, Array]]:
        block, format = self.block(x), self.spec.format
        scales = [found for _, found in super().expected(rows, x)]
        scale, *zero_point = (s[of_block_rows(rows, block[0])] for s in scales)
        z = zero_point[0] if zero_point else None
        yield rows, reference.quantize(numbers(x[rows]), scale, format, block=block, zero_point=z)
        yield from ((slice(None), s) for s in scales)

    def contenders(self) -> list[Contender]:
        f, format, symmetric, whole = self.spec.row, self.spec.format, self.spec.symmetric, self.spec.block(self.shape)

        def ours(inputs: Tensors, outs: Tensors) -> Call:
            (x,), block = inputs, self.block(inputs[0])
            return lambda: quantlib.quantize_dynamic(x, format, block=block, symmetric=symmetric, out=outs)

        def formula(inputs: Tensors, outs: Tensors) -> None:
            x, codes, scales = formulas.blocks(inputs[0], whole), outs[0], outs[1:]
            scale, zero_point = formulas.compute_scale(x, f, not symmetric)
            formulas.store(formulas.encode(x, scale, zero_point, f), codes, f)
            for out, found in zip(scales, (scale, zero_point), strict=False):
                out.copy_(found.view(out.shape))

        return [
            *self.limits(),
            *self.ours(ours),
            peers.eager(formula),
            peers.compiled(formula),
            *peers.torchao_quantize_dynamic(self.spec),
            *peers.bitsandbytes_quantize_dynamic(self.spec),
        ]
