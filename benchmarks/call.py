"""The overhead of a call: 16 elements, the result allocated, beside torch.empty_like."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import quantlib
from quantlib import backends, reference
from quantlib.testing.bytes import Array, bits

from .case import LIMIT, OURS, Call, Case, Contender, Tensors, normal, numbers

OPS = {
    "cast": "float32 -> bfloat16",
    "compute_scale": "float32 -> int8",
    "quantize": "float32 -> int8",
    "quantize_dynamic": "float32 -> int8",
    "dequantize": "int8 -> float32",
}
BLOCK = (1, 16)


def cases(quick: bool, **common: Any) -> list[Case]:
    return [OneCall(**{**common, "shape": (16,)}, called=op) for op in OPS]


@dataclass(frozen=True)
class OneCall(Case):
    called: str = "cast"

    family = "call"
    streams = False
    calls = 200

    @property
    def op(self) -> str:
        return self.called

    @property
    def conversion(self) -> str:
        return OPS[self.called]

    def inputs(self) -> Tensors:
        """The tensors that the op takes, in its order."""
        x, scale = normal(self.shape, "float32", self.device), torch.full((1, 1), 2.0**-5, device=self.device)
        if self.called == "dequantize":
            return quantlib.quantize(x, scale, "int8", block=BLOCK), scale
        return (x, scale) if self.called == "quantize" else (x,)

    def outs(self, *inputs: Tensor) -> Tensors:
        """None: the op allocates."""
        return ()

    def expected(self, rows: slice, *inputs: Tensor) -> Iterator[tuple[slice, Array]]:
        meaning = getattr(reference, self.called)
        first = bits(inputs[0]).view(np.int8) if self.called == "dequantize" else numbers(inputs[0])
        found = meaning(first, *map(numbers, inputs[1:]), *self.words, **self.options)
        yield from ((slice(None), result) for result in (found if isinstance(found, tuple) else (found,)))

    @property
    def words(self) -> tuple[str, ...]:
        return ("bfloat16",) if self.called == "cast" else ("int8",)

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.called == "cast" else {"block": BLOCK}

    def contenders(self) -> list[Contender]:
        def empty(inputs: Tensors, outs: Tensors) -> Call:
            return functools.partial(torch.empty_like, inputs[0])

        def function(inputs: Tensors, outs: Tensors) -> Call:
            return functools.partial(getattr(quantlib, self.called), *inputs, *self.words, **self.options)

        def raw(inputs: Tensors, outs: Tensors) -> Call:
            last = (False,) if self.called == "cast" else (BLOCK,)
            return functools.partial(getattr(torch.ops.quantlib, self.called), *inputs, *self.words, *last)

        name = f"torch.ops.quantlib {backends.serving(self.device)}"
        return [
            Contender("torch.empty_like", empty, LIMIT, read=lambda _: ()),
            *self.ours(function),
            Contender(name, raw, OURS, note="without the public function"),
        ]
