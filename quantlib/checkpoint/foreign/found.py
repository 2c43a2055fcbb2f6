"""A foreign weight: its description before its values are read, and the reading of its values, some rows at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from quantlib import formats, ops
from quantlib.backends.packing import kept_zero_points, wide_zero_points
from quantlib.checkpoint.files import NAMES, Reader, Slot
from quantlib.checkpoint.stored import Stored
from quantlib.formats import SCALE_MIN
from quantlib.nn.functional import Weight, dequantize_weight
from quantlib.spec import QuantSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """A weight [N, K] that something else quantized.

    Attributes
    ----------
    name : str
        The name of the float weight in the model.
    method : str
        Who quantized it, and what is special.
    shape : (N, K)
    dtype : torch.dtype
        The dtype that its own library decodes it to.
    parts : tuple of str
        The tensors of the files that make it up.
    spec : QuantSpec, optional
        The spec that holds its codes and scales as they are; None if there is none.
    codes : callable (rows) -> Weight, optional
        Codes of some rows, with their scales, where there is a ``spec``. Rows begin and end where a block does.
    values : callable (rows) -> Tensor [R, K] of ``dtype``, optional
        These rows as its own library decodes them, where there is no ``spec``.
    why : str
        The part that cannot be held exactly; empty if there is none.
    forget : callable
        Lets go of what was read of it.
    """

    name: str
    method: str
    shape: tuple[int, int]
    dtype: torch.dtype
    parts: tuple[str, ...]
    spec: QuantSpec | None = None
    codes: Callable[[slice], Weight] | None = None
    values: Callable[[slice], Tensor] | None = None
    why: str = ""
    forget: Callable[[], None] = lambda: None
    float_shape: tuple[int, ...] = ()  # of the float weight, where it is no matrix
    experts: Experts | None = None  # its codes, where it is no matrix [N, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "float_shape", self.float_shape or self.shape)

    def weight(self, rows: slice) -> Weight:
        """Codes and scales of some rows that give the same values by quantlib's rules; no scale is within +-2^-100.

        Raises
        ------
        ValueError
            For a scale that is not finite.
        """
        assert self.codes is not None
        assert self.spec is not None
        weight = self.codes(rows)
        if weight.scale is None or not weight.scale.numel():
            return weight
        if self.method == "quantlib":  # NaN may have been carried through
            return weight
        least, most = (float(value) for value in weight.scale.abs().aminmax())
        if not most < math.inf:
            raise ValueError(f"{self.name} must have scales that are finite, got {most:g}")
        return weight if least > SCALE_MIN else without_zero_scales(weight, self.spec, self.shape[1])

    def decoded(self, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """Values of some rows, of ``dtype`` (that of its own library by default)."""
        if self.codes is not None and self.spec is not None:
            return dequantize_weight(self.weight(rows), self.spec, self.shape[1], dtype or self.dtype)
        assert self.values is not None
        y = self.values(rows)
        return y if dtype is None else y.to(dtype)

    def stored(self, spec: QuantSpec) -> Stored:
        """The weight in a file of quantlib, as codes of ``spec``."""
        return Stored(str(spec), self.float_shape, self.experts.layout if self.experts is not None else "")


@dataclass(frozen=True)
class Experts:
    """The codes of E matrices [N, K], which a float weight of another shape is made of.

    Attributes
    ----------
    spec : QuantSpec
    layout : str
        How the float weight lies: that of `Stored`.
    shape : tuple of int
        That of the float weight.
    codes : callable (e, rows) -> Weight
        Some rows of matrix ``e``, which begin and end where a block does.
    """

    spec: QuantSpec
    layout: str
    shape: tuple[int, ...]
    codes: Callable[[int, slice], Weight]

    @property
    def stored(self) -> Stored:
        return Stored(str(self.spec), self.shape, self.layout)

    @property
    def kind(self) -> str:
        return "experts" if self.stored.is_experts else "Conv1D"

    def rows(self, e: int, rows: slice, dtype: torch.dtype) -> Tensor:
        """The values of some rows of matrix ``e``."""
        return dequantize_weight(self.codes(e, rows), self.spec, self.stored.matrix[1], dtype)

    def found(self, name: str, method: str, dtype: torch.dtype, parts: tuple[str, ...]) -> Found:
        """The weight, read as the values that the codes stand for, as the float weight lies; its rows are experts."""
        stored = self.stored
        shape = self.shape[0], math.prod(self.shape[1:])
        whole: dict[str, Tensor] = {}

        def values(rows: slice) -> Tensor:
            N = stored.matrix[0]
            if stored.layout in ("enk", "ekn"):
                part = replace(stored, shape=(rows.stop - rows.start, *self.shape[1:]))
                matrices = [self.rows(e, slice(0, N), dtype) for e in range(rows.start, rows.stop)]
                return part.stack.join(matrices).flatten(1)
            if name not in whole:
                matrices = [self.rows(e, slice(0, N), dtype) for e in range(stored.stack.E)]
                whole[name] = stored.stack.join(matrices).view(shape)
            return whole[name][rows]

        why = f"codes of {self.kind} are kept by quantlib's own files alone"
        return Found(name, method, shape, dtype, parts, None, None, values, why, whole.clear, self.shape, self)


class Tensors:
    """Every tensor of a model but those ``hidden`` by its name, whatever file it is in, and ``config.json``."""

    def __init__(self, readers: list[Reader], config: Mapping[str, Any], hidden: Container[str] = ()) -> None:
        self.config = config
        self.readers = readers
        self.owner = {name: reader for reader in readers for name in reader.slots if name not in hidden}

    def __contains__(self, name: str) -> bool:
        return name in self.owner

    def __iter__(self) -> Iterator[str]:
        return iter(self.owner)

    def slot(self, name: str) -> Slot:
        """Dtype and shape."""
        return self._reader(name).slots[name]

    def read(self, name: str) -> Tensor:
        return self._reader(name).read(name)

    def rows(self, name: str, rows: slice) -> Tensor:
        return self._reader(name).rows(name, rows)

    def part(self, name: str, row: int, shape: tuple[int, ...]) -> Tensor:
        return self._reader(name).part(name, row, shape)

    def _reader(self, name: str) -> Reader:
        if name not in self.owner:
            raise ValueError(f"{name} must be there, got no such tensor")
        return self.owner[name]

    def named(self, last: str) -> Iterator[str]:
        """Yield the text before ``.last`` in each name that ends so; empty for a tensor of that name alone."""
        for name in self.owner:
            if name == last or name.endswith(f".{last}"):
                yield name.removesuffix(last)

    def get(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> Slot:
        """The slot of a tensor that must be there, of one of ``dtypes`` and of ``shape``; None is any size.

        Raises
        ------
        ValueError
            Where it is not.
        """
        got = self.owner[name].slots[name] if name in self.owner else None
        fits = (
            got is not None
            and got.dtype in dtypes
            and len(got.shape) == len(shape)
            and all(want in (None, have) for want, have in zip(shape, got.shape, strict=True))
        )
        if got is None or not fits:
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            words = "nothing" if got is None else f"{NAMES[got.dtype]} {list(got.shape)}"
            raise ValueError(f"{name} must be {' or '.join(NAMES[d] for d in dtypes)} [{sizes}], got {words}")
        return got

    def get_float(self, name: str) -> torch.dtype:
        """The dtype of a tensor that must be a float.

        Raises
        ------
        ValueError
            For another one.
        """
        if (dtype := self.slot(name).dtype) not in FLOATS:
            raise ValueError(f"{name} must be {', '.join(NAMES[d] for d in FLOATS)}, got {NAMES[dtype]}")
        return dtype

    def quantization(self, method: str) -> Mapping[str, Any]:
        """The entry of config.json that ``method`` wrote; empty where there is none."""
        waiting: list[Mapping[str, Any]] = [self.config]
        while waiting:
            part = waiting.pop()
            for key in ("quantization_config", "compression_config"):
                entry = part.get(key)
                if isinstance(entry, dict) and entry.get("quant_method") == method:
                    return entry
            waiting += [value for value in part.values() if isinstance(value, dict)]
        return {}


class Once(Generic[T]):
    """A value that is made when it is first asked for, by one thread of those that do, and kept until `forget`."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._value: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._value:
                self._value.append(self._make())
            return self._value[0]

    def forget(self) -> None:
        with self._lock:
            self._value.clear()


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def without_zero_scales(weight: Weight, spec: QuantSpec, K: int) -> Weight:
    """The same values where a scale is 0 or nearly so: codes of 0, and a scale of 1."""
    scale = weight.scale
    assert scale is not None
    packed, zeros = spec.row.packed, scale.abs() <= SCALE_MIN
    codes = ops.unpack(weight.codes, spec.format, K) if packed else weight.codes
    rows, columns = (
        torch.arange(size, device="cpu") // block
        for size, block in zip(codes.shape, spec.block(codes.shape), strict=True)
    )
    of_zero = torch.zeros((), dtype=torch.int64, device="cpu")
    if weight.zero_point is not None:
        of_zero = wide_zero_points(weight.zero_point, spec.row, scale.shape[1])[rows][:, columns]
    values = getattr(spec.row, "values", None)
    if values:  # of a code book
        of_zero = torch.tensor(values.index(0.0), device="cpu")
    bytes_of_codes = codes.view(torch.uint8) if codes.is_floating_point() else codes
    plain = torch.where(zeros[rows][:, columns], of_zero.to(bytes_of_codes.dtype), bytes_of_codes).view(codes.dtype)
    return Weight(
        ops.pack(plain, spec.format) if packed else plain,
        torch.where(zeros, 1.0, scale).to(scale.dtype),
        weight.zero_point,
    )


def bits_of(packed: Tensor, bits: int) -> Tensor:
    """[..., 32 / bits] uint8: the codes in each int32, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device="cpu")
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8)


def as_int4(codes: Tensor) -> Tensor:
    """Two's complement codes [N, K] int8 in -8..7 as quantlib packs them, [N, ceil(K / 2)] uint8."""
    return ops.pack(codes.contiguous(), "int4")


def per(group: int, K: int) -> str:
    """Return the ``per`` of a spec whose scales each serve ``group`` weights of a row of K."""
    return "row" if group >= K else f"group:{group}"


def integer_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool, unsigned: bool = True
) -> Weight:
    """Codes [N, K] and zero points [N, G] of ``bits`` as those of int4 or int8; unsigned ones are moved to be signed.

    The code less its zero point, which is multiplied by the scale, stays the same.
    """
    half = 1 << (bits - 1) if unsigned and bits >= 4 else 0
    moved = (codes.to(torch.int16) - half).to(torch.int8)
    row = formats.FORMATS["int4" if bits <= 4 else "int8"]
    z = None if symmetric else kept_zero_points(zero_point.to(torch.int32) - half, row).contiguous()
    return Weight(as_int4(moved) if bits <= 4 else moved.contiguous(), scale.contiguous(), z)
