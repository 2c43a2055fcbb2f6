"""The model card beside a checkpoint, read by huggingface_hub's own class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import nn

from quantlib import quantize_
from quantlib.checkpoint import dequantize_file, quantize_file, save_quantized

BASE = """---
license: other
license_name: llama3
license_link: LICENSE
language: [en, de]
tags: [text-generation, "a: b"]
pipeline_tag: text-generation
---
# A model

It says | hello.
"""


@pytest.fixture
def src(tmp_path: Path) -> Path:
    path = tmp_path / "in"
    path.mkdir()
    torch.manual_seed(0)
    state = {"layer.weight": torch.randn(8, 16), "lm_head.weight": torch.randn(4, 16), "layer.bias": torch.zeros(8)}
    save_file(state, path / "model.safetensors")
    (path / "README.md").write_text(BASE)
    (path / "LICENSE").write_text("the license")
    (path / "config.json").write_text('{"model_type": "llama", "_name_or_path": "them/Llama-9"}')
    return path


def test_a_card(src: Path, tmp_path: Path) -> None:
    report = quantize_file(src, tmp_path / "out", "int4:group:8", exclude=["nothing*"])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.to_dict() == {
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "tags": ["text-generation", "a: b", "quantlib", "int4"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "base_model": "them/Llama-9",
        "base_model_relation": "quantized",
    }
    text = card.text
    assert "# Llama-9, int4:group:8" in text
    assert "$ quantlib quantize IN OUT --to int4:group:8 --exclude 'nothing*'" in text
    assert "| parameters that are quantized | 128 of 200, 64.0% |" in text
    assert f"| layer.weight | 8 x 16 | int4:group:8 | 128 | {report.layers[0].snr_db:.1f} |" in text
    assert "| lm_head.weight | a head |" in text
    assert "| license | llama3 |" in text
    assert text.count("It says | hello.") == 1
    assert (tmp_path / "out" / "LICENSE").read_text() == "the license"
    dequantize_file(tmp_path / "out", tmp_path / "again")
    again = ModelCard.load(tmp_path / "again" / "README.md")
    assert again.data.base_model == "them/Llama-9"
    assert again.text.count("It says | hello.") == 1


@pytest.mark.parametrize("text", ["", "---\n[broken\n---\nx", "---\n- a\n---\n", "---\nlicense: mit\n---\n", "\xff"])
def test_cards_of_any_kind(text: str, src: Path, tmp_path: Path) -> None:
    (src / "README.md").write_text(text, encoding="latin-1")
    quantize_file(src, tmp_path / "out", "int8")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.license == ("mit" if "mit" in text else None)
    assert data.tags == ["quantlib", "int8"]


def test_many_layers(src: Path, tmp_path: Path) -> None:
    save_file({f"{k}.weight": torch.randn(2, 4) for k in range(300)}, src / "model.safetensors")
    quantize_file(src, tmp_path / "out", "int4:row")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "The 200 layers with the largest error, of 300." in text
    assert text.count("| 2 x 4 |") == 200


def test_a_model_in_memory(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))
    quantize_(model, "int8")
    save_quantized(model, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None
    assert "| parameters that are quantized | 128 of 152, 84.2% |" in card.text
    assert not json.dumps(card.data.to_dict()).count("null")


@pytest.mark.network
def test_the_validator_of_the_hub(src: Path, tmp_path: Path) -> None:
    quantize_file(src, tmp_path / "out", "int8")
    ModelCard.load(tmp_path / "out" / "README.md").validate()
