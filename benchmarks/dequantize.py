"""y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk]"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array, bits, poisoned

from . import formulas, graphs, peers
from .case import Call, Case, Contender, Scaled, Tensors, normal, of_block_rows

QUICK = (("int8:row", "float32"),)
MORE = (
    ("int8:row", "bfloat16"),
    ("int8:group:128", "bfloat16"),
    ("int8:row:affine", "float32"),
    ("float8_e4m3fn:row", "bfloat16"),
    ("int4:group:128", "bfloat16"),
)


def cases(quick: bool, **common: Any) -> list[Case]:
    chosen = QUICK if quick else QUICK + MORE
    return [
        Dequantize(dtype=dtype, spec=QuantSpec.parse(spec), **each)
        for spec, dtype in chosen
        for each in graphs.shaped(common, (spec, dtype) in QUICK)
    ]


@dataclass(frozen=True)
class Dequantize(Scaled):
    """``dtype`` is that of the values."""

    family = "dequantize"

    @property
    def conversion(self) -> str:
        return f"{self.spec.format} -> {self.dtype}"

    def inputs(self) -> Tensors:
        x = normal(self.shape, "float32", self.device)
        scale, *zero_point = self.given_scales(x)
        z = zero_point[0] if zero_point else None
        return quantlib.quantize(x, scale, self.spec.format, block=self.block(x), zero_point=z), scale, *zero_point

    def outs(self, codes: Tensor, *scales: Tensor) -> Tensors:
        return (poisoned((codes.shape[0], self.columns(codes)), getattr(torch, self.dtype), self.device),)

    def expected(self, rows: slice, codes: Tensor, scale: Tensor, *zero_point: Tensor) -> Iterator[tuple[slice, Array]]:
        K = self.columns(codes)
        block = self.spec.block((codes.shape[0], K))
        s, *z = (t[of_block_rows(rows, block[0])].cpu().numpy() for t in (scale, *zero_point))
        options = {"block": block, "zero_point": z[0] if z else None, "dtype": self.dtype, "size": K}
        part = bits(codes[rows]).view(self.spec.row.storage)
        yield rows, reference.dequantize(part, s, self.spec.format, **options)

    def columns(self, codes: Tensor) -> int:
        """Elements of a row."""
        return self.spec.row.sizes(codes.shape[1])[-1]

    def contenders(self) -> list[Contender]:
        f, format, whole = self.spec.row, self.spec.format, self.spec.block(self.shape)

        def ours(inputs: Tensors, outs: Tensors) -> Call:
            (codes, scale, z), (out,), block = (*inputs, None)[:3], outs, self.spec.block(outs[0].shape)
            return lambda: quantlib.dequantize(codes, scale, format, block=block, zero_point=z, out=out)

        def formula(inputs: Tensors, outs: Tensors) -> None:
            (codes, scale, *zero_point), (out,) = inputs, outs
            q = formulas.blocks(formulas.load(codes, out.shape[1], f), whole)
            if zero_point:
                q = q - formulas.per_block(zero_point[0])
            out.copy_((q * formulas.per_block(scale)).view(out.shape))

        return [
            *self.limits(),
            *self.ours(ours),
            peers.eager(formula),
            peers.compiled(formula),
            *peers.torch_dequantize(self.spec, self.dtype),
            *peers.torchao_dequantize(self.spec),
            *peers.bitsandbytes_dequantize(self.spec, self.dtype),
        ]
