"""Shared parts of the product families: exact operands, the cases of a machine, and weights that take turns.

x are small integers and scales powers of two, so that every sum is exact and bytes can be compared. Weights take
turns, so that none is found in a cache: a model's weights are not, either.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
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

from . import graphs
from .case import LIMIT, PLAIN_READ, Call, Contender, Scaled, Tensors, numbers

SHAPES = {  # (N, K)
    "cpu": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "cuda": (
        (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672),
    ),
}  # fmt: skip
ROWS = {"cpu": (1, 4, 16, 64, 256, 1024), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}  # M
LONG = 1024  # M from which a CPU multiplies for seconds: only by the first weight of SHAPES
CACHE = 32 << 20  # bytes; the weights that take turns exceed three times that
LARGE = 1 << 25  # codes
W8A16, W4A16, W8A8, W4A8 = map(QuantSpec.parse, ("W8A16", "int4:group:128", "W8A8", "W4A8"))
DTYPES = ("bfloat16", "float32", "float16")  # of x


def sizes(quick: bool, rows: Sequence[int], common: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(M, N, K): weights of SHAPES, or of ``shape`` where that is small, to see that everything works."""
    small = math.prod(common["shape"]) < graphs.SMALL
    if small or common.get("device", "cpu") == "cpu":
        return cpu_sizes(rows, quick, (tuple(common["shape"]),) if small else SHAPES["cpu"])
    return [(M, N, K) for N, K in SHAPES["cuda"][: 1 if quick else None] for M in rows]


def cpu_sizes(
    rows: Sequence[int], first: bool = False, shapes: Sequence[tuple[int, ...]] = SHAPES["cpu"]
) -> list[tuple[int, int, int]]:
    """(M, N, K) of the ``first`` weight or of all, the latter with fewer than `LONG` rows of x."""
    return [(M, N, K) for k, (N, K) in enumerate(shapes[: 1 if first else None]) for M in rows if M < LONG or not k]


@dataclass(frozen=True)
class Multiplied(Scaled):
    """A case with products of ``dtype`` and of codes, or of codes alone where ``spec`` has an activation."""

    streams = False

    @property
    def conversion(self) -> str:
        x = f"{self.dtype} -> {self.spec.activation.format}" if self.spec.activation else self.dtype
        return f"{x} x {self.spec.format}"

    @property
    def dynamic(self) -> bool:
        """True if x is quantized too."""
        return self.spec.activation is not None

    @property
    def multiplies(self) -> str:
        return "int8" if self.dynamic else self.dtype


