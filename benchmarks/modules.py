"""y = module(x): QuantLinear, QuantEmbedding and QuantConv2d, in eager mode, beside the float module and its peers.

A module is made of a float one by ``quantize_``. Its codes must be those that the float weight was made of, and its
output the reference's, byte for byte.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantlib
from quantlib import reference
from quantlib.testing.bytes import Array

from . import graphs, peer_models
from .case import Call, Case, Contender, Scaled, Tensors, normal, numbers
from .matmul import W4A16, W8A8, W8A16, Product, as_integers, exact_weight, itemsize, sizes, turns
from .peer_models import QUANTLIB

LOOKUPS = 512  # rows of a table that are looked up at a time

LINEAR = {  # quick -> (spec, dtype, rows)
    True: ((W8A16, "bfloat16", (1,)), (W8A8, "bfloat16", (16,))),
    False: (
        (W8A16, "bfloat16", (1, 16, 64, 256)),
        (W8A16, "float32", (1, 64)),
        (W8A8, "bfloat16", (1, 64)),
        (W8A8, "float32", (1, 64)),
        (W4A16, "bfloat16", (1, 64)),
    ),
}


def cases(quick: bool, **common: Any) -> list[Case]:
    small = math.prod(common["shape"]) < graphs.SMALL
    table = common["shape"] if small else (32_000, 1024 if quick else 2048)
    image = (4, 8, 6, 6) if small else (256, 256, 28, 28)  # channels out, in; height, width
    return [
        *(
            Linear(**{**common, "shape": shape, "spec": spec, "dtype": dtype})
            for spec, dtype, rows in LINEAR[quick]
            for shape in sizes(True, rows, common)
        ),
        *(
            Embedding(**{**common, "shape": table, "dtype": "bfloat16", "spec": spec.weight_only})
            for spec in ((W8A16,) if quick else (W8A16, W4A16))
        ),
        Conv2d(**{**common, "shape": image, "dtype": "bfloat16"}),
    ]


class Linear(Product):
    family = "modules"

    @property
    def op(self) -> str:
        return f"linear {super().op}"

    def outs(self, *inputs: Tensor) -> Tensors:
        """None: a module allocates."""
        return ()

    def moved(self, inputs: Tensors, outs: Tensors) -> int:
        M, N, _ = self.shape
        return super().moved(inputs, outs) + M * N * inputs[0].element_size()

    def contenders(self) -> list[Contender]:
        dtypes = dict.fromkeys((self.dtype, "bfloat16"))
        return [
            *self.ours(functools.partial(QUANTLIB.bind, self.model, self.nbytes)),
            *peer_models.floats(self.model, dtypes, math.prod(self.shape[1:]), self.moved_as),
            *(q.contender(self.model, self.nbytes) for q in peer_models.of(self.model)),
        ]


@dataclass(frozen=True)
class Module(Scaled):
    """A module that is not linear; ``spec`` is of its weight."""

    family = "modules"
    streams = False

    @property
    def conversion(self) -> str:
        return f"{self.spec.format} -> {self.dtype}"

    def outs(self, *inputs: Tensor) -> Tensors:
        """None: a module allocates."""
        return ()

    def as_float(self, weight: Tensor) -> nn.Module:
        """The module with ``weight``, for `quantize_` to find in a Sequential."""
        raise NotImplementedError

    def weights(self) -> Tensors:
        """Codes and scale [N, K]."""
        return exact_weight(self.matrix, self.spec, self.device)

    @property
    def matrix(self) -> tuple[int, int]:
        raise NotImplementedError

    def built(self, dtype: str) -> nn.Module:
        N, K = self.matrix
        w = quantlib.dequantize(*self.weights(), self.spec.format, block=self.spec.block((N, K)), size=K)
        return nn.Sequential(self.as_float(w.to(getattr(torch, dtype)))).eval().requires_grad_(False)

    def contenders(self) -> list[Contender]:
        def ours(inputs: Tensors, outs: Tensors) -> Call:
            model = self.built(self.dtype)
            quantlib.quantize_(model, self.spec, types=(type(model[0]),))
            return self.called(model, inputs)

        def as_it_is(dtype: str) -> Contender:
            moved = self.moved_as(dtype)
            return Contender(f"torch {dtype}", lambda inputs, outs: self.called(self.built(dtype), inputs), moved=moved)

        return [*self.ours(ours), *map(as_it_is, ("bfloat16", "float32"))]

    def called(self, model: nn.Module, inputs: Tensors) -> Call:
        raise NotImplementedError

    def moved_as(self, dtype: str) -> int:
        """Bytes that the float module moves."""
        raise NotImplementedError


@dataclass(frozen=True)
class Embedding(Module):
    """``shape`` is that of the table; every call looks up other rows, until all have been."""

    @property
    def op(self) -> str:
        return f"embedding {self.shape[0]}x{self.shape[1]}"

    @property
    def matrix(self) -> tuple[int, int]:
        N, K = self.shape
        return N, K

    def inputs(self) -> Tensors:
        """The rows of the first call, then of all the others."""
        N = self.shape[0]
        order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(self.device)
        return tuple(order.split(min(LOOKUPS, N))[: max(1, N // LOOKUPS)])

    def moved(self, inputs: Tensors, outs: Tensors) -> int:
        """Bytes that a call moves: ids, codes and their scales in, values out."""
        ids, K = inputs[0], self.shape[1]
        return ids.nbytes + self.spec.nbytes((len(ids), K)) + len(ids) * K * itemsize(self.dtype)

    def moved_as(self, dtype: str) -> int:
        return min(LOOKUPS, self.shape[0]) * (8 + 2 * self.shape[1] * itemsize(dtype))

    def expected(self, rows: slice, *ids: Tensor) -> Iterator[tuple[slice, Array]]:
        codes, scale = (t[ids[0].cpu()[:128]].cpu() for t in self.weights())
        q, K = as_integers(codes, self.spec), self.shape[1]
        options = {"block": self.spec.block(self.shape), "dtype": self.dtype, "size": K}
        yield slice(0, 128), reference.dequantize(q, numbers(scale), self.spec.format, **options)

    def as_float(self, weight: Tensor) -> nn.Module:
        return nn.Embedding(*weight.shape, _weight=weight)

    def called(self, model: nn.Module, inputs: Tensors) -> Call:
        return turns([functools.partial(model, ids) for ids in inputs])

    def contenders(self) -> list[Contender]:
        def by_torch(inputs: Tensors, outs: Tensors) -> Call:
            model, qconfigs = self.built("float32"), torch.ao.quantization
            four = self.spec.row.packed
            model[0].qconfig = getattr(qconfigs, f"float_qparams_weight_only_qconfig{'_4bit' if four else ''}")
            torch.ao.quantization.convert(torch.ao.quantization.prepare(model, inplace=True), inplace=True)
            return self.called(model, inputs)

        quantized = Contender("torch quantized", by_torch, note="a zero point a row, float32 out")
        return [*super().contenders(), *([quantized] if self.device == "cpu" else [])]


@dataclass(frozen=True)
class Conv2d(Module):
    """A kernel of 3 x 3 over one image; ``shape`` is (channels out, channels in, height, width)."""

    @property
    def op(self) -> str:
        return "conv2d {}x{}x3x3 {}x{}".format(*self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        return self.shape[0], self.shape[1] * 9

    @property
    def conversion(self) -> str:
        return f"{self.dtype} x {self.spec.format}"

    @property
    def multiplies(self) -> str:
        return self.dtype

    @property
    def flops(self) -> int:
        return 2 * 9 * math.prod(self.shape)

    def inputs(self) -> Tensors:
        """x [1, channels in, height, width], small integers."""
        x = normal((1, *self.shape[1:]), "float32", self.device).mul(3).round()
        return (x.to(getattr(torch, self.dtype)),)

    def moved(self, inputs: Tensors, outs: Tensors) -> int:
        (x,), (N, _, height, width) = inputs, self.shape
        return x.nbytes + self.spec.nbytes(self.matrix) + N * height * width * x.element_size()

    def moved_as(self, dtype: str) -> int:
        out, channels, height, width = self.shape
        return (math.prod(self.matrix) + (out + channels) * height * width) * itemsize(dtype)

    def expected(self, rows: slice, x: Tensor) -> Iterator[tuple[slice, Array]]:
        """A convolution is a product with the patches of the image."""
        patches = numbers(F.unfold(x.float(), 3, padding=1)[0].t())
        codes, scale = self.weights()
        weight = as_integers(codes, self.spec), numbers(scale), self.spec.format
        y = reference.dequant_matmul(patches, *weight, block=self.spec.block(self.matrix), dtype=self.dtype)
        yield slice(None), y.T.reshape(1, self.shape[0], *self.shape[2:])

    def as_float(self, weight: Tensor) -> nn.Module:
        N, channels = self.shape[:2]
        conv = nn.Conv2d(channels, N, 3, padding=1, bias=False, device="meta")
        conv.weight = nn.Parameter(weight.view(N, channels, 3, 3), requires_grad=False)
        return conv

    def called(self, model: nn.Module, inputs: Tensors) -> Call:
        dtype = next(model.parameters()).dtype
        x = inputs[0].to(dtype) if dtype.is_floating_point and isinstance(model[0], nn.Conv2d) else inputs[0]
        return turns([functools.partial(model, x)])
