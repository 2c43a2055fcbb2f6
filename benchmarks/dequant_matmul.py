"""y[m, n] = sum over k of x[m, k] * decode(codes[n, k]) * scale[n // br, k // bk]: W8A16 and W4A16."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

import quantlib

from . import peer_models, peer_runtimes
from .case import Call, Case, Contender, Tensors
from .formulas import load
from .matmul import ROWS, W4A16, W8A16, Product, sizes, turns


def cases(quick: bool, **common: Any) -> list[Case]:
    """The first weight with every number of rows; of four bits the others, on a CPU, with one row of x alone."""
    rows = (1, 16) if quick else ROWS[common.get("device", "cpu")]
    eight, four = sizes(quick, rows, common), sizes(quick, (1,) if quick else rows, common)
    if common.get("device", "cpu") == "cpu":
        four = [shape for shape in four if shape[0] == 1 or shape[1:] == four[0][1:]]
    return [
        DequantMatmul(**{**common, "shape": shape, "spec": spec, "dtype": "bfloat16"})
        for spec, shapes in ((W8A16, eight), (W4A16, four))
        for shape in shapes
    ]


class DequantMatmul(Product):
    family = "dequant_matmul"

    def contenders(self) -> list[Contender]:
        own = [Contender("quantlib W8A16", self.our_int8)] if self.spec.row.packed else []
        others = [*self.floats(), *self.of_torch(), *own, *self.of_models(), *peer_runtimes.of(self)]
        return [*self.plain_read(), *self.in_dtypes(), *others]

    def our_op(self, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        call = functools.partial(quantlib.dequant_matmul, format=self.spec.format, block=self.block, out=outs[0])
        return turns([functools.partial(call, x, c, scale) for c in self.copies(codes)])

    def our_int8(self, inputs: Tensors, outs: Tensors) -> Call:
        """Multiply by the same values in 8 bits, which are not exact."""
        eight = dataclasses.replace(self, spec=W8A16, backends=())
        w = quantlib.quantize_dynamic(self.values(*inputs[1:]), "int8", block=(1, -1))
        return eight.our_op((inputs[0], *w), outs)

    def of_torch(self) -> list[Contender]:
        if self.spec.row.packed:
            return [Contender("torch._weight_int4pack_mm", self.int4pack)] if self.device == "cpu" else []
        return [Contender("torch._weight_int8pack_mm", self.int8pack)]

    def int8pack(self, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        narrow = scale[:, 0].to(x.dtype)
        return turns([functools.partial(torch._weight_int8pack_mm, x, c, narrow) for c in self.copies(codes)])

    def int4pack(self, inputs: Tensors, outs: Tensors) -> Call:
        """torch's product on the CPU: codes + 8 in an order of its own, [K / bk, N] pairs of a scale and a zero."""
        x, codes, scale = inputs
        q = load(codes, self.shape[2], self.spec.row).int() + 8
        packed = torch._convert_weight_to_int4pack_for_cpu(q, 1)
        pairs = torch.stack((scale.t(), torch.zeros_like(scale.t())), -1).to(x.dtype)
        run = torch._weight_int4pack_mm_for_cpu
        return turns([functools.partial(run, x, c, self.block[1], pairs) for c in self.copies(packed)])

    def of_models(self) -> list[Contender]:
        """Return the peers' layers except optimum-quanto's, which call torch's ops, which are here already."""
        models = peer_models.of(self.model) if self.asks_models else ()
        return [q.contender(self.model, self.nbytes) for q in models if q is not peer_models.QUANTO]
