"""Models, folders and adapters that do not fit: one error that names them, and what is there stays as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.checkpoint import quantize_file
from quantlib.testing import assert_same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from architectures import ARCHITECTURES  # noqa: E402

from quantlib.hf import QuantlibConfig  # noqa: E402
from quantlib.hf.config import OURS  # noqa: E402

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
load = transformers.AutoModelForCausalLM.from_pretrained
pytestmark = pytest.mark.usefixtures("quiet_transformers")


def llama(**sizes: int) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes})).eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version must be an integer of at most 1, got 2: a later quantlib wrote it, update quantlib"),
        ({"version": 2, "flavour": 3}, "version must be an integer of at most 1, got 2"),
        ({"flavour": 3}, "quantization_config must have keys of quantlib, got 'flavour': update quantlib"),
        ({"spec": "int3"}, "got 'int3': format must be one of float32"),
        ({"library": "other"}, "quant_method must be 'quantlib', got 'quantlib', library 'other'"),
    ],
)
def test_configs_of_folders(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = llama()
    quantlib.quantize_(model, "int8")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path)
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"modules_to_not_convert": ["lm_head"]}, "got 'modules_to_not_convert', which is skip=[...]"),
        ({"llm_int8_skip_modules": ["lm_head"]}, "got 'llm_int8_skip_modules', which is skip=[...]"),
        ({"load_in_4bit": True}, "got 'load_in_4bit', which is spec=\"W4A16\""),
        ({"load_in_8bit": True}, "got 'load_in_8bit', which is spec=\"W8A16\""),
        ({"bits": 4, "group_size": 128}, '"W4A16", \'group_size\', which is spec="int4:group:128"'),
        ({"bnb_4bit_compute_dtype": torch.bfloat16}, "which is from_pretrained(..., dtype=torch.bfloat16)"),
        ({"dataset": "c4"}, "got 'dataset', which is quantlib.calibrate"),
        ({"flavour": 3}, "QuantlibConfig must have arguments of quantlib, got 'flavour'"),
    ],
)
def test_arguments_of_other_libraries_get_the_name_of_ours(others: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        QuantlibConfig(**others)
    with pytest.raises(ValueError, match=re.escape(words.removeprefix("QuantlibConfig must have arguments"))):
        QuantlibConfig.from_dict({"quant_method": "quantlib"} | others)


def test_what_other_libraries_say_is_valid_here() -> None:
    for ours in OURS:
        if ours.startswith("spec="):
            QuantlibConfig(ours.split('"')[1])


def test_methods_of_others(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "floats")
    quantize_file(tmp_path / "floats", tmp_path / "codes", "int8")
    for method, folder, config, error, words in (
        ("nobody", "codes", None, RuntimeError, "mismatched"),  # transformers takes no other class for it
        ("gptq", "floats", QuantlibConfig("int8"), ValueError, "quantized with GPTQConfig.*QuantlibConfig"),
    ):
        source = shutil.copytree(tmp_path / folder, tmp_path / method)
        told = json.loads((source / "config.json").read_text())
        told["quantization_config"] = {**told.get("quantization_config", {}), "quant_method": method, "bits": 4}
        (source / "config.json").write_text(json.dumps(told))
        with pytest.raises(error, match=words):
            load(source, **({} if config is None else {"quantization_config": config}))
        with pytest.raises(ValueError, match=r"must hold float weights, got .*convert_file"):
            quantize_file(source, tmp_path / "out", "W4A16")
        assert not (tmp_path / "out").exists()


def test_a_base_that_is_quantized_already(tmp_path: Path) -> None:
    model = llama()
    quantlib.quantize_(model, "int8")
    before = state_of(model)
    with pytest.raises(ValueError, match=r"to quantize, got .*and 7 more: already quantized to int8:row"):
        quantlib.quantize_(model, "W4A16")
    with pytest.raises(ValueError, match=r"to prepare, got .*: already quantized to int8:row"):
        quantlib.prepare_qat_(model, "W4A16")
    for name, value in model.state_dict().items():
        assert_same_bytes(value, before[name], name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold float weights, got codes of I8 \(.*\): convert_file"):
        quantize_file(tmp_path, tmp_path.with_suffix(".out"), "W4A16")
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        again = load(tmp_path, quantization_config=QuantlibConfig("W4A16"))
    for name, value in again.state_dict().items():
        assert_same_bytes(value, before[name], name)


@pytest.mark.parametrize("spec", ["int8:tensor", "int8:tile:16"])
def test_matrices_of_experts_whose_scales_are_not_those_of_a_stack(spec: str, tmp_path: Path) -> None:
    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    model.save_pretrained(tmp_path / "floats")
    quantize_file(tmp_path / "floats", tmp_path / "codes", spec)
    with pytest.raises(ValueError, match=rf"experts.\w+ must have scales of rows or groups to .* got {spec} of each"):
        load(tmp_path / "codes")
    assert load(tmp_path / "floats", quantization_config=QuantlibConfig(spec)).hf_quantizer.report.coverage > 0.8


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_adapters_of_another_shape(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    if name == "Mixtral":
        options["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    base, other = architecture.build(), architecture.build()
    wide = type(other)(type(other.config)(**{**other.config.to_dict(), "hidden_size": 64}))
    peft.get_peft_model(wide, peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path)
    quantlib.quantize_(base, "W8A16")
    before = state_of(base)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*q_proj.lora_A.default.weight"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    found = {key.replace("base_layer.", ""): value for key, value in base.state_dict().items() if "lora" not in key}
    assert found.keys() == before.keys()
    for key, value in found.items():
        assert_same_bytes(value, before[key], key)
    with pytest.raises(ValueError, match=r"[Tt]arget (modules|parameters?) .*not found"):
        peft.get_peft_model(architecture.build(), peft.LoraConfig(target_modules=["no_such_layer"]))


REMOTE = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

class Config(PretrainedConfig):
    model_type = "of_somebody"
    def __init__(self, plain=True, **rest):
        self.plain = plain
        super().__init__(**rest)

class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(2, 6, 4))

class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.doubled, self.experts = Doubled(8, 8), Experts()
        if config.plain:
            self.plain = nn.Linear(8, 8)
        self.post_init()
"""


