"""Layers whose weight and input are multiplied by a Hadamard matrix: what they compute, and where that is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib import reference
from quantlib.checkpoint import dequantize_file, load_quantized, quantize_file, save_quantized
from quantlib.nn import QuantConv2d, QuantEmbedding, QuantLinear
from quantlib.nn.functional import dequantize_weight, quantize_weight
from quantlib.spec import QuantSpec

SPECS = ("W8A8:hadamard", "int8:hadamard", "int4:group:32:magnitude:hadamard", "uint8:tensor:affine:hadamard")


def model(K: int = 96) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, 64), nn.GELU(), nn.Linear(64, 8))


def outliers(K: int = 96) -> Tensor:
    x = torch.randn(16, K, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 80
    return x


def error(got: nn.Module, wanted: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((got(x) - wanted(x)).norm() / wanted(x).norm())


def quantized(spec: str, K: int = 96) -> nn.Sequential:
    made = model(K)
    quantlib.quantize_(made, spec)
    return made


@pytest.mark.parametrize("text", SPECS)
def test_a_spec_is_written_as_it_is_read(text: str) -> None:
    spec = QuantSpec.parse(text)
    assert spec.hadamard
    assert QuantSpec.parse(str(spec)) == spec
    assert spec.kept.hadamard
    assert not spec.unrotated.hadamard
    assert str(QuantSpec.parse("W8A8:hadamard")) == "int8:row:hadamard@int8:row"
    assert [spec.rotation(K) for K in (96, 1536, 14336, 7, 0)] == [32, 512, 1024, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bfloat16:hadamard", "hadamard must be False for bfloat16 without a scale, got True"),
        ("int8@int8:row:hadamard", "activation must be rotated by the word hadamard of its weight"),
        ("int8:hadamard:row", "per must be tensor, row"),
        ("hadamard", "format must be"),
    ],
)
def test_a_word_that_is_wrong_there(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec.parse(text)


def test_codes_are_those_of_rotated_columns() -> None:
    w, spec = torch.randn(8, 96), QuantSpec.parse("int8:hadamard")
    turned = torch.from_numpy(np.array(reference.hadamard(w.numpy(), 32)).view(np.float32))
    codes, scale, _ = quantize_weight(w, spec)
    wanted = quantlib.quantize_dynamic(turned, "int8", block=(1, -1))
    assert torch.equal(codes, wanted[0])
    assert scale is not None
    assert torch.equal(scale, wanted[1])
    back = dequantize_weight(quantize_weight(w, spec), spec, 96, torch.float32)
    torch.testing.assert_close(back, w, atol=0.03, rtol=0)


def test_outliers_of_an_input_lose_less() -> None:
    floats, x = model(), outliers()
    with torch.no_grad():
        floats[0].weight[:, 5] /= 80
    rotated, plain = copy.deepcopy(floats), copy.deepcopy(floats)
    quantlib.quantize_(rotated, "W8A8:hadamard")
    quantlib.quantize_(plain, "W8A8")
    assert error(rotated, floats, x) < 0.5 * error(plain, floats, x)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_layer_computes_with_its_values(spec: str, dtype: torch.dtype) -> None:
    made, x = quantized(spec), outliers().to(dtype)
    floats = copy.deepcopy(made)
    quantlib.dequantize_(floats)
    near = 0.02 if "A8" in spec or dtype == torch.bfloat16 else 1e-5
    with torch.no_grad():
        y, wanted = made(x), floats.to(dtype)(x)
    assert y.dtype == dtype
    assert float((y - wanted).norm() / wanted.norm()) < near
    torch.testing.assert_close(made[0].weight + 0, floats[0].weight.detach().float(), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("spec", SPECS)
def test_a_gradient_is_that_of_the_values(spec: str) -> None:
    made, x = quantized(spec), outliers().requires_grad_()
    floats = copy.deepcopy(made)
    quantlib.dequantize_(floats)
    (dx,) = torch.autograd.grad(made(x).sum(), x)
    (wanted,) = torch.autograd.grad(floats(x).sum(), x)
    assert float((dx - wanted).norm() / wanted.norm()) < (0.02 if "A8" in spec else 1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_kept_copied_and_compiled_it_gives_the_same_bytes(spec: str, tmp_path: Path) -> None:
    made, x = quantized(spec), outliers()
    save_quantized(made, tmp_path / "model.safetensors")
    loaded, stated = model(), quantized(spec)
    load_quantized(loaded, tmp_path / "model.safetensors")
    stated.load_state_dict(made.state_dict())
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted = made(x)
        for other in (loaded, stated, copy.deepcopy(made), compiled):
            assert torch.equal(other(x), wanted)
    assert loaded[0].spec == QuantSpec.parse(spec)


@pytest.mark.parametrize("spec", ["int8:hadamard", "uint8:tensor:affine:hadamard", "int8:tile:32:hadamard"])
def test_a_file_has_the_codes_of_quantize(spec: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    floats = model()
    save_file(floats.state_dict(), tmp_path / "floats.safetensors")
    quantize_file(tmp_path / "floats.safetensors", tmp_path / "codes.safetensors", spec)
    loaded, made = model(), quantized(spec)
    load_quantized(loaded, tmp_path / "codes.safetensors")
    for name, t in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t), name
    dequantize_file(tmp_path / "codes.safetensors", tmp_path / "back.safetensors", dtype="float32")
    quantlib.dequantize_(made)
    assert torch.equal(load_file(tmp_path / "back.safetensors")["0.weight"], made[0].weight)


@pytest.mark.parametrize("spec", ["int4:group:32:hadamard", "W8A8:hadamard"])
def test_calibrated_codes_are_those_of_rotated_inputs(spec: str) -> None:
    made, x = model(), outliers()
    report = quantlib.calibrate(made, [x], spec)
    assert all(layer.loss < 0.8 * layer.rounding for layer in report.layers)
    assert error(made, model(), x) < error(quantized(spec), model(), x)


def test_weights_are_set_and_rows_are_kept() -> None:
    layer = QuantLinear.from_float(nn.Linear(96, 8), "int8:hadamard")
    w = torch.randn(8, 96)
    layer.set_weight_(w)
    assert torch.equal(layer.weight_codes, quantize_weight(w, layer.spec).codes)
    codes = layer.weight_codes.clone()
    layer.set_weight_(layer.values())
    assert torch.equal(layer.weight_codes, codes)


def test_columns_of_an_odd_number_are_not_rotated() -> None:
    x = outliers(7)
    with torch.no_grad():
        assert torch.equal(quantized("W8A8:hadamard", 7)[0](x), quantized("W8A8", 7)[0](x))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(8, 32), nn.Conv2d(3, 3, 3), nn.Linear(32, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: quantlib.quantize_(Routed(), "int8:hadamard", types=[nn.Linear, nn.Embedding]),
            "spec must be without hadamard for table, Embedding, got int8:row:hadamard",
        ),
        (
            lambda: quantlib.quantize_(Routed(), "int8:hadamard", types=[nn.Linear, nn.Conv2d]),
            "spec must be without hadamard for conv, Conv2d, got int8:row:hadamard",
        ),
        (lambda: QuantEmbedding(8, 32, spec="int8:hadamard"), "without hadamard for an nn.Embedding"),
        (lambda: QuantConv2d(3, 3, 3, spec="int8:hadamard"), "without hadamard for an nn.Conv2d"),
        (lambda: quantlib.prepare_qat_(model(), "W8A8:hadamard"), "without hadamard for training"),
        (lambda: quantlib.nn.FakeQuantize((4, 32), "int8:hadamard"), "without hadamard for fake quantization"),
        (
            lambda: quantlib.calibrate(model(), [outliers()], "int8:hadamard", "awq"),
            "without hadamard for awq, which searches the scales of channels that are not mixed",
        ),
    ],
)
def test_what_cannot_rotate_its_input_refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
