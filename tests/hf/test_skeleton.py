"""Files of experts that are one tensor, and of `Conv1D`: the same codes as in memory, however the float weight lies."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import quantlib
from quantlib.checkpoint import (
    compare_checkpoints,
    convert_file,
    dequantize_file,
    inspect_checkpoint,
    load_quantized,
    quantize_file,
    save_quantized,
)
from quantlib.testing import assert_same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from architectures import ARCHITECTURES, difference, outputs  # noqa: E402

from quantlib.hf import QuantlibConfig  # noqa: E402
from quantlib.hf.skeleton import layouts_of  # noqa: E402

LINEAR = (nn.Linear, transformers.pytorch_utils.Conv1D)
SPECS = ("W8A16", "W4A16", "W8A8", "int8:tensor", "int8:tile:16", "uint8:row:affine")
GRANITE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
GRANITE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
pytestmark = pytest.mark.usefixtures("quiet_transformers")


def made(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    if name == "GraniteMoE":
        config = transformers.GraniteMoeConfig(**GRANITE)
        return transformers.GraniteMoeForCausalLM(config).eval(), {"input_ids": torch.randint(3, 96, (1, 7))}
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    return architecture.build().eval(), architecture.given


def floats_of(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A model, and its folder: with experts as one tensor, in two files or more."""
    model, given = made(name)
    model.save_pretrained(folder, max_shard_size="20KB", save_original_format=name != "Qwen3-MoE")
    return model, given


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["GPT-2", "gpt-oss", "Llama 4", "Qwen3-MoE", "GraniteMoE"])
@torch.no_grad()
def test_a_folder_is_quantized_as_the_model_is(name: str, spec: str, tmp_path: Path) -> None:
    model, given = floats_of(name, tmp_path / "floats")
    report = quantize_file(tmp_path / "floats", tmp_path / "codes", spec)
    codes = type(model).from_pretrained(tmp_path / "codes").eval()
    loading = type(model).from_pretrained(tmp_path / "floats", quantization_config=QuantlibConfig(spec)).eval()
    told = loading.hf_quantizer.report
    assert (report.quantized, report.coverage) == (told.quantized, told.coverage)
    assert report.quantized > 0.7 * (report.quantized + report.floats)
    assert {re.sub(r"\.weight$", "", layer.name) for layer in report.layers} >= {
        layer.name for layer in told.layers if name != "GraniteMoE"
    }
    memory = copy.deepcopy(model)
    wanted = {layer.name for layer in told.layers}
    experts = {layer.rpartition(".")[0] for layer in wanted}
    quantlib.quantize_(memory, spec, lambda m, n: n in wanted | experts, types=LINEAR)
    state = codes.state_dict()
    assert list(state) == list(memory.state_dict())
    for key, value in memory.state_dict().items():
        assert_same_bytes(state[key], value, key)
    dequantize_file(tmp_path / "codes", tmp_path / "values")
    values = type(model).from_pretrained(tmp_path / "values").eval()
    y, want = (outputs(m, given) for m in (codes, values))
    assert difference(y, want) < (0.05 if spec == "W8A8" else 1e-5)


@pytest.mark.parametrize("spec", [*SPECS, "bfloat16", "float8_e4m3fn:row"])
@pytest.mark.parametrize("name", ["GPT-2", "gpt-oss", "Mixtral"])
@torch.no_grad()
def test_saved_and_loaded(name: str, spec: str, tmp_path: Path) -> None:
    model, given = made(name)
    floats, codes = copy.deepcopy(model), copy.deepcopy(model)
    quantlib.quantize_(model, spec, types=LINEAR)
    save_quantized(model, tmp_path / "saved")
    quantlib.quantize_(codes, spec, types=LINEAR)
    for into in (floats, codes):
        for p in into.parameters():
            p.data.zero_()
        load_quantized(into, tmp_path / "saved")
        for key, value in model.state_dict().items():
            assert_same_bytes(into.state_dict()[key], value, key)
    assert difference(outputs(floats, given), outputs(model, given)) == 0
    if name != "Mixtral":  # whose files have a matrix an expert
        model.save_pretrained(tmp_path / "pretrained")
        again = load_quantized(made(name)[0], tmp_path / "pretrained")
        assert difference(outputs(again, given), outputs(model, given)) == 0


