"""The distance of codes from a weight: the sums of squares of a report, by one pass in C++ and by torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quantlib import measure
from quantlib.backends import compiled
from quantlib.measure import Sums, squared_error
from quantlib.nn import functional
from quantlib.nn.functional import Weight, dequantize_weight, quantize_weight, rows_of, slabs_of
from quantlib.spec import QuantSpec

SPECS = (
    *("int8:row", "uint8:row:affine", "int8:tensor", "int8:tile:16", "int8:group:10", "int4:row", "int4:group:32"),
    *("int4:group:32:affine", "float8_e4m3fn:row", "float8_e5m2:tile:16", "float4_e2m1fn:group:16", "float16:row"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1), (3, 5), (37, 1), (5, 1001), (64, 2048), (33, 1030))

native = pytest.mark.skipif(compiled.load("cpu") is not None, reason=f"no C++ kernels: {compiled.load('cpu')}")


def exact(x: Tensor, weight: Weight, spec: QuantSpec) -> tuple[float, float]:
    y = dequantize_weight(weight, spec, x.shape[1], torch.float32).double()
    return float(x.double().square().sum()), float((x.double() - y).square().sum())


def made(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(dtype)


@native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_one_pass_finds_the_sums(spec: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    parsed, x = QuantSpec.parse(spec), made(shape, dtype)
    weight = quantize_weight(x, parsed)
    found = squared_error(x, weight, parsed)
    assert found is not None
    assert found == pytest.approx(exact(x, weight, parsed), rel=1e-5, abs=1e-30)


@native
@pytest.mark.parametrize("spec", SPECS)
def test_slabs_add_up(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "SLAB", 3000)
    parsed, x, sums = QuantSpec.parse(spec), made((70, 130)), Sums()
    weight, block = quantize_weight(x, parsed), parsed.block(x.shape)
    slabs = list(slabs_of(x, block[0]))
    assert len(slabs) > 1 or block[0] == 70
    for rows in slabs:
        sums.add(x[rows], rows_of(weight, rows, block[0]), parsed)
    assert (sums.signal, sums.noise) == pytest.approx(exact(x, weight, parsed), rel=1e-5)


@pytest.mark.parametrize("factor", [1e-26, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("compiled_kernel", [False, True])
def test_squares_that_leave_the_range_of_float32(
    compiled_kernel: bool, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled_kernel:
        monkeypatch.setattr(measure, "_kernel", lambda: None)
    parsed, x, sums = QuantSpec.parse("int8"), made((4, 300)) * factor, Sums()
    sums.add(x, quantize_weight(x, parsed), parsed)
    assert 40 < sums.snr_db < 50


@pytest.mark.parametrize("compiled_kernel", [False, True])
def test_what_is_not_finite_has_no_ratio(compiled_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled_kernel:
        monkeypatch.setattr(measure, "_kernel", lambda: None)
    for value in (math.nan, math.inf):
        parsed, x, sums = QuantSpec.parse("int8"), made((4, 300)), Sums()
        x[2, 7] = value
        sums.add(x, quantize_weight(x, parsed), parsed)
        assert math.isnan(sums.snr_db)


def test_who_is_not_served_is_measured_all_the_same() -> None:
    parsed, x, sums = QuantSpec.parse("bfloat16"), made((4, 300)), Sums()
    weight = quantize_weight(x, parsed)  # codes without a scale
    assert squared_error(x, weight, parsed) is None
    sums.add(x, weight, parsed)
    assert sums.noise == pytest.approx(exact(x, weight, parsed)[1], rel=1e-5)
    parsed = QuantSpec.parse("int8")
    x = made((300, 4)).t()  # not contiguous
    assert squared_error(x, quantize_weight(x, parsed), parsed) is None
