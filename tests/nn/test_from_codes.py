"""`QuantLinear.from_codes`: a layer of codes and scales that were found elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import quantlib
from quantlib.nn import QuantLinear

SPECS = ["int8:row", "int8:row:affine", "uint8:group:16", "int4:group:16", "int4:group:16:affine", "int8:tile:8", "fp8"]


@pytest.mark.parametrize(
    "spec",
    [*SPECS, "int4:row:affine", "float4_e2m1fn:group:16", "int8:tensor", "W8A8", "W4A16", "int4:group:16:float16"],
)
def test_the_layer_that_quantizing_gives(spec: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(33, 24)
    expected = QuantLinear.from_float(layer, spec)
    row = expected.spec.row
    codes = quantlib.unpack(expected.codes, row.name, 33) if row.packed else expected.codes
    rest: dict[str, Any] = {"zero_point": expected.weight_zero_point, "bias": layer.bias}
    scale = expected.weight_scale
    assert scale is not None
    x = torch.randn(5, 33)
    for given in (codes, codes.long()) if not row.is_float else (codes,):
        got = QuantLinear.from_codes(given, scale, spec, **rest)
        assert torch.equal(got(x), expected(x))
        assert torch.equal(got.values(), expected.values())
        assert got.weight_codes.data_ptr() != given.data_ptr()
    packed = QuantLinear.from_codes(expected.codes, scale, spec, in_features=33, **rest)
    assert torch.equal(packed(x), expected(x))


@pytest.mark.parametrize("spec", ["int8:row", "int8:row@int8:row", "int4:row", "int4:row@int8:row"])
def test_the_lowest_code(spec: str) -> None:
    """Others use it in symmetric formats too."""
    lowest = -8 if "int4" in spec else -128
    codes = torch.tensor([[lowest, lowest, -lowest - 1, 1]] * 3).repeat(1, 32)
    layer = QuantLinear.from_codes(codes, torch.tensor([0.5, 1.0, 2.0]), spec)
    assert torch.equal(layer.values(), codes * torch.tensor([[0.5], [1.0], [2.0]]))
    x = torch.randint(-127, 128, (4, 128)).float()
    x[:, 0] = 127  # the scale of each row is 1
    assert torch.equal(layer(x), x @ layer.values().T)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"codes": torch.zeros(3)}, ValueError, r"codes must be \[N, K\], got \[3\]"),
        ({"codes": torch.full((2, 4), 8)}, ValueError, "codes must be in -8..7 for int4, got 8"),
        ({"codes": torch.zeros(2, 4)}, TypeError, "codes must be integers of int4, got float32"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be \[2, 1\] for int4:row of \[2, 4\], got \[3\]"),
        ({"scale": torch.ones(2).int()}, TypeError, "scale must be floats, got int32"),
        ({"zero_point": torch.zeros(2).int()}, ValueError, "zero_point must be left out for int4:row"),
        ({"spec": "int4:row:affine"}, ValueError, "zero_point must be given for int4:row:affine"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must be \[2\] floats, got torch.float32 \[3\]"),
        ({"spec": "bfloat16"}, ValueError, "spec must have a scale, got bfloat16"),
        ({"in_features": 4}, ValueError, r"codes must be uint8 \[N, 2\] for 4 columns, got int64 \[2, 4\]"),
        ({"spec": "fp8"}, TypeError, "codes must be float8_e4m3fn, got int64"),
        (
            {"spec": "int4:row:bfloat16", "scale": torch.tensor([0.1, 1])},
            ValueError,
            "scale must be what bfloat16 holds",
        ),
        ({"spec": "int8@int8:tensor:static"}, ValueError, "spec must have activations whose scales follow"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"codes": torch.zeros(2, 4).long(), "scale": torch.ones(2), "spec": "int4:row", **change}
    with pytest.raises(error, match=words):
        QuantLinear.from_codes(given.pop("codes"), given.pop("scale"), given.pop("spec"), **given)
