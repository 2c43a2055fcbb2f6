"""h = h + attention(norm(h)), then h + mlp(norm(h)): a whole layer of a Llama, reading a prompt and writing a token.

Quantized by ``quantize_`` as anybody would, in eager mode, beside the same block in floating point and quantized by
others. Two things are looked at before the time is taken:

- every linear layer of the block, at the rows of x that it gets there: on exact operands it has the reference's bytes;
- what the block makes of h is as near to the block in float64 as floating point comes: no further than `MARGIN` times
  what the float block of the same dtype, with the values of the same codes, is away from it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantlib
from quantlib.nn.functional import project
from quantlib.testing.bytes import Array

from . import graphs, peer_models
from .case import Case, Contender, Tensors
from .matmul import W4A16, W8A8, W8A16, Multiplied, exact_weight, exact_x, exact_y, itemsize, rotation
from .peer_models import QUANTLIB

HEAD = 64  # features of an attention head
PROMPT, PAST = 128, 128  # tokens that are read at once; tokens in the cache when one is written
MARGIN = 2.0


def cases(quick: bool, **common: Any) -> list[Case]:
    """Return a token and a prompt for every scheme; with ``quick``, a token of the first and a prompt of the second."""
    small = math.prod(common["shape"]) < graphs.SMALL
    hidden = 2 * HEAD if small else 4096 if common.get("device") == "cuda" else 1024 if quick else 2048
    token, prompt = ((1, 3), (4, 0)) if small else ((1, PAST), (PROMPT, 0))
    every = [(spec, tokens) for spec in (W8A16, W8A8, W4A16) for tokens in (token, prompt)]
    chosen = [(W8A16, token), (W8A8, prompt)] if quick else every
    return [
        Transformer(**{**common, "shape": (*tokens, hidden), "spec": spec, "dtype": "bfloat16"})
        for spec, tokens in chosen
    ]


class Block(nn.Module):
    """A layer without biases: h [1, T, hidden], keys and values of earlier tokens -> [1, T, hidden]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        linear = functools.partial(nn.Linear, bias=False, device="meta")
        self.norm_in, self.norm_mlp = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.q, self.k, self.v, self.o = (linear(hidden, hidden) for _ in range(4))
        inner = hidden * 11 // 4
        self.gate, self.up, self.down = linear(hidden, inner), linear(hidden, inner), linear(inner, hidden)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """cos, sin [T, HEAD] of the positions; keys, values [1, heads, past, HEAD]."""
        x = self.norm_in(h)
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        k, v = torch.cat((keys, k), 2), torch.cat((values, v), 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=h.shape[1] > 1)
        h = h + self.o(y.transpose(1, 2).flatten(2))
        x = self.norm_mlp(h)
        return h + self.down(F.silu(self.gate(x)) * self.up(x))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


@dataclass(frozen=True)
class BlockModel:
    """A `Block` whose weights have the values of `exact_weight`, a seed a layer."""

    hidden: int
    spec: quantlib.QuantSpec
    dtype: str
    device: str = "cpu"

    def __call__(self) -> nn.Module:
        block, dtype = Block(self.hidden).to(getattr(torch, self.dtype)), getattr(torch, self.dtype)
        for seed, layer in enumerate(linears(block).values()):
            shape = tuple(layer.weight.shape)
            codes, scale = exact_weight(shape, self.spec.weight_only, self.device, seed)
            w = quantlib.dequantize(codes, scale, self.spec.format, block=self.spec.block(shape), size=shape[1])
            layer.weight = nn.Parameter(w.to(dtype))
        return block.to(self.device).eval().requires_grad_(False)

    def takes(self, inputs: Tensors) -> Tensors:
        """Return the arguments of the model among the inputs of a case."""
        return inputs


def linears(block: nn.Module) -> dict[str, Any]:
    """name -> layer, in the order of `Block`."""
    return {name: layer for name, layer in block.named_children() if isinstance(layer, nn.Linear)}


