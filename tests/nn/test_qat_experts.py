"""Experts that are trained as their codes: what training starts from, what it moves, and what it lands on."""

from __future__ import annotations

import copy
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.nn.experts import QuantExperts
from quantlib.nn.qat_experts import QATExperts
from quantlib.testing import assert_same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from architectures import ARCHITECTURES, difference, outputs  # noqa: E402

SPECS = ("W8A16", "W4A16", "W8A8", "uint8:group:16:affine", "int8:tile:16", "float8_e4m3fn:row", "bfloat16")
CASES = [("Mixtral", spec) for spec in SPECS] + [("gpt-oss", "W4A16"), ("gpt-oss", "W8A8"), ("Llama 4", "W4A16")]


def made(name: str) -> tuple[Any, dict[str, Tensor]]:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    torch.manual_seed(0)
    return architecture.build().eval(), architecture.given


def trained(model: Any, given: dict[str, Tensor], steps: int = 3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(quantlib.qat_parameters(model), 1e-2), []
    for _ in range(steps):
        loss = model.train()(**given, labels=given["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        model.eval()(**given)
    return losses


def experts_in(model: nn.Module, kind: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def states(modules: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}


@pytest.mark.parametrize("scale", ["learned", "dynamic"])
@pytest.mark.parametrize(("name", "spec"), CASES)
def test_it_starts_from_the_codes_of_quantize_and_lands_on_its_own(name: str, spec: str, scale: Any) -> None:
    model, given = made(name)
    codes = copy.deepcopy(model)
    quantlib.quantize_(codes, spec)
    report = quantlib.prepare_qat_(model, spec, scale=scale)
    prepared, expected = experts_in(model, QATExperts), experts_in(codes, QuantExperts)
    assert list(prepared) == list(expected)
    assert {layer.name for layer in report.layers} >= {f"{n}.{key}" for n, m in prepared.items() for key in m.stacks}
    for n, module in prepared.items():
        for key in module.stacks:
            for got, want in zip(module.codes(key), expected[n].parts(key), strict=True):
                if want is not None:
                    assert_same_bytes(got.view(want.dtype), want.detach(), f"{n}.{key}")
    with torch.no_grad():
        assert difference(outputs(model, given), outputs(codes, given)) < 1e-5
    before = {n: p.clone() for n, p in model.named_parameters()}
    losses = trained(model, given)
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if "experts" in n and not torch.equal(p, before[n])}
    assert any(n.endswith("down_proj") for n in moved)
    assert any("scale_bias" in n for n in moved) == (scale == "learned" and spec != "bfloat16")
    with torch.no_grad():
        y = outputs(model, given)
    fakes = {(n, key): m.fake_weight(key).detach() for n, m in prepared.items() for key in m.stacks}
    floats = {n: QuantExperts.from_float(m.as_float(), spec) for n, m in prepared.items()}
    again = quantlib.convert_(model)
    assert again.coverage == report.coverage
    landed = experts_in(model, QuantExperts)
    for (n, key), fake in fakes.items():
        assert_same_bytes(landed[n].values(key), fake, f"{n}.{key}")
    if scale == "dynamic":
        for key, value in states(floats).items():
            assert_same_bytes(states(landed)[key], value, key)
    with torch.no_grad():
        assert difference(outputs(model, given), y) < (0.02 if spec == "W8A8" else 1e-5)
    assert not any(p.requires_grad for m in landed.values() for k, p in m.named_parameters() if "codes" in k)


def test_switched_off_it_is_the_float_model() -> None:
    model, given = made("Mixtral")
    with torch.no_grad():
        y = outputs(model, given)
        quantlib.prepare_qat_(model, "W8A8")
        assert difference(outputs(model, given), y) > 1e-4
        quantlib.qat_mode_(model, fake_quantize=False)
        assert difference(outputs(model, given), y) < 1e-6
        (first, *_) = experts_in(model, QATExperts).values()
        first.down_proj.mul_(3)
        before = first.down_proj_quantizer.scale.clone()
        quantlib.qat_mode_(model, fake_quantize=True)  # scales start from the weights of now
    assert torch.allclose(first.down_proj_quantizer.scale, 3 * before)


def test_states_copies_and_pickles() -> None:
    model, given = made("gpt-oss")
    floats = copy.deepcopy(model.state_dict())
    quantlib.prepare_qat_(model, "int4:group:16")
    start = copy.deepcopy(model.state_dict())
    trained(model, given)
    with torch.no_grad():
        y = outputs(model, given)
        for again in (copy.deepcopy(model), pickled(model)):
            assert difference(outputs(again, given), y) == 0
        other, _ = made("gpt-oss")
        quantlib.prepare_qat_(other, "int4:group:16")
        other.load_state_dict(model.state_dict())
        assert difference(outputs(other, given), y) == 0
        other.load_state_dict(floats, strict=False)  # its scales start from these weights
    for key, value in other.state_dict().items():
        if "forwards" not in key and "extra" not in key:
            assert_same_bytes(value, start[key], key)


def pickled(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_converted_model_is_saved(tmp_path: Path) -> None:
    model, given = made("Mixtral")
    quantlib.prepare_qat_(model, "W4A16")
    trained(model, given, 1)
    with pytest.raises(ValueError, match="must have a module of codes to save, got none: convert_ it first"):
        quantlib.checkpoint.save_quantized(model, tmp_path / "early")
    quantlib.convert_(model)
    model.save_pretrained(tmp_path / "codes")
    again = type(model).from_pretrained(tmp_path / "codes").eval()
    with torch.no_grad():
        assert difference(outputs(again, given), outputs(model, given)) == 0


@pytest.mark.parametrize(
    ("name", "spec", "why"),
    [
        ("Mixtral", "int8:tensor", "each of its matrices would have one scale: train rows, groups or tiles"),
        ("Mixtral", "int8:tile:5", "rows of several experts would share a scale of gate_up_proj: 96 rows in tiles"),
        ("Llama 4", "W8A8", "its forward multiplies by itself, so that activations cannot be projected: train weights"),
        ("Mixtral", "int8@int8:tensor:static", "activations of experts have no static scale"),
    ],
)
def test_experts_that_cannot_be_trained_are_named(name: str, spec: str, why: str) -> None:
    model, _ = made(name)
    report = quantlib.prepare_qat_(model, spec)
    experts = [n for n in report.skipped if n.endswith("experts")]
    assert experts
    assert all(report.skipped[n].startswith(why) for n in experts)
    assert not experts_in(model, QATExperts)


def test_what_is_refused() -> None:
    model, given = made("Mixtral")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="experts must be a module of float experts that quantlib knows, got Linear"):
        QATExperts.from_float(nn.Linear(2, 2), "int8")
    experts = model.model.layers[1].mlp.experts
    with pytest.raises(ValueError, match=r"got MixtralExperts: each of its matrices would have one scale"):
        QATExperts.from_float(experts, "int8:tensor")
    with torch.no_grad():
        experts.down_proj[2, 3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"down_proj of model.layers.1.mlp.experts must be finite.* in row 67"):
        quantlib.prepare_qat_(model, "int8")
    model.load_state_dict(state)
    quantlib.prepare_qat_(model, "int8", lambda module, name: name.endswith("experts"))
    with pytest.raises(RuntimeError, match=r"layer model.layers.0.mlp.experts: convert_ must come after a forward"):
        quantlib.convert_(model)
    report = quantlib.prepare_qat_(model, "int8")
    assert report.skipped["model.layers.0.mlp.experts"] == "already prepared for int8:row"
    trained(model, given, 1)
    with torch.no_grad():
        experts = model.model.layers[1].mlp.experts
        experts.down_proj[2, 3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"layer model.layers.1.mlp.experts: down_proj must be finite, got nan"):
        quantlib.convert_(model)
    assert len(experts_in(model, QATExperts)) == 2
    with pytest.raises(ValueError, match=r"got a single QATMixtralExperts: use \.convert"):
        quantlib.convert_(experts)