def test_other_tools_read_them(tmp_path: Path) -> None:
    floats_of("gpt-oss", tmp_path / "floats")
    report = quantize_file(tmp_path / "floats", tmp_path / "codes", "W8A16")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    (told,) = inspect_checkpoint(tmp_path / "codes", only=[name])
    assert told.format == "quantlib int8:row, experts"
    (found,) = compare_checkpoints(tmp_path / "floats", tmp_path / "codes", only=[name]).tensors
    (layer,) = (layer for layer in report.layers if layer.name == name)
    assert found.sqnr_db == pytest.approx(layer.snr_db, abs=1e-3)
    converted = convert_file(tmp_path / "codes", tmp_path / "theirs", "compressed-tensors")
    assert converted.skipped[name] == "codes of experts are kept by quantlib's own files alone"
    dequantize_file(tmp_path / "codes", tmp_path / "values")
    (same,) = compare_checkpoints(tmp_path / "values", tmp_path / "theirs", only=[name]).tensors
    assert same.relative == 0


def file_of(state: dict[str, torch.Tensor], folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_codes_without_a_scale_of_before_version_2(tmp_path: Path) -> None:
    """They have an axis less: then nothing told [N, K] of `Conv1D` from its float weight [K, N]."""
    model, given = made("GPT-2")
    model.save_pretrained(tmp_path / "float")
    config = QuantlibConfig("bfloat16", skip=["lm_head"])
    model = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "codes")
    path = tmp_path / "codes" / "model.safetensors"
    state = {name: t.squeeze(-1) for name, t in load_file(path).items()}
    save_file(state, path, {"format": "pt"})
    again = type(model).from_pretrained(tmp_path / "codes")
    with torch.no_grad():
        assert difference(outputs(again, given), outputs(model, given)) == 0
    name = next(name for name in state if name.endswith("c_attn.weight"))
    N, K = state[name].shape
    save_file(state | {name: state[name].T.contiguous()}, path, {"format": "pt"})
    expected = rf"c_attn.weight_codes must have shape \[{N}, {K}\] or \[{N}, {K}, 1\], got \[{K}, {N}\]"
    with pytest.raises(ValueError, match=expected):
        type(model).from_pretrained(tmp_path / "codes")


def test_without_a_class_stacks_lie_as_their_sizes_say_and_the_rest_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {"a.experts.gate_up_proj": torch.randn(3, 8, 6), "a.experts.down_proj": torch.randn(3, 6, 4)}
    state |= {"b.experts.gate_up_proj": torch.randn(3, 6, 8), "b.experts.down_proj": torch.randn(3, 4, 6)}
    state |= {"c.experts.gate_up_proj": torch.randn(3, 6, 9), "c.experts.down_proj": torch.randn(3, 4, 6)}
    state |= {"d.experts.up_proj": torch.randn(3, 4, 6), "d.experts.down_proj": torch.randn(3, 6, 4)}
    state |= {"h.0.c_attn.weight": torch.randn(4, 12), "h.0.c_attn.bias": torch.randn(12)}
    source = file_of(state, tmp_path / "in", {"model_type": "mine"})
    report = quantize_file(source, tmp_path / "out", "int8:row")
    assert {layer.name for layer in report.layers} == {n for n in state if n[0] in "ab"}
    assert all("a stack of experts" in why for name, why in report.skipped.items() if name[0] in "cd")
    assert report.skipped["h.0.c_attn.weight"] == "transformers' Conv1D: it lies [in, out]"
    assert report.coverage == pytest.approx(432 / sum(t.numel() for t in state.values()))
    out = load_file(tmp_path / "out" / "model.safetensors")
    for key in "ab":
        x = state[f"{key}.experts.gate_up_proj"]
        x = x if key == "a" else x.transpose(1, 2)
        for e in range(3):
            codes, scale = quantlib.quantize_dynamic(x[e].contiguous(), "int8", block=(1, -1))
            assert_same_bytes(out[f"{key}.experts.gate_up_proj"][e, ..., 0], codes)
            assert_same_bytes(out[f"{key}.experts.gate_up_proj_scale"][e], scale)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        entry = json.loads(file.metadata()["quantlib"])
    assert entry["version"] == 2
    assert {name: weight["layout"] for name, weight in entry["weights"].items()} == {
        name: "enk" if name[0] == "a" else "ekn" for name in state if name[0] in "ab"
    }
    assert not quantize_file(source, tmp_path / "none", "int8:row", exclude=["a.*"]).skipped.keys() & {"b"}


