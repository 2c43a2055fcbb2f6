"""y[m, n] = (sum over k of x_codes[m, k] * codes[n, k]) * x_scale[m] * scale[n]: W8A8, from x and from its codes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.testing.bytes import Array

from . import peer_models, peer_runtimes
from .case import Call, Case, Contender, Tensors, numbers
from .matmul import ROWS, W4A8, W8A8, Product, as_integers, exact_weight, exact_x, sizes, turns


def cases(quick: bool, **common: Any) -> list[Case]:
    """x quantized row by row and multiplied, for every shape; by four bits and as codes, for the first weight."""
    cuda = common.get("device") == "cuda"
    rows = (1, 16) if quick else ROWS["cuda" if cuda else "cpu"]
    options = {**common, "spec": W8A8, "dtype": "bfloat16" if cuda else "float32"}
    codes = sizes(True, rows[-1:] if quick else rows[2::2], common)
    four = [] if cuda or quick else sizes(True, rows, common)
    return [
        *(DynamicMatmul(**{**options, "shape": shape}) for shape in sizes(quick, rows, common)),
        *(DynamicMatmul(**{**options, "shape": shape, "spec": W4A8}) for shape in four),
        *(ScaledMatmul(**{**options, "shape": shape}) for shape in codes),
    ]


class DynamicMatmul(Product):
    family = "scaled_matmul"

    def contenders(self) -> list[Contender]:
        models = peer_models.of(self.model) if self.asks_models else ()
        own = [Contender("quantlib W8A8", self.our_int8)] if self.spec.row.packed else []
        peers = [q.contender(self.model, self.nbytes) for q in models]
        return [*self.plain_read(), *self.in_dtypes(), *self.floats(), *own, *peers, *peer_runtimes.of(self)]

    def our_op(self, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        call = functools.partial(quantlib.dynamic_matmul, format=self.spec.format, block=self.block, out=outs[0])
        return turns([functools.partial(call, x, c, scale) for c in self.copies(codes)])

    def our_int8(self, inputs: Tensors, outs: Tensors) -> Call:
        """Multiply by the same values in 8 bits, which are not exact."""
        eight = dataclasses.replace(self, spec=W8A8, backends=())
        w = quantlib.quantize_dynamic(self.values(*inputs[1:]), "int8", block=(1, -1))
        return eight.our_op((inputs[0], *w), outs)


class ScaledMatmul(Product):
    """x comes as codes with a scale a row."""

    family = "scaled_matmul"

    @property
    def conversion(self) -> str:
        return f"int8 x {self.spec.format}"

    def inputs(self) -> Tensors:
        """x_codes, x_scale, codes, scale."""
        M, N, K = self.shape
        x_codes = exact_x((M, K), dynamic=True).to(self.device, torch.int8)
        return x_codes, torch.ones(M, 1, device=self.device), *exact_weight((N, K), self.spec.weight_only, self.device)

    def expected(self, rows: slice, *inputs: Tensor) -> Iterator[tuple[slice, Array]]:
        x_codes, x_scale, codes, scale = inputs
        x = as_integers(x_codes[rows], self.spec), numbers(x_scale[rows])
        weight = as_integers(codes, self.spec), numbers(scale), self.spec.format
        yield rows, reference.scaled_matmul(*x, *weight, block=self.block, dtype=self.dtype)

    def contenders(self) -> list[Contender]:
        def ours(inputs: Tensors, outs: Tensors) -> Call:
            *x, codes, scale = inputs
            call = functools.partial(quantlib.scaled_matmul, format=self.spec.format, block=self.block, out=outs[0])
            return turns([functools.partial(call, *x, c, scale) for c in self.copies(codes)])

        def int_mm(inputs: Tensors, outs: Tensors) -> Call:
            x_codes, x_scale, codes, scale = inputs
            run = torch.compile(by_int_mm, fullgraph=True, dynamic=False)
            return turns([functools.partial(run, x_codes, x_scale, c, scale.t(), outs[0]) for c in self.copies(codes)])

        peers = [Contender("torch._int_mm compiled", int_mm)]
        if self.device == "cuda":
            peers.append(Contender("torch._scaled_mm float8", self.scaled_mm))
        return [*self.plain_read(), *self.ours(ours), *peers]

    def scaled_mm(self, inputs: Tensors, outs: Tensors) -> Call:
        """float8_e4m3fn instead of int8, which is as many bytes."""
        x_codes, x_scale, codes, scale = inputs
        x, w = x_codes.to(torch.float8_e4m3fn), codes.to(torch.float8_e4m3fn)
        call = functools.partial(torch._scaled_mm, scale_a=x_scale, scale_b=scale.t(), out_dtype=outs[0].dtype)
        return turns([functools.partial(call, x, c.t()) for c in self.copies(w)])


def by_int_mm(x_codes: Tensor, x_scale: Tensor, codes: Tensor, scale: Tensor, out: Tensor) -> None:
    out.copy_(torch._int_mm(x_codes, codes.t()).float() * x_scale * scale)
