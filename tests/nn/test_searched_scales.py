"""A spec with a search: one choice of scales for layers, files, conversions and training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import quantlib
from quantlib import QuantSpec, ops
from quantlib.checkpoint import load_quantized, quantize_file, save_quantized
from quantlib.nn import QuantLinear
from quantlib.nn.functional import SLAB, quantize_weight

SPECS = (
    "nf4_bf16:group:32:bfloat16:magnitude",
    "int4:group:32:affine:mse",
    "int8:tile:16:mse",
    "float8_e4m3fn:row:mse",
)


def matrix(rows: int = 24, columns: int = 160) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    return x * (1 + 5 * (torch.arange(columns) % 37 == 0))


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(160, 24), nn.ReLU(), nn.Linear(24, 24))
    with torch.no_grad():
        made[0].weight.copy_(matrix())
        made[2].weight.copy_(matrix(24, 24))
    return made


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(bytes_of(first[k]), bytes_of(second[k])) for k in first)


def bytes_of(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8)


@pytest.mark.parametrize("text", SPECS)
def test_codes_are_those_of_the_scale_that_was_found(text: str) -> None:
    spec, x = QuantSpec.parse(text), matrix()
    block, symmetric = spec.block(x.shape), spec.symmetric is True
    how = {"method": spec.search, "kept": spec.scale}
    found = ops.compute_scale(x, spec.format, block, symmetric=symmetric, **how)
    scale, zero_point = (found, None) if isinstance(found, Tensor) else found
    codes, kept, _ = quantize_weight(x, spec)
    assert torch.equal(kept.float(), scale)
    assert not torch.equal(scale, ops.compute_scale(x, spec.format, block))
    want = ops.quantize(x, scale, spec.format, block=block, zero_point=zero_point)
    assert torch.equal(bytes_of(codes), bytes_of(want))
    layer = nn.Linear(160, 24)
    layer.weight.data = x
    by_slabs = QuantLinear.from_float(layer, spec, seen=lambda *part: None)
    assert torch.equal(bytes_of(by_slabs.codes), bytes_of(codes))
    other = QuantLinear.from_float(nn.Linear(160, 24), spec).set_weight_(x)
    assert torch.equal(bytes_of(other.codes), bytes_of(codes))


def test_a_search_loses_less() -> None:
    for format in ("nf4_bf16:group:32", "int4:group:32", "float8_e4m3fn:row"):
        one, two = (quantlib.quantize_(model(), f"{format}{word}") for word in ("", ":mse"))
        assert all(b.snr_db > a.snr_db for a, b in zip(one.layers, two.layers, strict=True))
        assert [x.bytes_after for x in one.layers] == [x.bytes_after for x in two.layers]


@pytest.mark.parametrize("text", [*SPECS, "int8:tensor:mse"])
def test_a_file_keeps_it_and_a_conversion_makes_it(text: str, tmp_path: Path) -> None:
    floats = model()
    quantized = copy.deepcopy(floats)
    quantlib.quantize_(quantized, text)
    save_quantized(quantized, tmp_path / "saved.safetensors")
    loaded = copy.deepcopy(floats)
    load_quantized(loaded, tmp_path / "saved.safetensors")
    assert same(loaded, quantized)
    assert str(loaded[0].spec) == text
    save_file(floats.state_dict(), tmp_path / "floats.safetensors")
    quantize_file(tmp_path / "floats.safetensors", tmp_path / "made.safetensors", text)
    made = copy.deepcopy(floats)
    load_quantized(made, tmp_path / "made.safetensors")
    assert same(made, quantized)


def test_codes_of_a_search_are_codes_of_the_format() -> None:
    searched, plain = model(), model()
    quantlib.quantize_(searched, "int4:group:32:mse")
    quantlib.quantize_(plain, "int4:group:32")
    plain.load_state_dict(searched.state_dict())
    assert same(plain, searched)
    with pytest.raises(RuntimeError, match="must be codes of int4:group:32:mse, got int4:group:16"):
        searched.load_state_dict(quantized_to("int4:group:16").state_dict())


def quantized_to(text: str) -> nn.Module:
    made = model()
    quantlib.quantize_(made, text)
    return made


@pytest.mark.parametrize("text", SPECS)
def test_training_starts_from_it(text: str) -> None:
    trained = model()
    quantized = copy.deepcopy(trained)
    quantlib.quantize_(quantized, text)
    quantlib.prepare_qat_(trained, text)
    trained(torch.ones(1, 160))
    quantlib.convert_(trained)
    assert same(trained, quantized)


def test_a_slab_is_a_part_of_the_whole() -> None:
    x, spec = matrix(SLAB // 160 + 40), QuantSpec.parse(SPECS[0])
    parts: list[Tensor] = []
    weight = quantize_weight(x, spec, lambda rows, part, _: parts.append(part.codes))
    assert len(parts) > 1
    assert torch.equal(weight.codes, quantize_weight(x, spec).codes)
