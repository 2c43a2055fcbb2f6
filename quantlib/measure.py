"""Check that a weight is finite, and measure the error of its codes: a slab of rows at a time, which fits a cache."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from quantlib import formats, ops
from quantlib.backends import compiled
from quantlib.backends.packing import wide_zero_points
from quantlib.nn.experts import QuantExperts
from quantlib.nn.functional import SOURCES, Weight, dequantize_weight, rows_of, slabs_of
from quantlib.ops.check import dtype_name
from quantlib.report import LayerReport
from quantlib.spec import QuantSpec

OnNonfinite = Literal["raise", "propagate"]


@dataclass
class Sums:
    """Sums of squares of a weight and of the error of its codes, in float64 over slabs that are summed in float32."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, x: Tensor, weight: Weight, spec: QuantSpec) -> None:
        """Count a slab x [M, K] of any float dtype with its codes, whose blocks begin with it."""
        found = squared_error(x, weight, spec)
        if found is not None and 1e-20 < found[0] < 1e30 and math.isfinite(found[1]):
            self.signal += found[0]
            self.noise += found[1]
            return
        y = dequantize_weight(weight, spec, x.shape[1], torch.float32)
        x = x.float()
        self.signal += squares(x)
        self.noise += squares(y.sub_(x))

    @property
    def snr_db(self) -> float:
        """10 log10(signal / noise): infinite without noise, NaN where a value is not finite."""
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if 0 < ratio < math.inf else math.nan


def squared_error(x: Tensor, weight: Weight, spec: QuantSpec) -> tuple[float, float] | None:
    """The sums of squares of x [M, K] and of its error, by one pass in C++; None where that does not serve."""
    codes, scale, zero_point = weight
    scale = None if scale is None else scale.float()
    if zero_point is not None and scale is not None:
        zero_point = wide_zero_points(zero_point, spec.row, scale.shape[1])
    kernel = _kernel() if scale is not None and x.device.type == "cpu" and x.dtype in SOURCES else None
    given = [t for t in (x, codes, scale, zero_point) if t is not None]
    if kernel is None or not all(type(t.detach()) is Tensor and t.is_contiguous() for t in given) or not x.numel():
        return None
    sums = torch.empty(2, x.shape[0], dtype=torch.float64, device="cpu")
    pointers = [None if t is None else t.data_ptr() for t in (x, codes, scale, zero_point, sums[0], sums[1])]
    x_type, format = (TYPES.index(name) for name in (dtype_name(x.dtype), spec.format))
    block = spec.block(x.shape)
    failed = kernel(pointers[0], x_type, pointers[1], format, *pointers[2:4], *x.shape, *block, *pointers[4:])
    signal, noise = sums.sum(1).tolist()
    return None if failed else (signal, noise)


TYPES = list(formats.FORMATS)  # as `enum class Type` of csrc/formats.h numbers them


@functools.cache
def _kernel() -> Any:
    """``quantlib_squared_error`` of csrc/cpu/backend.cpp; None without the library. It lets other threads run."""
    path = compiled.path_of("cpu")
    if path is None:
        return None
    function = ctypes.CDLL(str(path)).quantlib_squared_error
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [
        pointer,
        ctypes.c_int,
        pointer,
        ctypes.c_int,
        pointer,
        pointer,
        *[number] * 4,
        pointer,
        pointer,
    ]
    return function


def squares(x: Tensor) -> float:
    """The sum of squares of x, float32."""
    x = x.reshape(-1)
    total = float(torch.dot(x, x))
    if 1e-20 < total < 1e30 or not x.numel():
        return total
    largest = float(x.abs().amax())  # squares may leave the range of float32: divide by the largest first
    if largest == 0 or not math.isfinite(largest):
        return largest * largest
    x = x / largest
    return float(torch.dot(x, x)) * largest * largest


def describe(name: str, x: Tensor, weight: Weight, spec: QuantSpec) -> LayerReport:
    """Report on x [N, ...] and its codes."""
    ratio = math.nan
    if not x.is_meta:
        matrix, sums = x.detach().flatten(1), Sums()
        br = spec.block(matrix.shape)[0] if spec.scaled else 1
        for rows in slabs_of(matrix, br):
            sums.add(matrix[rows], rows_of(weight, rows, br), spec)
        ratio = sums.snr_db
    return LayerReport.of(name, x, str(spec), weight, ratio)


def describe_experts(name: str, key: str, x: Tensor, experts: QuantExperts) -> LayerReport:
    """Report on x, the weight ``key`` of the experts called ``name``, and its codes."""
    x, sums, stack = x.detach(), Sums(), experts.stacks[key]
    for e in range(0 if x.is_meta else stack.E):
        matrix = stack.matrix(x, e)
        block = experts.spec.block(matrix.shape)
        for rows in slabs_of(matrix, block[0]):
            sums.add(matrix[rows], rows_of(experts.matrix(key, e).weight, rows, block[0]), experts.spec)
    ratio = math.nan if x.is_meta else sums.snr_db
    return LayerReport.of(f"{name}.{key}", x, str(experts.spec), experts.parts(key), ratio)


def check_weight(name: str, x: Tensor, spec: QuantSpec, on_nonfinite: OnNonfinite) -> None:
    """Check that x [N, K] has a dtype to quantize from and is finite, and its cast too if ``spec`` has no scale."""
    if x.dtype not in SOURCES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {str(x.dtype).removeprefix('torch.')}")
    if on_nonfinite == "propagate" or x.is_meta or x.numel() == 0:
        return
    x = x.detach()
    check_finite(name, ((rows.start, x[rows]) for rows in slabs_of(x)), spec)


def check_finite(name: str, parts: Iterable[tuple[int, Tensor]], spec: QuantSpec) -> None:
    """Raise ValueError with the first row that is not finite of a weight given as (first row, slab)."""
    first, count = None, 0
    for start, x in parts:
        y = x if spec.scaled else ops.cast(x, spec.format)
        if math.isfinite(float(y.sum(dtype=torch.float32))):  # an infinity or a NaN leaves no sum finite
            continue
        finite = y.isfinite()
        rows = (~finite.all(-1)).nonzero().flatten()
        count += len(rows)
        if first is None and len(rows):
            row = int(rows[0])
            first = start + row, float(x[row][~finite[row]][0])
    if first is None:
        return
    row, value = first
    more = f" and in {count - 1} more rows" if count > 1 else ""
    if math.isfinite(value):
        expected = f"at most {spec.row.max:g} in magnitude, or {spec.format} have a scale ({spec.format}:row)"
    else:
        expected = 'finite, or on_nonfinite "propagate"'
    raise ValueError(f"{name} must be {expected}, got {value:g} in row {row}{more}")