def test_layers_of_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "modeling_of_somebody.py").write_text(REMOTE)
    try:
        import modeling_of_somebody as remote  # type: ignore[import-not-found]

        remote.Config.register_for_auto_class()
        remote.Model.register_for_auto_class("AutoModel")
        for plain in (True, False):
            remote.Model(remote.Config(plain=plain)).save_pretrained(tmp_path / f"floats-{plain}")
    finally:
        sys.modules.pop("modeling_of_somebody", None)
    open_ = transformers.AutoModel.from_pretrained
    options = {"trust_remote_code": True, "quantization_config": QuantlibConfig("int8")}
    model = open_(tmp_path / "floats-True", **options)
    assert model.hf_quantizer.report.skipped == {
        "doubled": "Doubled, a subclass of nn.Linear, may compute something else",
        "experts.gate_up_proj": "a parameter of Experts, which is not a layer that quantlib knows",
    }
    assert model.hf_quantizer.report.coverage == pytest.approx(64 / (2 * 72 + 48))
    with pytest.raises(
        ValueError, match=r"must have a layer to quantize, got doubled: Doubled, .*; experts.gate_up_pr"
    ):
        open_(tmp_path / "floats-False", **options)
    quantize_file(tmp_path / "floats-True", tmp_path / "codes", "int8")  # names alone do not tell
    before = bytes_of(tmp_path / "codes")
    with pytest.raises(ValueError, match=r"got doubled.weight: Doubled, .* may compute .*: leave these weights out"):
        open_(tmp_path / "codes", trust_remote_code=True)
    assert bytes_of(tmp_path / "codes") == before
    quantize_file(tmp_path / "floats-True", tmp_path / "fewer", "int8", exclude=["doubled*"])
    again = open_(tmp_path / "fewer", trust_remote_code=True)
    assert_same_bytes(again.plain.weight_codes, model.plain.weight_codes)
