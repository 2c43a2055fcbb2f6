"""y[m, n] = sum over k of x[m, k] * w[n, k] with quantized weights: W8A16, W4A16 and W8A8 beside float linears.

x are small integers and scales powers of two, so that every sum is exact and bytes can be compared. Weights take
turns, so that none is found in a cache: a model's weights are not, either.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import quantlib
from quantlib import reference
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array, bits, poisoned

from . import peers
from .case import Call, Case, Contender, Scaled, Tensors, numbers

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (N, K)
ROWS = (1, 4, 16, 64, 256)  # M
CACHE = 32 << 20  # bytes; the weights that take turns exceed three times that
W8A16, W4A16, W8A8 = map(QuantSpec.parse, ("W8A16", "W4A16", "W8A8"))


def cases(quick: bool, **common: Any) -> list[Case]:
    """Weights of SHAPES, or of ``shape`` where that is small: then nothing is to be learned but that it works."""
    small = math.prod(common["shape"]) < CACHE // 4
    shapes = (common["shape"],) if small else SHAPES[:1] if quick else SHAPES
    rows = (1, 16) if quick else ROWS
    return [
        Matmul(**{**common, "shape": (M, N, K), "spec": spec, "dtype": dtype})
        for spec, dtype in ((W8A16, "bfloat16"), (W4A16, "bfloat16"), (W8A8, "float32"))
        for N, K in shapes
        for M in (rows if spec is not W4A16 else rows[:1] if quick else (1, 16))
    ]


@dataclass(frozen=True)
class Matmul(Scaled):
    """``shape`` is (M, N, K), ``dtype`` that of x and y."""

    family = "matmul"
    streams = False

    @property
    def op(self) -> str:
        return f"{self.shape[1]}x{self.shape[2]} M={self.shape[0]}"

    @property
    def conversion(self) -> str:
        x = "int8" if self.dynamic else self.dtype
        return f"{x} x {self.spec.format}"

    @property
    def multiplies(self) -> str:
        return "int8" if self.dynamic else self.dtype

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.shape)

    def moved(self, inputs: Tensors, outs: Tensors) -> int:
        return sum(t.nbytes for t in (*inputs, *outs))

    @property
    def dynamic(self) -> bool:
        """Whether x is quantized too."""
        return self.spec.activation is not None

    @property
    def block(self) -> tuple[int, int]:  # type: ignore[override]
        return self.spec.block(self.shape[1:])

    def inputs(self) -> Tensors:
        """x, codes, scale."""
        M, N, K = self.shape
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(-7, 8, (M, K), generator=generator)
        x[:, 0] = 127 if self.dynamic else 7  # the row's scale is 1
        lowest, highest = (-127, 128) if self.spec.row.bits == 8 else (0, 256)
        dtype = getattr(torch, self.spec.row.dtype_name)
        codes = torch.randint(lowest, highest, self.spec.codes_shape((N, K)), generator=generator).to(dtype)
        scale = torch.exp2(torch.randint(-12, -8, self.spec.scale_shape((N, K)), generator=generator))
        return x.to(self.device, getattr(torch, self.dtype)), codes.to(self.device), scale.to(self.device)

    def outs(self, x: Tensor, *weight: Tensor) -> Tensors:
        return (poisoned((len(x), self.shape[1]), x.dtype, self.device),)

    def expected(self, rows: slice, x: Tensor, codes: Tensor, scale: Tensor) -> Iterator[tuple[slice, Array]]:
        q = bits(codes)
        q = q.view(np.int8) if self.spec.format == "int8" else q
        meaning = reference.dynamic_matmul if self.dynamic else reference.dequant_matmul
        y = meaning(numbers(x[rows]), q, numbers(scale), self.spec.format, block=self.block, dtype=self.dtype)
        yield rows, y

    def contenders(self) -> list[Contender]:
        op = quantlib.dynamic_matmul if self.dynamic else quantlib.dequant_matmul

        def ours(inputs: Tensors, outs: Tensors) -> Call:
            x, codes, scale = inputs
            call = functools.partial(op, format=self.spec.format, block=self.block, out=outs[0])
            return turns(codes, lambda c: functools.partial(call, x, c, scale))

        def linear(dtype: torch.dtype) -> Callable[[Tensors, Tensors], Call]:
            def bind(inputs: Tensors, outs: Tensors) -> Call:
                x, codes, scale = inputs
                w = self.values(codes, scale).to(dtype)
                return turns(w, lambda w: functools.partial(F.linear, x.to(dtype), w))

            return bind

        floats = [Contender(f"F.linear {name}", linear(getattr(torch, name))) for name in ("bfloat16", "float32")]
        return [*self.ours(ours), *floats, *self.others()]

    def others(self) -> list[Contender]:
        """Peers with quantized weights; of W4A16 our own W8A16 as well."""
        if self.dynamic:
            return [
                Contender("torch quantize_dynamic", self.torch_dynamic),
                Contender("torchao compiled", functools.partial(self.torchao, "Int8DynamicActivationInt8WeightConfig")),
            ]
        if self.spec.row.packed:
            (eight,) = dataclasses.replace(self, spec=W8A16, backends=()).contenders()[:1]
            bind = eight.bind

            def int8(inputs: Tensors, outs: Tensors) -> Call:
                x, codes, scale = inputs
                w = quantlib.quantize_dynamic(self.values(codes, scale), "int8", block=(1, -1))
                return bind((x, *w), outs)

            nf4 = Contender("bitsandbytes nf4", self.bitsandbytes_nf4, note=peers.CODEBOOK)
            return [Contender("quantlib W8A16", int8), nf4]
        return [
            Contender("torch._weight_int8pack_mm", self.int8pack),
            Contender("torchao compiled", functools.partial(self.torchao, "Int8WeightOnlyConfig")),
            Contender("bitsandbytes int8", self.bitsandbytes_int8),
        ]

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return quantlib.dequantize(codes, scale, self.spec.format, block=self.block, size=self.shape[2])

    def int8pack(self, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        narrow = scale[:, 0].to(x.dtype)
        return turns(codes, lambda c: functools.partial(torch._weight_int8pack_mm, x, c, narrow))

    def torch_dynamic(self, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        model = torch.nn.Sequential(as_linear(self.values(codes, scale)))
        (layer,) = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
        return turns(codes, lambda _: functools.partial(torch.nn.quantized.dynamic.Linear.forward, renewed(layer), x))

    def torchao(self, config: str, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        quantization = peers.package("torchao.quantization")
        w = self.values(codes, scale).to(x.dtype)
        torch.compiler.reset()

        def layer(_: Tensor) -> Call:
            model = torch.nn.Sequential(as_linear(w))
            quantization.quantize_(model, getattr(quantization, config)())
            return functools.partial(run, model[0].weight, x)

        run = torch.compile(lambda weight, x: F.linear(x, weight), fullgraph=True, dynamic=False)
        return turns(codes, layer)

    def bitsandbytes_int8(self, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        nn = peers.package("bitsandbytes.nn")
        _, N, K = self.shape
        layer = nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": self.values(codes, scale).half()})
        return functools.partial(layer.to("cpu"), x)

    def bitsandbytes_nf4(self, inputs: Tensors, outs: Tensors) -> Call:
        x, codes, scale = inputs
        package = peers.package("bitsandbytes")
        w, state = package.functional.quantize_nf4(self.values(codes, scale).to(x.dtype), blocksize=128)
        return turns(w, lambda w: functools.partial(package.matmul_4bit, x, w.t(), quant_state=state))


def as_linear(w: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(w, requires_grad=False)
    return layer


def renewed(layer: torch.nn.Module) -> torch.nn.Module:
    """The same packed layer at another place in memory."""
    return copy.deepcopy(layer)


def turns(weight: Tensor, bind: Callable[[Tensor], Call]) -> Call:
    """Calls of ``bind(copy)`` in turn, for as many copies of ``weight`` as no cache holds."""
    count = max(2, -(-3 * CACHE // weight.nbytes))
    calls: Sequence[Call] = [bind(weight.clone()) for _ in range(count)]
    take = itertools.cycle(calls)

    def call() -> Any:
        with torch.inference_mode():
            return next(take)()

    return call
