"""How a quantized weight lies in a safetensors file.

A weight ``w`` of [N, K] is stored as its codes under its own name, ``w_scale`` and, where affine, ``w_zero_point``;
the weight of a convolution as that of the matrix [out, in / groups * kernel]. The file's metadata says under
``quantlib`` what each of them is::

    {"version": 1, "weights": {"encoder.0.weight": {"spec": "int4:group:32", "shape": [384, 384]}}, "tied": {}}

Codes that need their scale have one axis more than the weight, [N, K, 1], all but two of them ones: a program that
knows nothing of the scale finds a tensor of the wrong shape and stops, where it would otherwise take the codes for
weights. A 16-bit float without a scale is a float weight like any other, and keeps its shape.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantlib.checkpoint.files import NAMES, Reader, Slot
from quantlib.nn.functional import Weight, dequantize_weight
from quantlib.nn.module import stored_shape
from quantlib.ops.check import dtype_of
from quantlib.spec import QuantSpec

VERSION = 1  # of what this module describes; every older one stays readable
KEY = "quantlib"


@dataclass(frozen=True)
class Stored:
    """A quantized weight of a file, as the metadata describes it."""

    spec: str
    shape: tuple[int, ...]  # of the float weight

    @property
    def matrix(self) -> tuple[int, int]:
        """[N, K]"""
        return self.shape[0], math.prod(self.shape[1:])

    def slots(self, name: str) -> list[Slot]:
        """Codes, scale, zero point: the tensors of the file that hold weight ``name``."""
        spec = QuantSpec.parse(self.spec)
        codes = Slot(name, dtype_of(spec.row), stored_shape(spec, self.shape))
        scale = Slot(f"{name}_scale", torch.float32, spec.scale_shape(self.matrix))
        zero_point = Slot(f"{name}_zero_point", torch.int32, scale.shape)
        return [codes, scale, zero_point][: 1 if not spec.scaled else 2 if spec.symmetric else 3]

    def values(self, reader: Reader, name: str, dtype: torch.dtype) -> Tensor:
        """What the codes stand for, of ``dtype`` and in the shape of the float weight."""
        spec = QuantSpec.parse(self.spec)
        codes, *rest = (reader.read(slot.name) for slot in self.slots(name))
        weight = Weight(codes.reshape(spec.codes_shape(self.matrix)), *rest)
        return dequantize_weight(weight, spec, self.matrix[1], dtype).view(self.shape)


@dataclass(frozen=True)
class Contents:
    """The entry under ``quantlib`` in the metadata of a file."""

    weights: dict[str, Stored] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # a name that is not in the file -> the tensor it shares

    @classmethod
    def of(cls, reader: Reader) -> Contents:
        """What the file says and holds; nothing quantized where it has no such entry.

        Raises
        ------
        ValueError
            For a newer version, and for tensors that are not as the entry says.
        """
        if KEY not in reader.metadata:
            return cls()
        try:
            entry = json.loads(reader.metadata[KEY])
            version = int(entry["version"])
            contents = cls.parse(entry) if version <= VERSION else cls()
            expected = [slot for name, stored in contents.weights.items() for slot in stored.slots(name)]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{reader.path}: metadata {KEY} must describe its weights, got {error!r}") from None
        if version > VERSION:
            raise ValueError(f"{reader.path} must be of version {VERSION} or older, got {version}: update quantlib")
        for slot in expected:
            if (got := reader.slots.get(slot.name)) != slot:
                raise ValueError(f"{reader.path}: {slot.name} must be {words(slot)}, got {words(got)}")
        return contents

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> Contents:
        weights = {n: Stored(str(w["spec"]), tuple(map(int, w["shape"]))) for n, w in entry["weights"].items()}
        return cls(weights, {str(alias): str(name) for alias, name in entry["tied"].items()})

    def metadata(self) -> dict[str, str]:
        """The entry as it is written; none where nothing is quantized."""
        entry = {"version": VERSION, "weights": {n: asdict(w) for n, w in self.weights.items()}, "tied": self.tied}
        return {KEY: json.dumps(entry, separators=(",", ":"))} if self.weights or self.tied else {}


def as_stored(weight: Weight) -> list[Tensor]:
    """The tensors of `Stored.slots`: codes [N, K] that need a scale become [N, K, 1]."""
    codes = weight.codes if weight.scale is None else weight.codes.unsqueeze(-1)
    return [t for t in (codes, weight.scale, weight.zero_point) if t is not None]


def words(slot: Any) -> str:
    """Dtype and shape, for a message."""
    return "nothing" if slot is None else f"{NAMES[slot.dtype]} {list(slot.shape)}"
