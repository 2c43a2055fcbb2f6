"""Scales of 16 bits: ops give the bytes that they give with the same scales in float32, and modules keep them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib import QuantSpec, backends, formats, ops
from quantlib.checkpoint import load_quantized, save_quantized
from quantlib.formats import FloatFormat
from quantlib.nn import QuantEmbedding, QuantLinear
from quantlib.nn.functional import Weight, dequantize_weight, kept_scale, quantize_weight

N, K = 24, 160
SPECS = (
    "nf4_bf16:group:32:bfloat16",
    "int4:group:32:affine:float16",
    "int8:row:bfloat16",
    "uint8:tile:16:affine:float16",
    "float8_e4m3fn:tensor:float16",
    "int8:row:float16@int8:row",
    "int4:group:32:bfloat16@int8:row",
    "int8:row:bfloat16@uint8:row:affine",
)
BACKENDS = [name for name in ("cpp", "composite") if backends.refuses(name, "cpu") is None]


def wide(weight: Weight) -> Weight:
    assert weight.scale is not None
    return weight._replace(scale=weight.scale.float())


def matrix(seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_is_read_as_it_is_written(spec: str) -> None:
    parsed = QuantSpec.parse(spec)
    assert QuantSpec.parse(str(parsed)) == parsed
    dtype = parsed.scale
    assert str(parsed).partition("@")[0] == spec.partition("@")[0]
    assert parsed != QuantSpec.parse(spec.replace(f":{dtype}", "", 1))
    assert parsed.nbytes((N, K)) < QuantSpec.parse(spec.replace(f":{dtype}", "", 1)).nbytes((N, K))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("int8:row:float64", "per must be tensor, row"),
        ("bfloat16:bfloat16", "scale must be float32 for bfloat16 without a scale, got bfloat16"),
        ("int8@int8:tensor:bfloat16:static", "scale must be float32 for a static activation, got bfloat16"),
        ("int8@int8:row:bfloat16", "activation must have scales of float32, got int8:row:bfloat16"),
    ],
)
def test_a_scale_that_cannot_be_kept_is_refused(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QuantSpec.parse(spec)


def test_another_scale_is_named() -> None:
    with pytest.raises(ValueError, match="scale must be float32, bfloat16, float16 or e8m0, got 'int8'"):
        QuantSpec("int8", scale="int8")
    assert QuantSpec("int8", scale=torch.float16).scale == "float16"  # type: ignore[arg-type]


def test_a_size_counts_two_bytes_a_scale() -> None:
    assert QuantSpec.parse("nf4_bf16:group:64:bfloat16").nbytes((128, 256)) * 8 == 128 * 256 * 4.25
    assert QuantSpec.parse("nf4_bf16:group:32:float16").nbytes((128, 256)) * 8 == 128 * 256 * 4.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_kept_scale_is_the_nearest_and_never_0_or_infinite(dtype: str) -> None:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    tie = torch.tensor([1 + 2.0 ** -(f.fraction_bits + 1), 1 + 3 * 2.0 ** -(f.fraction_bits + 1)])
    scale = torch.cat([torch.tensor([0.0, 2.0**-100, 1e-30, 2.0**126, torch.nan]), tie])
    kept = kept_scale(scale, QuantSpec("int8", scale=dtype))
    assert kept.dtype == getattr(torch, dtype)
    got = kept.float().tolist()
    smallest = max(f.smallest, 2.0**-100)
    assert got[1] == smallest
    assert got[0] == f.smallest
    assert got[3] == min(f.max, 2.0**126)
    assert np.isnan(got[4])
    assert got[5:] == [1.0, 1 + 2.0 ** -(f.fraction_bits - 1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS)
def test_codes_are_made_with_the_kept_scale(spec: str, backend: str) -> None:
    parsed, x = QuantSpec.parse(spec).weight_only, matrix()
    with quantlib.use_backend(backend):
        weight = quantize_weight(x, parsed)
        assert weight.scale is not None
        assert weight.scale.dtype == getattr(torch, parsed.scale)
        block = parsed.block(x.shape)
        again = ops.quantize(x, weight.scale.float(), parsed.format, block=block, zero_point=weight.zero_point)
        assert torch.equal(again.view(torch.uint8), weight.codes.view(torch.uint8))
        values = dequantize_weight(weight, parsed, K, torch.float32)
        assert torch.equal(values, dequantize_weight(wide(weight), parsed, K, torch.float32))
    step = weight.scale.float().max() * (0.16 if parsed.row.is_float and parsed.row.bits == 4 else 1) * 1.02
    bound = step * 16 if parsed.format == "float8_e4m3fn" else step
    assert (values - x).abs().max() <= bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS)
def test_a_product_has_the_bytes_of_float32_scales(spec: str, dtype: torch.dtype, backend: str) -> None:
    layer = QuantLinear.from_float(nn.Linear(K, N, dtype=dtype), spec)
    same = copy.deepcopy(layer)
    same.spec = replace(layer.spec, scale="float32")
    del same._parameters["weight_scale"]
    assert layer.weight_scale is not None
    same.register_parameter("weight_scale", nn.Parameter(layer.weight_scale.detach().float(), requires_grad=False))
    for rows in (1, 3, 40):
        x = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(dtype)
        with quantlib.use_backend(backend):
            got, want = [], []
            for module, results in ((layer, got), (same, want)):
                given = x.clone().requires_grad_()
                y = module(given)
                y.sum().backward()
                results += [y, given.grad]
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_scale_keeps_its_sign(dtype: torch.dtype, backend: str) -> None:
    codes, scale = torch.ones(2, 64, dtype=torch.int8), torch.tensor([[1.0, -0.0], [-3.0, -0.5]], dtype=dtype)
    x = torch.ones(1, 64)
    with quantlib.use_backend(backend):
        for narrow in (scale, scale.float()):
            y = ops.dequantize(codes, narrow, "int8", block=(1, 32))
            assert y[:, ::32].tolist() == [[1.0, 2.0**-100], [-3.0, -0.5]]
            assert ops.dequant_matmul(x, codes, narrow, "int8", block=(1, 32)).tolist() == [[32.0, -112.0]]
            assert ops.dequant_matmul(0 * x, codes, narrow[:, :1], "int8", block=(1, -1)).view(
                torch.int32
            ).tolist() == [[0, 0]]
            assert ops.dynamic_matmul(x, codes, narrow, "int8", block=(1, 32)).tolist() == [[32.0, -112.0]]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(N, K), nn.Linear(K, N), nn.Linear(N, K)).eval()


def test_a_file_keeps_narrow_scales(tmp_path: Path) -> None:
    spec = "nf4_bf16:group:32:bfloat16"
    quantized = model()
    quantlib.quantize_(quantized, spec, types=(nn.Linear, nn.Embedding))
    ids = torch.arange(N)
    save_quantized(quantized, tmp_path / "model.safetensors")
    loaded = model()
    load_quantized(loaded, tmp_path / "model.safetensors")
    assert isinstance(loaded[0], QuantEmbedding)
    assert loaded[1].weight_scale.dtype == torch.bfloat16
    assert torch.equal(loaded(ids), quantized(ids))
    state = copy.deepcopy(quantized).half().state_dict()
    assert state["1.weight_scale"].dtype == torch.bfloat16
    assert torch.equal(state["1.weight_scale"], quantized[1].weight_scale)


def test_codes_from_elsewhere_keep_narrow_scales() -> None:
    spec = QuantSpec.parse("nf4_bf16:group:32:bfloat16")
    weight = quantize_weight(matrix(), spec)
    assert weight.scale is not None
    codes = ops.unpack(weight.codes, spec.format, K)
    layer = QuantLinear.from_codes(codes, weight.scale.float(), spec)
    assert layer.weight_scale is not None
    assert layer.weight_scale.dtype == torch.bfloat16
    assert torch.equal(layer.values(), dequantize_weight(weight, spec, K, torch.float32))


def test_a_state_of_other_scales_is_refused() -> None:
    narrow, other = (QuantLinear(K, N, spec=spec) for spec in ("int4:group:32:bfloat16", "int4:group:32"))
    with pytest.raises(RuntimeError, match="must be codes of int4:group:32:bfloat16, got int4:group:32"):
        narrow.load_state_dict(other.state_dict())


def test_training_lands_on_the_kept_scales() -> None:
    trained = model()[1:]
    quantlib.prepare_qat_(trained, "nf4_bf16:group:32:bfloat16")
    x = torch.randn(8, K, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    learned = [p for p in trained.parameters() if p.requires_grad]
    before = [p.clone() for p in learned]
    for _ in range(3):
        optimizer.zero_grad()
        trained(x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, learned, strict=True))
    y = trained.eval()(x)
    quantlib.convert_(trained)
    assert trained[0].weight_scale.dtype == torch.bfloat16
    torch.testing.assert_close(trained(x), y, rtol=1e-5, atol=1e-5)


def test_a_scale_that_is_widened_stays_as_it_is() -> None:
    layer = QuantLinear(K, N, spec="int4:group:32:bfloat16")
    scale = layer.weight_scale
    assert scale is not None
    before = scale.data.clone()
    scale.data = scale.data.float()
    assert scale.dtype == torch.bfloat16
    assert torch.equal(scale.data, before)
    with pytest.raises(TypeError, match="data of codes or a scale must be bfloat16, got float32"):
        scale.data = before.float() + 2.0**-20
