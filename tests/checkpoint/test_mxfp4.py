"""MXFP4 experts of gpt-oss, as transformers has them: the same bytes in a file of quantlib, and the same values."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlib.checkpoint import compare_checkpoints, convert_file, inspect_checkpoint, load_quantized
from quantlib.nn.experts import QuantExperts, Stack

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="this transformers has no MXFP4")

from architectures import difference, outputs  # noqa: E402

import quantlib.hf  # noqa: E402, F401 # makes quantlib's entry of config.json known to transformers

SPEC = "float4_e2m1fn:group:32:e8m0"
E, HIDDEN, INNER = 4, 64, 32
CONFIG = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "head_dim": 16}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": E, "num_experts_per_tok": 2}
CONFIG |= {"sliding_window": 8, "pad_token_id": 0}
GIVEN = {"input_ids": torch.arange(3, 12)[None]}
pytestmark = pytest.mark.usefixtures("quiet_transformers")


def model_of() -> Any:
    torch.manual_seed(0)
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**CONFIG)).eval()


def put(folder: Path, **changes: Tensor) -> dict[str, Tensor]:
    """A folder whose experts are blocks and scales, and its tensors; ``changes`` replace tensors by the end of a name.

    Scales are those of every power that a weight may have, and a code is any of sixteen.
    """
    model_of().save_pretrained(folder)
    state = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        _, K, N = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(110, 125, (E, N, K // 32), dtype=torch.uint8)
    for ending, tensor in changes.items():
        name = next(name for name in state if name.endswith(ending))
        state[name] = tensor
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    return state


def experts_of(state: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix("_blocks") for name in state if name.endswith("_blocks")]


def test_values_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = put(tmp_path / "in")
    convert_file(tmp_path / "in", tmp_path / "floats", "bfloat16")
    floats = load_file(tmp_path / "floats" / "model.safetensors")
    assert len(experts_of(theirs)) == 4
    for name in experts_of(theirs):
        expected = mxfp4.convert_moe_packed_tensors(theirs[f"{name}_blocks"], theirs[f"{name}_scales"])
        assert torch.equal(floats[name], expected)
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())


@torch.no_grad()
def test_codes_and_scales_stay_as_they_are(tmp_path: Path) -> None:
    theirs = put(tmp_path / "in")
    report = convert_file(tmp_path / "in", tmp_path / "out", "quantlib")
    assert {(layer.name, layer.spec, layer.snr_db) for layer in report.layers} == {
        (name, SPEC, math.inf) for name in experts_of(theirs)
    }
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name in experts_of(theirs):
        assert torch.equal(ours[name].flatten(), theirs[f"{name}_blocks"].flatten())
        assert torch.equal(ours[f"{name}_scale"].view(torch.uint8), theirs[f"{name}_scales"])
    convert_file(tmp_path / "in", tmp_path / "floats", "float32")
    codes, floats = (
        transformers.GptOssForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("out", "floats")
    )
    assert sum(isinstance(module, QuantExperts) for module in codes.modules()) == 2
    loaded = load_quantized(model_of(), tmp_path / "out").float()
    expected = outputs(floats, GIVEN)
    assert difference(outputs(codes, GIVEN), expected) < 1e-5
    assert difference(outputs(loaded, GIVEN), expected) < 1e-5


def test_other_tools_read_them(tmp_path: Path) -> None:
    name = experts_of(put(tmp_path / "in"))[0]
    convert_file(tmp_path / "in", tmp_path / "floats", "bfloat16")
    (told,) = inspect_checkpoint(tmp_path / "in", only=[name])
    assert told.format == "MXFP4 experts"
    (same,) = compare_checkpoints(tmp_path / "in", tmp_path / "floats", only=[name]).tensors
    assert same.relative == 0


@pytest.mark.parametrize("source", ["in", "ours"])
def test_quantized_anew(source: str, tmp_path: Path) -> None:
    """Each expert's matrix by itself, as `quantize_file` has them: from blocks, and from our own codes."""
    names = experts_of(put(tmp_path / "in"))
    convert_file(tmp_path / "in", tmp_path / "ours", "quantlib")
    report = convert_file(tmp_path / source, tmp_path / "anew", "int8:row")
    assert all(20 < layer.snr_db < 80 for layer in report.layers)
    convert_file(tmp_path / "in", tmp_path / "floats", "float32")
    convert_file(tmp_path / "anew", tmp_path / "again", "float32")
    float32, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("floats", "again"))
    for name in names:
        rows = [Stack.of_shape(t.shape, "ekn", E).rows(t) for t in (float32[name], again[name])]
        step = rows[0].abs().amax(1, keepdim=True) / 127
        assert ((rows[0] - rows[1]).abs() <= step * 0.501).all()


def test_scales_that_no_value_needs(tmp_path: Path) -> None:
    scales = torch.full((E, 2 * INNER, HIDDEN // 32), 120, dtype=torch.uint8)
    scales[0, 0, 0] = 3  # 2^-124: no weight of a model
    theirs = put(tmp_path / "in", **{"layers.0.mlp.experts.gate_up_proj_scales": scales})
    convert_file(tmp_path / "in", tmp_path / "floats", "float32")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values = load_file(tmp_path / "floats" / "model.safetensors")[name]
    assert not values[0, :32, 0].any()
    expected = mxfp4.convert_moe_packed_tensors(theirs[f"{name}_blocks"], scales, dtype=torch.float32)
    assert (values - expected).abs().max() < 2.0**-120


@pytest.mark.parametrize(
    ("ending", "tensor", "words"),
    [
        ("gate_up_proj_scales", torch.full((E, 2 * INNER, 2), 253).byte(), r"_scales must be at most 252, 2\^125, got"),
        ("gate_up_proj_scales", torch.full((E, 2 * INNER, 2), 255).byte(), "_scales must be at most 252"),
        ("gate_up_proj_scales", torch.zeros(E, 3).byte(), r"_scales must be U8 \[4, 64, 2\], got U8 \[4, 3\]"),
        ("down_proj_blocks", torch.zeros(E, HIDDEN, 1, 8).byte(), "_blocks must be U8"),
    ],
)
def test_what_is_refused(ending: str, tensor: Tensor, words: str, tmp_path: Path) -> None:
    put(tmp_path / "in", **{ending: tensor})
    with pytest.raises(ValueError, match=words):
        convert_file(tmp_path / "in", tmp_path / "out", "quantlib")
    assert not (tmp_path / "out").exists()
