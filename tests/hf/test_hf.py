"""Models that transformers quantizes while it loads them, saves, and loads again."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import quantlib
import quantlib.checkpoint
from quantlib.backends.packing import wide_zero_points
from quantlib.nn import QuantModule
from quantlib.nn.experts import QuantExperts
from quantlib.ops.check import dtype_of
from quantlib.spec import QuantSpec
from quantlib.testing import assert_same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from architectures import ARCHITECTURES, difference, outputs  # noqa: E402

from quantlib.hf import QuantlibConfig  # noqa: E402

SPECS = ("W8A16", "W8A8", "W4A16", "float8_e4m3fn:row", "uint8:row:affine", "int4:group:16:affine", "bfloat16")
DTYPES = (torch.float32, torch.bfloat16)
EVERY = (nn.Linear, nn.Embedding)
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("quiet_transformers")


def llama(tied: bool = False) -> Any:
    """The same small model each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


def saved(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    llama(tied).to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, config: QuantlibConfig | None = None, **options: Any) -> Any:
    options = options if config is None else {"quantization_config": config, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS).logits
    return y


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantModule)}


@pytest.mark.parametrize("embeddings", [False, True], ids=["linear", "embeddings"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_quantized_while_loading_as_by_quantize_and_the_same_from_disk(
    spec: str, dtype: torch.dtype, tied: bool, embeddings: bool, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "floats", tied, dtype)
    include = ["lm_head"] if embeddings else []
    model = loaded(folder, QuantlibConfig(spec, embeddings=embeddings, include=include), dtype=dtype)
    names = quantized_names(model)
    assert len(names) == (16 if embeddings else 14)
    by_hand = loaded(folder, dtype=dtype)
    quantlib.quantize_(by_hand, spec, lambda module, name: name in names, types=EVERY)
    assert_same_bytes(logits(model), logits(by_hand))
    for number, source in enumerate((model, by_hand)):
        source.save_pretrained(tmp_path / str(number))
        again = loaded(tmp_path / str(number))
        assert quantized_names(again) == names
        assert again.dtype == dtype
        assert_same_bytes(logits(again), logits(model))


@pytest.mark.parametrize("spec", ["int4:group:16:affine", "uint8:row:affine"])
def test_zero_points_of_int32_as_version_2_wrote_them(spec: str, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "floats"), QuantlibConfig(spec))
    model.save_pretrained(tmp_path / "codes")
    file = tmp_path / "codes" / "model.safetensors"
    state, row, older = load_file(file), QuantSpec.parse(spec).row, 0
    for name, z in state.items():
        if name.endswith("_zero_point"):
            groups = state[name.removesuffix("zero_point") + "scale"].shape[-1]
            state[name], older = wide_zero_points(z, row, groups), older + 1
    assert older == 14
    save_file(state, file, {"format": "pt"})
    again = loaded(tmp_path / "codes")
    assert_same_bytes(logits(again), logits(model))
    assert again.model.layers[0].mlp.up_proj.weight_zero_point.dtype == dtype_of(row)


MIXTURES = ("Mixtral", "Qwen3-MoE", "DeepSeek-V3", "Llama 4", "gpt-oss")


def mixture(name: str) -> tuple[Any, Any]:
    """A small model with experts, and what its forward takes."""
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    torch.manual_seed(0)
    return architecture.build().eval(), architecture.given


@pytest.mark.parametrize("spec", ["W8A16", "W4A16", "float8_e4m3fn:row", "uint8:row:affine", "int8:tensor"])
@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_experts_quantized_while_loading_and_from_disk(name: str, spec: str, tmp_path: Path) -> None:
    model, given = mixture(name)
    model.save_pretrained(tmp_path / "floats")
    cls = type(model)
    codes = cls.from_pretrained(tmp_path / "floats", quantization_config=QuantlibConfig(spec)).eval()
    assert all(
        isinstance(m, QuantExperts) for n, m in codes.named_modules() if n.endswith("experts") and "shared" not in n
    )
    left = {n.rpartition(".")[2] for n in codes.hf_quantizer.report.skipped} - {"gate_up_proj_bias", "down_proj_bias"}
    assert left <= {"embed_tokens", "lm_head", "gate", "router"}
    codes.save_pretrained(tmp_path / "codes")
    again = cls.from_pretrained(tmp_path / "codes").eval()
    y = codes(**given).logits
    assert_same_bytes(again(**given).logits, y)
    floats = again.dequantize()
    assert not hasattr(floats, "hf_quantizer")
    want = floats(**given).logits
    assert float((y - want).abs().max() / want.abs().max()) < 1e-5
    if name == "Mixtral" and spec != "int8:tensor":  # as the hub has them: a matrix an expert
        with safe_open(tmp_path / "codes" / "model.safetensors", "pt") as file:
            assert "model.layers.0.block_sparse_moe.experts.0.w1.weight_scale" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("spec", ["W8A16", "W8A8", "W4A16"])
@pytest.mark.parametrize("name", ["Llama, tied", "Gemma 2", "T5", "BERT", "ViT", "Mixtral", "Qwen3-MoE", "DeepSeek-V3"])
@torch.no_grad()
def test_a_folder_that_the_command_line_wrote(name: str, spec: str, tmp_path: Path) -> None:
    model, given = mixture(name)
    model.save_pretrained(tmp_path / "floats")
    report = quantlib.checkpoint.quantize_file(tmp_path / "floats", tmp_path / "codes", spec)
    codes = type(model).from_pretrained(tmp_path / "codes").eval()
    stacks = sum(
        stack.E * stack.N * stack.K
        for m in codes.modules()
        if isinstance(m, QuantExperts)
        for stack in m.stacks.values()
    )
    layers = sum(m.weight.numel() for m in codes.modules() if isinstance(m, QuantModule))
    assert stacks + layers == report.quantized
    quantlib.checkpoint.dequantize_file(tmp_path / "codes", tmp_path / "values")
    floats = type(model).from_pretrained(tmp_path / "values").eval()
    y, want = (outputs(m, given) for m in (codes, floats))
    assert difference(y, want) < (0.05 if spec == "W8A8" else 1e-5)


WITHOUT = """
import sys, torch, transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


@pytest.mark.parametrize("spec", ["W8A16", "W4A16"])
def test_without_quantlib_it_does_not_load(spec: str, tmp_path: Path) -> None:
    loaded(saved(tmp_path / "floats"), QuantlibConfig(spec)).save_pretrained(tmp_path / "codes")
    done = fresh.run(["-c", WITHOUT, tmp_path / "codes"])
    assert done.returncode != 0
    assert "quantlib" in done.stderr
    assert "mismatch" in done.stderr


@pytest.mark.parametrize("spec", ["W8A16", "W4A16", "float8_e4m3fn:row"])
def test_offloaded_to_disk(spec: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "floats")
    model = loaded(folder, QuantlibConfig(spec))
    model.save_pretrained(tmp_path / "codes")
    y = logits(model)
    on_cpu = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    options = {"device_map": {**dict.fromkeys(on_cpu, "cpu"), "model.layers.1": "disk"}}
    assert_same_bytes(logits(loaded(tmp_path / "codes", **options, offload_folder=tmp_path / "a")), y)
    model = loaded(folder, QuantlibConfig(spec), **options, offload_folder=tmp_path / "b")
    assert_same_bytes(logits(model), y)
    model.save_pretrained(tmp_path / "again")  # which reads the codes of the offloaded layer from disk
    assert_same_bytes(logits(loaded(tmp_path / "again")), y)
    assert_same_bytes(logits(loaded(tmp_path / "codes", device_map="auto")), y)


def test_what_is_skipped_and_what_is_included(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = loaded(folder, QuantlibConfig("int8", skip=["*.q_proj", "model.layers.1.*"], include=["lm_head"]))
    assert quantized_names(model) == {"lm_head"} | {
        f"model.layers.0.{name}"
        for name in (
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
    }
    assert model.hf_quantizer.report.skipped["model.layers.1.mlp.up_proj"] == "matches model.layers.1.*"


def test_a_pattern_that_names_no_module_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = QuantlibConfig("int8", skip=["q_proj", "model.layers.0.*"], include=["lm_haed", "model.embed_tokens"])
    with caplog.at_level("WARNING", "quantlib"):
        loaded(saved(tmp_path), config)
    told = [record.getMessage() for record in caplog.records if "no module matches" in record.getMessage()]
    assert told == [
        "no module matches skip q_proj; '*.q_proj' is every module of that name",
        "no module matches include lm_haed; '*.lm_haed' is every module of that name",
    ]


def test_a_loaded_model_is_used_as_any_other(tmp_path: Path) -> None:
    folder = saved(tmp_path / "floats")
    model = loaded(folder, QuantlibConfig("W4A16"))
    text = model.generate(IDS, max_new_tokens=5, do_sample=False)
    again = copy.deepcopy(model)
    assert torch.equal(again.generate(IDS, max_new_tokens=5, do_sample=False), text)
    model.gradient_checkpointing_enable()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    model.eval().save_pretrained(tmp_path / "sharded", max_shard_size="5KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_same_bytes(logits(loaded(tmp_path / "sharded")), logits(model))
    floats = model.dequantize()
    assert not quantized_names(floats)
    floats.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert_same_bytes(logits(loaded(tmp_path / "again")), logits(floats))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "int3"}, "spec must"),
        ({"spec": "int8@int8:tensor:static"}, "static ones come from prepare_qat_"),
        ({"skip": "lm_head"}, "skip must be a sequence of patterns, got the string 'lm_head'"),
        ({"version": 99}, "version must be an integer of at most 1, got 99: a later quantlib wrote it"),
        ({"quant_method": "gptq"}, "quant_method must be 'quantlib', got 'gptq'"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be raise or propagate, got 'ignore'"),
        ({"bits": 4}, "must have arguments of quantlib, got 'bits', which is spec="),
    ],
)
def test_configs_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        QuantlibConfig(**options)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "floats")
    with pytest.raises(ValueError, match="model must have a layer to quantize"):
        loaded(folder, QuantlibConfig("int8", skip=["*"]))
    loaded(folder, QuantlibConfig("int8")).save_pretrained(tmp_path / "codes")
    config = json.loads((tmp_path / "codes" / "config.json").read_text())

    def written(name: str, weights: dict[str, Any]) -> Path:
        (out := tmp_path / name).mkdir()
        shutil.copy(tmp_path / "codes" / "model.safetensors", out)
        entry = config["quantization_config"] | {"weights": weights}
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
        return out

    weights = config["quantization_config"]["weights"]
    with pytest.raises(ValueError, match="got no such weight"):
        loaded(
            written("more", weights | {"model.layers.7.mlp.up_proj.weight": {"spec": "int8:row", "shape": [48, 32]}})
        )
    with pytest.raises(ValueError, match="must describe its weights by spec and shape"):
        loaded(written("wrong", {"model.layers.0.mlp.up_proj.weight": {"spec": "int8:row"}}))
    with safe_open(tmp_path / "codes" / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del state["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(state, tmp_path / "codes" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"got no model.layers.0.mlp.up_proj.weight_scale"):
        loaded(tmp_path / "codes")
