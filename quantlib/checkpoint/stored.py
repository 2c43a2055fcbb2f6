"""The layout of a quantized weight in a safetensors file.

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

from quantlib.checkpoint.files import NAMES, Reader, Slot, checked_shape, some_words
from quantlib.nn.functional import Weight, dequantize_weight, scale_dtype
from quantlib.ops.check import dtype_of
from quantlib.spec import QuantSpec, stored_shape

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

    @property
    def scaled(self) -> bool:
        """True if the codes need a scale."""
        return QuantSpec.parse(self.spec).scaled

    def slots(self, name: str) -> list[Slot]:
        """Codes, scale, zero point: the tensors of the file that hold weight ``name``."""
        spec = QuantSpec.parse(self.spec)
        codes = Slot(name, dtype_of(spec.row), stored_shape(spec, self.shape))
        scale = Slot(f"{name}_scale", scale_dtype(spec), spec.scale_shape(self.matrix))
        zero_point = Slot(f"{name}_zero_point", torch.int32, scale.shape)
        return [codes, scale, zero_point][: 1 if not spec.scaled else 2 if spec.symmetric else 3]

    def values(self, reader: Reader, name: str, dtype: torch.dtype) -> Tensor:
        """Return the decoded weight, of ``dtype`` and in the shape of the float weight."""
        return self.rows(reader, name, slice(0, self.shape[0]), dtype).view(self.shape)

    def rows(self, reader: Reader, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """The values of some rows of the matrix [N, K]; rows that share a scale come together."""
        spec = QuantSpec.parse(self.spec)
        return dequantize_weight(self.codes(reader, name, rows), spec, self.matrix[1], dtype)

    def codes(self, reader: Reader, name: str, rows: slice) -> Weight:
        """Codes of some rows of the matrix [N, K] with their scales; rows that share a scale come together."""
        spec = QuantSpec.parse(self.spec)
        block = spec.block(self.matrix)
        blocks = slice(rows.start // block[0], -(-rows.stop // block[0]))
        of_codes, *others = self.slots(name)
        codes = reader.rows(of_codes.name, rows)
        codes = codes.reshape(spec.codes_shape((len(codes), self.matrix[1])))
        return Weight(codes, *(reader.rows(slot.name, blocks) for slot in others))


@dataclass(frozen=True)
class Contents:
    """The entry under ``quantlib`` in the metadata of a file."""

    weights: dict[str, Stored] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # a name that is not in the file -> the tensor it shares

    @classmethod
    def of(cls, reader: Reader) -> Contents:
        """Read the contents of a file; nothing is quantized if it has no such entry.

        Raises
        ------
        ValueError
            For a newer version, and for tensors that are not as the entry says.
        """
        if KEY not in reader.metadata:
            return cls()
        where = f"{reader.path}: metadata {KEY}"
        try:
            entry = json.loads(reader.metadata[KEY])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} must describe its weights, got {some_words(error)}") from None
        version = entry.get("version") if isinstance(entry, dict) else None
        if type(version) is int and version > VERSION:
            raise ValueError(f"{reader.path} must be of version {VERSION} or older, got {version}: update quantlib")
        contents = cls.parse(entry, where)
        for name, stored in contents.weights.items():
            for slot in stored.slots(name):
                if (got := reader.slots.get(slot.name)) != slot:
                    raise ValueError(f"{reader.path}: {slot.name} must be {words(slot)}, got {words(got)}")
        return contents

    @classmethod
    def parse(cls, entry: Any, where: str) -> Contents:
        """Parse an entry; ``where`` names its source in errors."""
        expected = f"{where} must describe its weights"
        if not isinstance(entry, dict) or type(entry.get("version")) is not int:
            raise ValueError(f"{expected} with a version, got {some_words(entry)}")
        weights, tied = entry.get("weights"), entry.get("tied")
        if not isinstance(weights, dict) or not isinstance(tied, dict):
            raise ValueError(f"{expected} as weights and tied, got {some_words(entry)}")
        if not all(isinstance(name, str) for name in tied.values()):
            raise ValueError(f"{expected}, got names {some_words(tied)} that are tied")
        return cls({name: cls._weight(expected, name, weight) for name, weight in weights.items()}, tied)

    @staticmethod
    def _weight(expected: str, name: str, weight: Any) -> Stored:
        if not isinstance(weight, dict) or not isinstance(weight.get("spec"), str) or "shape" not in weight:
            raise ValueError(f"{expected} by spec and shape, got {some_words(weight)} for {name}")
        shape = checked_shape(f"{expected}: {name}", weight["shape"])
        try:
            spec = QuantSpec.parse(weight["spec"])
            spec.scale_shape((shape[0], math.prod(shape[1:])))
        except (ValueError, IndexError) as error:
            got = f"{some_words(weight)} for {name}: {some_words(error)}"
            raise ValueError(f"{expected} by spec and shape, got {got}") from None
        return Stored(weight["spec"], shape)

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
