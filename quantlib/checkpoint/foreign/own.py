"""quantlib's own weights, as `Found` has them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantlib.checkpoint.files import Reader
from quantlib.checkpoint.foreign.found import Experts, Found, Tensors
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
    """Experts, or a matrix [K, N]."""

    def codes(e: int, rows: slice) -> Weight:
        return stored.codes(reader, name, rows, e)

    experts = Experts(QuantSpec.parse(stored.spec), stored.layout, stored.shape, codes)
    return experts.found(name, f"{METHOD} {stored.spec}, {experts.kind}", torch.float32, parts)
