"""quantlib's own weights, as `Found` has them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quantlib.checkpoint.files import Reader
from quantlib.checkpoint.foreign.found import Found, Tensors
from quantlib.checkpoint.stored import Contents, Stored
from quantlib.nn.functional import Weight
from quantlib.spec import QuantSpec

METHOD = "quantlib"


def find(tensors: Tensors) -> Iterator[Found]:
    for reader in tensors.readers:
        for name, stored in Contents.of(reader).weights.items():
            yield weight_of(reader, name, stored)


def weight_of(reader: Reader, name: str, stored: Stored) -> Found:
    parts = tuple(slot.name for slot in stored.slots(name))
    if stored.layout:
        return turned(reader, name, stored, parts)

    def codes(rows: slice) -> Weight:
        return stored.codes(reader, name, rows)

    spec = QuantSpec.parse(stored.spec)
    return Found(name, METHOD, stored.matrix, torch.float32, parts, spec, codes, float_shape=stored.shape)


def turned(reader: Reader, name: str, stored: Stored, parts: tuple[str, ...]) -> Found:
    """Experts, or a matrix [K, N]: read as the values that the codes stand for, as the float weight lies."""
    kind = "experts" if stored.is_experts else "Conv1D"
    shape = stored.shape[0], math.prod(stored.shape[1:])
    whole: dict[str, Tensor] = {}

    def values(rows: slice) -> Tensor:
        if stored.layout in ("enk", "ekn"):  # rows are experts
            of_rows = replace(stored, shape=(rows.stop - rows.start, *stored.shape[1:]))
            N = stored.matrix[0]
            matrices = [stored.rows(reader, name, slice(0, N), torch.float32, e) for e in range(rows.start, rows.stop)]
            return of_rows.stack.join(matrices).flatten(1)
        if name not in whole:
            whole[name] = stored.values(reader, name, torch.float32)
        return whole[name][rows]

    why = f"codes of {kind} are kept by quantlib's own files alone"
    method = f"{METHOD} {stored.spec}, {kind}"
    return Found(name, method, shape, torch.float32, parts, None, None, values, why, whole.clear, stored.shape)
