"""y[i, j] = c[i, j] * scale[i // br, j // bk] and the gradients of x and scale: forward, backward, both, by autograd.

y and dx are fresh memory for everybody, as they are in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array

from . import graphs, peers
from .case import Call, Case, Contender, Scaled, Tensors, normal, numbers, of_block_rows

QUICK = (("float32", "int8:row"),)
MORE = (("float32", "int8:tensor"), ("float32", "int4:group:128"), ("bfloat16", "int8:row"))

Forward = Callable[[Tensor, Tensor], Tensor]  # (x, scale) -> y


def cases(quick: bool, **common: Any) -> list[Case]:
    """Return forward and backward together for every spec, and each alone for the first."""
    chosen = [(dtype, QuantSpec.parse(spec)) for dtype, spec in (QUICK if quick else QUICK + MORE)]
    parts = [(way, *chosen[0]) for way in ("forward", "backward")] + [("", *one) for one in chosen]
    return [
        FakeQuantize(way=way, dtype=dtype, spec=spec, **each)
        for way, dtype, spec in parts
        for each in graphs.shaped(common, (dtype, spec) == chosen[0])
    ]


@dataclass(frozen=True)
class FakeQuantize(Scaled):
    """``way`` is "forward", "backward", or "" for one after the other.

    Results are y and dx; dscale is computed too, but it is a sum, whose bytes no two agree on.
    """

    way: str = ""

    family = "fake_quantize"
    streams = False

    @property
    def op(self) -> str:
        return self.way or self.family

    def moved(self, inputs: Tensors, outs: Tensors) -> int:
        """x and y forward; x, dy and dx backward; the scale each time."""
        x, _, scale = inputs
        return sum({"forward": 2, "backward": 3}[w] * x.nbytes + scale.nbytes for w in self.ways)

    @property
    def ways(self) -> tuple[str, ...]:
        return (self.way,) if self.way else ("forward", "backward")

    def inputs(self) -> Tensors:
        """x, dy, scale."""
        x = normal(self.shape, self.dtype, self.device)
        return x, x.flip(0), *self.given_scales(x)

    def outs(self, *inputs: Tensor) -> Tensors:
        return ()

    def expected(self, rows: slice, x: Tensor, dy: Tensor, scale: Tensor) -> Iterator[tuple[slice, Array]]:
        block, format = self.block(x), self.spec.format
        s = scale[of_block_rows(rows, block[0])].cpu().numpy()
        if "forward" in self.ways:
            y = reference.fake_quantize(numbers(x[rows]), s, format, block=block)
            yield rows, reference.cast(y, self.dtype)
        if "backward" in self.ways:
            dx = reference.fake_quantize_backward(numbers(dy[rows]), numbers(x[rows]), s, format, block=block).dx
            yield rows, reference.cast(dx, self.dtype)

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
            run = torch.compile(formula, fullgraph=True, dynamic=False)
            once = self.way != "backward"  # or what was saved is read by every call
            with torch._functorch.config.patch(donated_buffer=once):
                call = self.trained(run)(inputs, outs)
                call()
            return call

        by_torch = [Contender("torch.compile", compiled, note=peers.FRESH)]
        if self.dtype == "float32" and self.spec.per in ("row", "tensor"):
            by_torch += [
                Contender(name, self.trained(forward), note=peers.FRESH) for name, forward in self.of_torch(qmin, qmax)
            ]
        return [*self.ours(self.trained(ours)), *by_torch]

    def of_torch(self, qmin: int, qmax: int) -> list[tuple[str, Forward]]:
        """torch's own ops; the one that does not learn leaves the scale without a gradient."""
        count = 1 if self.spec.per == "tensor" else self.shape[0]
        zeros = functools.cache(lambda dtype: torch.zeros(count, dtype=dtype, device=self.device))
        if self.spec.per == "tensor":
            fixed, learned = torch.fake_quantize_per_tensor_affine, torch._fake_quantize_learnable_per_tensor_affine
            return [
                (f"torch.{fixed.__name__}",
                 lambda x, s: fixed(x, s.detach().view(()), zeros(torch.int32).view(()), qmin, qmax)),
                ("torch learnable", lambda x, s: learned(x, s.view(1), zeros(torch.float32), qmin, qmax, 1.0)),
            ]  # fmt: skip
        fixed, learned = torch.fake_quantize_per_channel_affine, torch._fake_quantize_learnable_per_channel_affine
        return [
            (f"torch.{fixed.__name__}",
             lambda x, s: fixed(x, s.detach()[:, 0], zeros(torch.int32), 0, qmin, qmax)),
            ("torch learnable", lambda x, s: learned(x, s[:, 0], zeros(torch.float32), 0, qmin, qmax, 1.0)),
        ]  # fmt: skip

    def trained(self, forward: Forward) -> Callable[[Tensors, Tensors], Call]:
        """y, dx or both; the backward gives dscale too."""

        def bind(inputs: Tensors, outs: Tensors) -> Call:
            x, dy, scale = inputs
            leaves = [x.detach().requires_grad_(), scale.detach().requires_grad_()]
            if self.way == "forward":
                return lambda: forward(*leaves).detach()
            if self.way == "backward":
                y = forward(*leaves)
                return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)[0]

            def call() -> Tensors:
                y = forward(*leaves)
                return y.detach(), torch.autograd.grad(y, leaves, dy, allow_unused=True)[0]

            return call

        return bind