@pytest.mark.parametrize("spec", ["int8:row", "int8:tile:4", "int4:group:2"])
def test_columns_of_a_stack_are_read_a_few_at_a_time(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes do not depend on how many."""
    x = torch.randn(2, 5, 46, generator=torch.Generator().manual_seed(0))
    state = {"experts.gate_up_proj": x, "experts.down_proj": torch.ones(2, 23, 5)}
    source = file_of(state, tmp_path / "in", {"model_type": "mine"})
    quantize_file(source, tmp_path / "whole", spec)
    monkeypatch.setattr("quantlib.checkpoint.convert.SLAB", 1)
    monkeypatch.setattr("quantlib.checkpoint.convert.COLUMNS", 8)
    quantize_file(source, tmp_path / "parts", spec)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    for name, value in whole.items():
        assert_same_bytes(parts[name], value, name)
    if spec == "int8:row":
        scale = quantlib.compute_scale(x.transpose(1, 2).reshape(-1, 5).contiguous(), "int8", block=(1, -1))
        assert_same_bytes(whole["experts.gate_up_proj_scale"].view(-1, 1), scale)


def test_an_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    state = {"experts.gate_up_proj": torch.ones(3, 6, 8), "experts.down_proj": torch.ones(3, 4, 6)}
    state["experts.down_proj"][2, 3, 1] = torch.nan
    source = file_of(state, tmp_path / "in", {"model_type": "mine"})
    with pytest.raises(ValueError, match=r"experts.down_proj of expert 2 must be finite.* got nan in row 1"):
        quantize_file(source, tmp_path / "out", "int8:row")
    assert not (tmp_path / "out").exists()


def test_without_a_config_stacks_stay_and_are_named(tmp_path: Path) -> None:
    state = {"experts.gate_up_proj": torch.randn(3, 8, 6), "experts.down_proj": torch.randn(3, 6, 4)}
    state["q.weight"] = torch.randn(8, 8)
    report = quantize_file(file_of(state, tmp_path / "in") / "model.safetensors", tmp_path / "out.safetensors", "int8")
    assert [layer.name for layer in report.layers] == ["q.weight"]
    assert all("a stack of experts" in report.skipped[name] for name in state if name != "q.weight")
    for name, value in load_file(tmp_path / "out.safetensors").items():
        if name in report.skipped:
            assert_same_bytes(value, state[name], name)


@pytest.mark.parametrize("layout", ["nk", "ekn/2", "(en)k", "(en)n/2", "(ek)n/0", "kn", 3, "(en)k/3"])
def test_layouts_that_lie(layout: Any, tmp_path: Path) -> None:
    state = {"experts.gate_up_proj": torch.ones(3, 6, 8), "experts.down_proj": torch.ones(3, 4, 6)}
    quantize_file(file_of(state, tmp_path / "in", {"model_type": "mine"}), tmp_path / "out", "int8:row")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["quantlib"])
    entry["weights"]["experts.down_proj"]["layout"] = layout
    save_file(load_file(path), path, {"quantlib": json.dumps(entry)})
    with pytest.raises(ValueError, match="must describe its weights by spec and shape"):
        dequantize_file(path, tmp_path / "floats.safetensors")


def test_a_layer_that_lies_otherwise_is_refused(tmp_path: Path) -> None:
    """Square weights fit either way: only their layout tells."""
    model, _ = made("GPT-2")
    quantlib.quantize_(model, "int8", lambda m, n: n.endswith("attn.c_proj"), types=LINEAR)
    save_quantized(model, tmp_path / "q.safetensors")
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        entry = json.loads(file.metadata()["quantlib"])
    for weight in entry["weights"].values():
        assert weight.pop("layout") == "kn"
    save_file(load_file(tmp_path / "q.safetensors"), tmp_path / "q.safetensors", {"quantlib": json.dumps(entry)})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"c_proj\.weight of a weight that lies otherwise, nk"):
        load_quantized(model, tmp_path / "q.safetensors")
    for key, value in model.state_dict().items():
        assert_same_bytes(value, before[key], key)


def test_a_class_that_is_not_known_tells_nothing() -> None:
    assert layouts_of({"model_type": "of nobody"}, {}) == {}
    assert layouts_of({"model_type": "gpt2", "n_embd": "wide"}, {}) == {}
