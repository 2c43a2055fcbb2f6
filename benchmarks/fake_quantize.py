"""y[i, j] = c[i, j] * scale[i // br, j // bk] and the gradients of x and scale: forward and backward through autograd.

y and dx are fresh memory for everybody, as they are in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array

from . import peers
from .case import Call, Case, Contender, Scaled, Tensors, normal, numbers, of_block_rows

QUICK = (("float32", "int8:row"),)
MORE = (("float32", "int8:tensor"), ("float32", "int4:group:128"), ("bfloat16", "int8:row"))

Forward = Callable[[Tensor, Tensor], Tensor]  # (x, scale) -> y


def cases(quick: bool, **common: Any) -> list[Case]:
    chosen = QUICK if quick else QUICK + MORE
    return [FakeQuantize(dtype=dtype, spec=QuantSpec.parse(spec), **common) for dtype, spec in chosen]


class FakeQuantize(Scaled):
    """Results are y and dx; dscale is computed too, but it is a sum, whose bytes no two agree on."""

    family = "fake_quantize"
    streams = False

    def inputs(self) -> Tensors:
        """x, dy, scale."""
        x = normal(self.shape, self.dtype, self.device)
        return x, x.flip(0), *self.given_scales(x)

    def outs(self, *inputs: Tensor) -> Tensors:
        return ()

    def expected(self, rows: slice, x: Tensor, dy: Tensor, scale: Tensor) -> Iterator[tuple[slice, Array]]:
        block, format = self.block(x), self.spec.format
        s = scale[of_block_rows(rows, block[0])].cpu().numpy()
        y = reference.fake_quantize(numbers(x[rows]), s, format, block=block)
        dx = reference.fake_quantize_backward(numbers(dy[rows]), numbers(x[rows]), s, format, block=block).dx
        yield from ((rows, reference.cast(values, self.dtype)) for values in (y, dx))

    def contenders(self) -> list[Contender]:
        qmin, qmax = self.spec.row.range(False)
        whole = self.spec.block(self.shape)

        def ours(x: Tensor, scale: Tensor) -> Tensor:
            return quantlib.fake_quantize(x, scale, self.spec.format, block=whole)

        def formula(x: Tensor, scale: Tensor) -> Tensor:
            blocks, s = x.float().view(*scale.shape, -1), scale.unsqueeze(-1)
            t = blocks * (1 / s)
            k = t + (t.round() - t).detach()
            return (k.clamp(qmin, qmax) * s).view(x.shape).to(x.dtype)

        def compiled(inputs: Tensors, outs: Tensors) -> Call:
            torch.compiler.reset()
            return trained(torch.compile(formula, fullgraph=True, dynamic=False))(inputs, outs)

        by_torch = [Contender("torch.compile", compiled, note=peers.FRESH)]
        if self.dtype == "float32" and self.spec.per in ("row", "tensor"):
            by_torch += [
                Contender(name, trained(forward), note=peers.FRESH) for name, forward in self.of_torch(qmin, qmax)
            ]
        return [*self.ours(trained(ours)), *by_torch]

    def of_torch(self, qmin: int, qmax: int) -> list[tuple[str, Forward]]:
        """torch's own ops; the one that does not learn leaves the scale without a gradient."""
        if self.spec.per == "tensor":
            zero = torch.zeros(1)
            return [
                (
                    "torch.fake_quantize_per_tensor_affine",
                    lambda x, s: torch.fake_quantize_per_tensor_affine(
                        x, s.detach().view(()), zero.int().view(()), qmin, qmax
                    ),
                ),
                (
                    "torch learnable",
                    lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(x, s.view(1), zero, qmin, qmax, 1.0),
                ),
            ]
        zero = torch.zeros(self.shape[0])
        zero_codes = zero.int()
        return [
            ("torch.fake_quantize_per_channel_affine",
             lambda x, s: torch.fake_quantize_per_channel_affine(x, s.detach()[:, 0], zero_codes, 0, qmin, qmax)),
            ("torch learnable",
             lambda x, s: torch._fake_quantize_learnable_per_channel_affine(x, s[:, 0], zero, 0, qmin, qmax, 1.0)),
        ]  # fmt: skip


def trained(forward: Forward) -> Callable[[Tensors, Tensors], Call]:
    """y and dx of a forward and a backward, which also gives dscale."""

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        x, dy, scale = inputs

        def call() -> Tensors:
            leaves = [x.detach().requires_grad_(), scale.detach().requires_grad_()]
            y = forward(*leaves)
            dx, _ = torch.autograd.grad(y, leaves, dy, allow_unused=True)
            return y.detach(), dx

        return call

    return bind