@dataclass(frozen=True)
class Product(Multiplied):
    """y[m, n] = sum over k of x[m, k] * w[n, k]. ``shape`` is (M, N, K), ``dtype`` that of x and y."""

    @property
    def op(self) -> str:
        return f"{self.shape[1]}x{self.shape[2]} M={self.shape[0]}"

    @property
    def flops(self) -> int:
        return 2 * math.prod(self.shape)

    def moved(self, inputs: Tensors, outs: Tensors) -> int:
        return sum(t.nbytes for t in (*inputs, *outs))

    @property
    def block(self) -> tuple[int, int]:  # type: ignore[override]
        return self.spec.block(self.shape[1:])

    def inputs(self) -> Tensors:
        """x, codes, scale."""
        M, N, K = self.shape
        x = exact_x((M, K), self.dynamic).to(self.device, getattr(torch, self.dtype))
        return x, *exact_weight((N, K), self.spec.weight_only, self.device)

    def timed_inputs(self, inputs: Tensors) -> Tensors:
        """x of random reals, or random codes: small integers flip few bits, and a GPU clocks higher with them."""
        x = inputs[0]
        if x.is_floating_point():
            return torch.randn(x.shape, device=x.device).to(x.dtype), *inputs[1:]
        return torch.randint(-127, 128, x.shape, device=x.device).to(x.dtype), *inputs[1:]

    def outs(self, *inputs: Tensor) -> Tensors:
        M, N, _ = self.shape
        return (poisoned((M, N), getattr(torch, self.dtype), self.device),)

    def expected(self, rows: slice, x: Tensor, codes: Tensor, scale: Tensor) -> Iterator[tuple[slice, Array]]:
        y = exact_rows(self.shape, rows.start, rows.stop, self.spec, self.device)
        yield rows, reference.cast(y.view(np.float32), self.dtype)

    def in_dtypes(self) -> list[Contender]:
        """quantlib, with x in the dtype of the case and in the others, which a GPU has cases of its own for."""
        others = [dtype for dtype in DTYPES if dtype != self.dtype] if self.device == "cpu" else []
        cases = [dataclasses.replace(self, dtype=dtype) for dtype in others]
        return [
            *self.ours(self.our_op),
            *(
                dataclasses.replace(own, name=f"{own.name} {case.dtype}", case=case)
                for case in cases
                for own in self.ours(case.from_another)
            ),
        ]

    def our_op(self, inputs: Tensors, outs: Tensors) -> Call:
        """The op into ready memory, its weights in turn."""
        raise NotImplementedError

    def from_another(self, inputs: Tensors, outs: Tensors) -> Call:
        """`our_op` for the inputs of the case with x in another dtype; returns what it wrote."""
        x, *weight = inputs
        ready = self.outs(*inputs)
        call = self.our_op((x.to(getattr(torch, self.dtype)), *weight), ready)
        return graphs.Turns([functools.partial(_then, each, ready[0]) for each in call.calls])

    def plain_read(self) -> list[Contender]:
        """The limit of a product with few rows of x: its codes are read."""

        def bind(inputs: Tensors, outs: Tensors) -> Call:
            codes = self.copies(inputs[-2])
            return turns([functools.partial(torch.amax, c.view(-1).view(torch.int32)) for c in codes])

        if self.device != "cpu":
            return []
        return [Contender(PLAIN_READ, bind, LIMIT, read=lambda _: (), moved=math.prod(self.codes_shape))]

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """The shape of the weight's codes, packed where several share a byte."""
        return self.spec.codes_shape(self.shape[1:])

    def floats(self) -> list[Contender]:
        """The product with the weight in floating point; cuBLAS on a GPU."""

        def linear(dtype: torch.dtype) -> Contender:
            def bind(inputs: Tensors, outs: Tensors) -> Call:
                x, w = inputs[0].to(dtype), self.values(*inputs[1:]).to(dtype)
                return turns([functools.partial(F.linear, x, c) for c in self.copies(w)])

            name = str(dtype).removeprefix("torch.")
            return Contender(f"F.linear {name}", bind, moved=self.moved_as(name))

        dtypes = (torch.bfloat16, torch.float32) if self.device == "cpu" else (torch.bfloat16,)
        return [linear(dtype) for dtype in dtypes]

    def moved_as(self, dtype: str) -> int:
        """Bytes that the product in floating point moves."""
        M, N, K = self.shape
        return (N * K + M * K + M * N) * itemsize(dtype)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return quantlib.dequantize(codes, scale, self.spec.format, block=self.block, size=self.shape[2])

    @property
    def model(self) -> LinearModel:
        """A linear layer with this weight in floating point."""
        return LinearModel(self.shape[1:], self.spec, self.dtype, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weight."""
        return self.spec.weight_only.nbytes(self.shape[1:])

    @property
    def asks_models(self) -> bool:
        """True if others' layers join in: they compile or tune for every shape, on a GPU for the first weight alone."""
        return self.device == "cpu" or self.shape[1:] == SHAPES["cuda"][0]

    def copies(self, weight: Tensor) -> list[Tensor]:
        """``weight``, as often as no cache holds."""
        return [weight.clone() for _ in range(rotation(weight.nbytes, self.device))]


def exact_x(shape: tuple[int, int], dynamic: bool) -> Tensor:
    """[M, K] small integers, whose rows have a scale of 1 where they are quantized."""
    x = torch.randint(-7, 8, shape, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 127 if dynamic else 7
    return x


@functools.lru_cache(maxsize=8)
def exact_weight(shape: tuple[int, int], spec: QuantSpec, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
    """Codes and scale, powers of two. The largest code is in every block: whoever quantizes the values finds both."""
    generator, highest = torch.Generator().manual_seed(seed), int(spec.row.max)
    K, (br, bk) = shape[1], spec.block(shape)
    exponent = -round(math.log2(0.58 * highest * math.sqrt(K)))  # y is about as large as x
    q = torch.randint(-highest, highest + 1, shape, generator=generator, dtype=torch.int8)
    q[::br, ::bk] = highest
    scale = torch.exp2(torch.randint(exponent - 1, exponent + 2, spec.scale_shape(shape), generator=generator))
    if spec.row.packed:
        q = quantlib.pack(q, spec.format)
    return q.to(device), scale.to(device)


def _then(call: Call, y: Tensor) -> Tensor:
    call()
    return y


def exact_y(x: Tensor, codes: Tensor, scale: Tensor, spec: QuantSpec) -> Array:
    """Return the result of a linear layer of these operands, bit for bit.

    By the reference; of a weight on a GPU that would keep NumPy for many seconds by a product in float64, which has
    the same bytes: its sums are exact, and a row of x has a scale of 1.
    """
    if codes.is_cuda and codes.numel() > LARGE:
        w = quantlib.dequantize(codes, scale, spec.format, block=spec.block((len(codes), x.shape[1])), size=x.shape[1])
        y = (x.double() @ w.double().t()).float() + 0.0  # no sum is -0
        return reference.cast(numbers(y), str(x.dtype).removeprefix("torch."))
    meaning = reference.dequant_matmul if spec.activation is None else reference.dynamic_matmul
    weight = as_integers(codes, spec), numbers(scale), spec.format
    dtype = str(x.dtype).removeprefix("torch.")
    return meaning(numbers(x), *weight, block=spec.block((len(codes), x.shape[1])), dtype=dtype)


@functools.lru_cache(maxsize=4)
def exact_rows(shape: tuple[int, int, int], first: int, last: int, spec: QuantSpec, device: str) -> Array:
    """`exact_y` of these rows of `exact_x` in float32, which every dtype of x rounds once."""
    M, N, K = shape
    x = exact_x((M, K), spec.activation is not None)[first:last].float().to(device)
    return exact_y(x, *exact_weight((N, K), spec.weight_only, device), spec)


def as_integers(codes: Tensor, spec: QuantSpec) -> Array:
    """Codes as the reference takes them."""
    q = bits(codes)
    return q.view(np.int8) if spec.format == "int8" else q


def itemsize(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


def rotation(nbytes: int, device: str) -> int:
    """The number of copies that exceed every cache; two for a weight that is too small to tell anything."""
    cache = CACHE if device == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    return graphs.rotation(nbytes, cache) if nbytes > cache // 32 else 2


def turns(calls: Sequence[Call]) -> graphs.Turns:
    """One of ``calls`` after the other, without gradients."""
    return graphs.Turns([torch.inference_mode()(call) for call in calls])


@dataclass(frozen=True)
class LinearModel:
    """A model of one linear layer, whose weight has the values of `exact_weight`."""

    shape: tuple[int, int]  # (N, K)
    spec: QuantSpec  # the spec of the layer
    dtype: str
    device: str = "cpu"

    def __call__(self) -> torch.nn.Module:
        N, K = self.shape
        codes, scale = exact_weight(self.shape, self.spec.weight_only, self.device)
        w = quantlib.dequantize(codes, scale, self.spec.format, block=self.spec.block(self.shape), size=K)
        layer = torch.nn.Linear(K, N, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(w.to(getattr(torch, self.dtype)), requires_grad=False)
        return torch.nn.Sequential(layer).eval()

    def takes(self, inputs: Tensors) -> Tensors:
        """Return the arguments of the model among the inputs of a case."""
        return inputs[:1]
