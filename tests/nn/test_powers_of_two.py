"""Scales of E8M0: powers of two by the rule of OCP Microscaling, exact in every op, one byte in memory and in files."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantlib import QuantSpec, backends, convert_, formats, ops, prepare_qat_, use_backend
from quantlib.checkpoint import load_quantized, save_quantized
from quantlib.nn import QuantLinear
from quantlib.nn.functional import dequantize_weight, kept_scale, quantize_weight

N, K = 24, 160
SPECS = (
    "float4_e2m1fn:group:32:e8m0",
    "float8_e4m3fn:group:32:e8m0",
    "float8_e5m2:row:e8m0",
    "int8:group:32:affine:e8m0",
    "int4:tile:16:e8m0",
    "int8:row:e8m0@int8:row",
)
BACKENDS = [name for name in ("cpp", "composite") if backends.refuses(name, "cpu") is None]
MX = ("float4_e2m1fn", "float8_e4m3fn", "float8_e5m2")
EXPONENT = {"float4_e2m1fn": 2, "float8_e4m3fn": 8, "float8_e5m2": 15}  # of the largest number


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def code_of(scale: Tensor) -> Tensor:
    return scale.view(torch.uint8).int()


@pytest.mark.parametrize("format", MX)
def test_an_exponent_is_that_of_amax_less_that_of_the_largest_number(format: str) -> None:
    """The rule of the OCP specification, floor(log2(amax)) - emax, at both sides of every power of two."""
    powers = np.arange(-80, 100, dtype=np.float64)
    amax = np.concatenate([np.exp2(powers), *(np.exp2(powers) * f for f in (1 + 2.0**-23, 1.5, 1.75, 2 - 2.0**-23))])
    x = torch.from_numpy(amax.astype(np.float32))[:, None]
    spec = QuantSpec.parse(f"{format}:row:e8m0")
    scale = ops.compute_scale(x, format, block=(1, 1))
    assert isinstance(scale, Tensor)
    expected = np.floor(np.log2(amax)).astype(np.int32) - EXPONENT[format] + 127
    assert code_of(kept_scale(scale, spec)).flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("format", [f.name for f in formats.TABLE if not getattr(f, "is_book", False)])
def test_the_scale_is_the_largest_power_that_amax_reaches(format: str) -> None:
    f, random = formats.get(format), np.random.default_rng(0)
    limit = min(f.scale_max, 2.0**126)
    s = np.exp2(random.uniform(-100, np.log2(limit), 2000)).clip(2.0**-100, limit).astype(np.float32)
    symmetric = None if formats.get(format).is_float or f.signed else False
    kept = kept_scale(torch.from_numpy(s), QuantSpec(format, "row", symmetric, scale="e8m0"))
    got, exact = kept.double().numpy(), s.astype(np.float64) * f.max / 2.0 ** np.floor(np.log2(f.max))
    assert ((got <= exact * (1 + 2.0**-23)) & (exact < 2 * got * (1 + 2.0**-23))).all()


def test_bounds_and_nan() -> None:
    spec = QuantSpec.parse("float4_e2m1fn:group:32:e8m0")
    scale = torch.tensor([0.0, 2.0**-100, -1.0, 2.0**125, torch.inf, torch.nan])
    assert code_of(kept_scale(scale, spec)).tolist() == [27, 27, 27, 252, 252, 255]


def test_mxfp4_has_the_bytes_of_the_rule_by_hand() -> None:
    """One block: amax 7 has the exponent 2, less 2: a scale of 1, and 7 is saturated to 6."""
    x = torch.tensor([[7.0, -6.0, 5.1, 0.25, 0.75, -0.0, 1.25, 3.5] * 4])
    weight = quantize_weight(x, QuantSpec.parse("float4_e2m1fn:group:32:e8m0"))
    assert weight.scale is not None
    assert code_of(weight.scale).tolist() == [[127]]
    codes = ops.unpack(weight.codes, "float4_e2m1fn").tolist()[0][:8]
    assert codes == [7, 15, 7, 0, 2, 8, 2, 6]  # ties to even: 0.25 to 0, 0.75 to 1, 1.25 to 1, 3.5 to 4


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_read_as_it_is_written(spec: str) -> None:
    parsed = QuantSpec.parse(spec)
    assert str(parsed) == spec
    assert QuantSpec(parsed.format, parsed.per, parsed.symmetric, scale=torch.float8_e8m0fnu).scale == "e8m0"  # type: ignore[arg-type]


def test_mxfp4_takes_four_and_a_quarter_bits() -> None:
    assert QuantSpec.parse("float4_e2m1fn:group:32:e8m0").nbytes((128, 256)) * 8 == 128 * 256 * 4.25


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nf4:group:32:e8m0", "scale must be float32, bfloat16 or float16 for nf4, a code book, got e8m0"),
        ("int4:group:32:e8m0:mse", "scale must be float32, bfloat16 or float16 for the search mse, got e8m0"),
        ("int8@int8:row:e8m0", "activation must have scales of float32, got int8:row:e8m0"),
    ],
)
def test_what_cannot_be_kept_so_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QuantSpec.parse(spec)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS)
def test_every_op_gives_the_bytes_of_the_same_scales_in_float32(spec: str, backend: str) -> None:
    parsed, x = QuantSpec.parse(spec).weight_only, matrix()
    with use_backend(backend):
        codes, scale, z = quantize_weight(x, parsed)
        assert scale is not None
        scale[0, 0] = torch.nan
        block = parsed.block(x.shape)
        for rows in (1, 3, 40):
            a = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows))
            dy = torch.ones(rows, N)
            got, want = (
                (
                    ops.dequant_matmul(a, codes, s, parsed.format, block=block, zero_point=z),
                    torch.ops.quantlib.dequant_matmul_backward(dy, codes, s, parsed.format, block, z, K),
                    ops.dequantize(codes, s, parsed.format, block=block, zero_point=z, size=K),
                    ops.quantize(x, s, parsed.format, block=block, zero_point=z).view(torch.uint8),
                )
                for s in (scale, scale.float())
            )
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("spec", SPECS)
def test_a_layer_keeps_a_byte_a_scale(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(QuantLinear.from_float(nn.Linear(K, N), spec))
    layer, x = model[0], torch.randn(3, K)
    assert layer.weight_scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(layer.values(), dequantize_weight(layer.plain, layer.spec, K, torch.float32))
    y = layer(x)
    assert y.isfinite().all()
    for same in (copy.deepcopy(model), copy.deepcopy(model).to("cpu", torch.float32)):
        assert torch.equal(same(x), y)
    assert copy.deepcopy(model).half()[0].weight_scale.dtype == torch.float8_e8m0fnu
    into = nn.Sequential(QuantLinear(K, N, spec=spec))
    into.load_state_dict(model.state_dict())
    assert torch.equal(into(x), y)
    save_quantized(model, tmp_path / "model.safetensors")
    loaded = nn.Sequential(nn.Linear(K, N) if "@" not in spec else QuantLinear(K, N, spec=spec))
    load_quantized(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), y)


def test_codes_from_elsewhere_keep_their_exponents() -> None:
    spec = QuantSpec.parse("float4_e2m1fn:group:32:e8m0")
    weight = quantize_weight(matrix(), spec)
    assert weight.scale is not None
    for scale in (weight.scale, weight.scale.float()):
        layer = QuantLinear.from_codes(weight.codes, scale, spec, in_features=K)
        assert torch.equal(layer.values(), dequantize_weight(weight, spec, K, torch.float32))
    with pytest.raises(ValueError, match="scale must be what e8m0 holds"):
        QuantLinear.from_codes(weight.codes, weight.scale.float() * 1.5, spec, in_features=K)


def test_a_learned_scale_that_is_negative_is_named() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    prepare_qat_(model, "float4_e2m1fn:group:32:e8m0")
    model(torch.randn(2, 64))
    with torch.no_grad():
        model[0].weight_quantizer.base.neg_()  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="layer 0: scale must be above 0 and finite for e8m0, got -"):
        convert_(model)
