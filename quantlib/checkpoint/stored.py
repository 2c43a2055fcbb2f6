"""The layout of a quantized weight in a safetensors file.

A weight ``w`` of [N, K] is stored as its codes under its own name, ``w_scale`` and, where affine, ``w_zero_point``;
the weight of a convolution as that of the matrix [out, in / groups * kernel]. The file's metadata says under
``quantlib`` what each of them is::

    {"version": 1, "weights": {"encoder.0.weight": {"spec": "int4:group:32", "shape": [384, 384]}}, "tied": {}}

A weight that is no such matrix has a ``"layout"`` too, and makes the version 2: ``"kn"`` lies [K, N], as ``Conv1D`` of
transformers does; ``"enk"`` is E matrices [N, K] of the experts of a layer, ``"ekn"`` E matrices [K, N], and
``"(en)k/E"`` and ``"(ek)n/E"`` are the same with two axes as one. However the float weight lies, its codes are
[N, K, 1], or [E, N, K, 1] with a scale [E, ...] of each expert.

Zero points are kept as codes are, two of int4 to a byte; a file that has some is of version 3. Versions 1 and 2 kept
them as int32.

Codes that need their scale have one axis more than the weight, [N, K, 1], all but two of them ones: a program that
knows nothing of the scale finds a tensor of the wrong shape and stops, where it would otherwise take the codes for
weights. A 16-bit float without a scale is a float weight like any other, and keeps its shape.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from quantlib.backends.packing import kept_zero_points
from quantlib.checkpoint.files import NAMES, Reader, Slot, checked_shape, some_words
from quantlib.nn.experts import Stack
from quantlib.nn.functional import Weight, dequantize_weight, scale_dtype
from quantlib.ops.check import dtype_of
from quantlib.spec import QuantSpec, stored_shape

VERSION = 3  # of what this module describes; every older one stays readable
KEY = "quantlib"
LAYOUT = re.compile(r"|kn|enk|ekn|(\(en\)k|\(ek\)n)/[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Stored:
    """A quantized weight of a file, as the metadata describes it."""

    spec: str
    shape: tuple[int, ...]  # of the float weight
    layout: str = ""  # how the float weight lies where it is no matrix [N, ...]
    wide_zero_points: bool = field(default=False, compare=False)  # int32, as versions 1 and 2 have them

    @property
    def stack(self) -> Stack:
        """The matrices [N, K]: one, or one for each expert."""
        way, _, count = self.layout.partition("/")
        if not way:
            return Stack(1, self.shape[0], math.prod(self.shape[1:]), "(en)k")
        if way == "kn":
            return Stack.of_shape(self.shape, "(ek)n", 1)
        return Stack.of_shape(self.shape, way, int(count) if count else self.shape[0])

    @property
    def is_experts(self) -> bool:
        return self.layout not in ("", "kn")

    @property
    def matrix(self) -> tuple[int, int]:
        """[N, K], of each expert."""
        return self.stack.matrix_shape

    @property
    def scaled(self) -> bool:
        """True if the codes need a scale."""
        return QuantSpec.parse(self.spec).scaled

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of the codes as a module has them: [N, K], or [E, N, K]."""
        experts = (self.stack.E,) if self.is_experts else ()
        return (*experts, *QuantSpec.parse(self.spec).codes_shape(self.matrix))

    def slots(self, name: str) -> list[Slot]:
        """Codes, scale, zero point: the tensors of the file that hold weight ``name``."""
        spec, experts = QuantSpec.parse(self.spec), (self.stack.E,) if self.is_experts else ()
        shape = stored_shape(spec, self.shape) if not self.layout else self.stack.stored_shape(spec, self.is_experts)
        codes = Slot(name, dtype_of(spec.row), shape)
        scale = Slot(f"{name}_scale", scale_dtype(spec), (*experts, *spec.scale_shape(self.matrix)))
        zero_point = Slot(f"{name}_zero_point", torch.int32, scale.shape)
        if not self.wide_zero_points:
            zero_point = replace(zero_point, dtype=dtype_of(spec.row), shape=spec.codes_shape(scale.shape))
        return [codes, scale, zero_point][: 1 if not spec.scaled else 2 if spec.symmetric else 3]

    def values(self, reader: Reader, name: str, dtype: torch.dtype) -> Tensor:
        """Return the decoded weight, of ``dtype`` and in the shape of the float weight."""
        E, N, *_ = self.stack
        matrices = [self.rows(reader, name, slice(0, N), dtype, e) for e in range(E)]
        return self.stack.join(matrices).view(self.shape)

    def rows(self, reader: Reader, name: str, rows: slice, dtype: torch.dtype, e: int = 0) -> Tensor:
        """The values of some rows of the matrix [N, K] of expert ``e``; rows that share a scale come together."""
        spec = QuantSpec.parse(self.spec)
        return dequantize_weight(self.codes(reader, name, rows, e), spec, self.matrix[1], dtype)

    def codes(self, reader: Reader, name: str, rows: slice, e: int = 0) -> Weight:
        """Codes of some rows of the matrix [N, K] of expert ``e`` with their scales; blocks of rows are whole."""
        spec = QuantSpec.parse(self.spec)
        (N, K), br = self.matrix, spec.block(self.matrix)[0]
        blocks = slice(rows.start // br, -(-rows.stop // br))
        of_codes, *others = self.slots(name)
        codes = reader.part(of_codes.name, e * N + rows.start, spec.codes_shape((rows.stop - rows.start, K)))
        first = e * spec.scale_shape((N, K))[0] + blocks.start
        parts = [reader.part(s.name, first, (blocks.stop - blocks.start, s.shape[-1])) for s in others]
        if len(parts) > 1 and self.wide_zero_points:
            parts[1] = kept_zero_points(parts[1], spec.row)
        return Weight(codes, *parts)


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
            zero_point = reader.slots.get(f"{name}_zero_point")
            if zero_point is not None and zero_point.dtype == torch.int32:
                stored = contents.weights[name] = replace(stored, wide_zero_points=True)  # noqa: PLW2901
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
        stored = Stored(weight["spec"], shape, weight.get("layout", ""))
        try:
            if not isinstance(stored.layout, str) or not LAYOUT.fullmatch(stored.layout):
                raise ValueError("a layout that quantlib does not know")
            if stored.layout and stored.stack.shape != shape:
                raise ValueError("a shape that this layout does not have")
            QuantSpec.parse(stored.spec).scale_shape(stored.matrix)
        except (ValueError, IndexError, ZeroDivisionError) as error:
            got = f"{some_words(weight)} for {name}: {some_words(error)}"
            raise ValueError(f"{expected} by spec and shape, got {got}") from None
        return stored

    def metadata(self) -> dict[str, str]:
        """The entry as it is written, of the oldest version that can say it; none where nothing is quantized."""
        weights = {
            name: {"spec": stored.spec, "shape": stored.shape} | ({"layout": stored.layout} if stored.layout else {})
            for name, stored in self.weights.items()
        }
        version = 2 if any(stored.layout for stored in self.weights.values()) else 1
        version = VERSION if any(not QuantSpec.parse(s.spec).symmetric for s in self.weights.values()) else version
        entry = {"version": version, "weights": weights, "tied": self.tied}
        return {KEY: json.dumps(entry, separators=(",", ":"))} if self.weights or self.tied else {}


def as_stored(weight: Weight) -> list[Tensor]:
    """The tensors of `Stored.slots`: codes [N, K] that need a scale become [N, K, 1]."""
    codes = weight.codes if weight.scale is None else weight.codes.unsqueeze(-1)
    return [t for t in (codes, weight.scale, weight.zero_point) if t is not None]


def words(slot: Any) -> str:
    """Dtype and shape, for a message."""
    return "nothing" if slot is None else f"{NAMES[slot.dtype]} {list(slot.shape)}"