@dataclass(frozen=True)
class Transformer(Multiplied):
    """``shape`` is (tokens, tokens before them, hidden)."""

    family = "transformer"

    @property
    def op(self) -> str:
        _, past, hidden = self.shape
        return f"token {hidden}" if past else f"prompt {hidden}"

    @property
    def model(self) -> BlockModel:
        return BlockModel(self.shape[2], self.spec, self.dtype, self.device)

    @property
    def weights(self) -> list[tuple[int, int]]:
        """[N, K] of the layers."""
        hidden, inner = self.shape[2], self.shape[2] * 11 // 4
        return [*((hidden, hidden),) * 4, *((inner, hidden),) * 2, (hidden, inner)]

    @property
    def flops(self) -> int:
        """FLOPs of the layers and of the attention."""
        tokens, past, hidden = self.shape
        return 2 * tokens * sum(map(math.prod, self.weights)) + 4 * tokens * (past + tokens) * hidden

    def moved(self, inputs: Tensors, outs: Tensors) -> int:
        """Bytes that a call moves: the input, the codes and their scales, the output."""
        return sum(t.nbytes for t in (*inputs, inputs[0])) + self.nbytes

    def moved_as(self, dtype: str) -> int:
        """Bytes that the float block moves: h in and out, keys, values and weights."""
        tokens, past, hidden = self.shape
        return (2 * (tokens + past) * hidden + sum(map(math.prod, self.weights))) * itemsize(dtype)

    def inputs(self) -> Tensors:
        """h, cos, sin, keys, values."""
        tokens, past, hidden = self.shape
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(1, tokens, hidden, generator=generator)
        keys, values = torch.randn(2, 1, hidden // HEAD, past, HEAD, generator=generator)
        frequencies = 10_000.0 ** -(torch.arange(0, HEAD, 2) / HEAD)
        angles = torch.outer(torch.arange(past, past + tokens), frequencies).repeat(1, 2)
        return tuple(
            t.to(self.device, getattr(torch, self.dtype)) for t in (h, angles.cos(), angles.sin(), keys, values)
        )

    def outs(self, *inputs: Tensor) -> Tensors:
        """None: a module allocates."""
        return ()

    def exact(self, K: int) -> Tensor:
        """x [tokens, K] of the layers that are looked at one by one."""
        return exact_x((self.shape[0], K), self.dynamic).to(self.device, getattr(torch, self.dtype))

    def expected(self, rows: slice, *inputs: Tensor) -> Iterator[tuple[slice, Array]]:
        for seed, shape in enumerate(self.weights):
            codes, scale = exact_weight(shape, self.spec.weight_only, self.device, seed)
            yield rows, exact_y(self.exact(shape[1])[rows], codes, scale, self.spec)

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return sum(map(self.spec.weight_only.nbytes, self.weights))

    def contenders(self) -> list[Contender]:
        weights = sum(map(math.prod, self.weights))
        others = [
            *peer_models.floats(self.model, ("bfloat16", "float32"), weights, self.moved_as),
            *(q.contender(self.model, self.nbytes) for q in peer_models.of(self.model)),
        ]
        if self.spec == W8A16:
            compiled = peer_models.Quantizer("torch.compile bfloat16", peer_models.as_it_is, compiled=True)
            others.append(compiled.contender(self.model, 2 * weights, self.moved_as("bfloat16")))
        ours = functools.partial(QUANTLIB.bind, self.model, self.nbytes)
        return [
            *(dataclasses.replace(c, read=self.layers) for c in self.ours(ours)),
            *(dataclasses.replace(c, read=lambda _: ()) for c in others),
        ]

    def layers(self, y: Tensor) -> Tensors:
        """Each layer's results on exact operands, if what the block gave is near enough."""
        block = peer_models.copies(QUANTLIB, self.model, rotation(self.nbytes, self.device))[0]
        check_near(y, block, self.inputs())
        with torch.inference_mode():
            return tuple(layer(self.exact(layer.in_features)) for layer in linears(block).values())


def check_near(y: Tensor, block: nn.Module, inputs: Tensors) -> None:
    """``y`` is what ``block`` makes of ``inputs``, as far as their dtype goes, or AssertionError."""
    exact = copy.deepcopy(block).double()(*(t.double() for t in inputs))
    floats = copy.deepcopy(block)
    quantlib.dequantize_(floats)
    for name, layer in linears(floats).items():
        activation = block.get_submodule(name).spec.activation
        if activation is not None:
            layer.register_forward_pre_hook(lambda _, x, a=activation: project(x[0], a))
    away, allowed = (float((t.double() - exact).norm()) for t in (y, floats(*inputs)))
    if not away <= MARGIN * allowed:
        raise AssertionError(f"the block is {away:.3g} away from float64, in floating point it is {allowed:.3g}")
