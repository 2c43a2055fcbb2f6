"""Work of transformers, peft and accelerate on a model that is quantized, or before it is."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.checkpoint import load_quantized
from quantlib.nn import QuantLinear
from quantlib.testing import assert_same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SPECS = ("W8A16", "W8A8", "W4A16", "float8_e4m3fn:row", "uint8:row:affine", "bfloat16")
EVERY = (nn.Linear, nn.Embedding)
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def llama(tied: bool = False) -> nn.Module:
    """The same small model each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def quantized(spec: str, tied: bool = False, types: Any = (nn.Linear,)) -> nn.Module:
    model = llama(tied)
    quantlib.quantize_(model, spec, types=types)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS).logits
    return y


def assert_close(got: Tensor, want: Tensor, limit: float = 1e-5) -> None:
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= limit, error


def trained(model: nn.Module, steps: int = 5) -> list[float]:
    """The losses of a few steps of whatever requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# ---- peft -----------------------------------------------------------------------------------------------------------


def adapted(model: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def names_that_train(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_layers_that_lie_the_other_way_are_named_and_quantized_where_types_names_them() -> None:
    sizes = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    with pytest.raises(ValueError, match=r"c_attn and 7 more: Conv1D, like an nn.Linear, which types= does not name"):
        quantlib.quantize_(model, "int8")
    report = quantlib.quantize_(model, "int8", types=[nn.Embedding])
    assert report.skipped["transformer.h.0.attn.c_attn"] == "Conv1D, like an nn.Linear, which types= does not name"
    report = quantlib.quantize_(model, "int8", types=[transformers.pytorch_utils.Conv1D])
    assert len(report.layers) == 8
    assert min(layer.snr_db for layer in report.layers) > 35
    layer = model.transformer.h[0].attn.c_attn
    assert layer.weight.shape == (32, 96)  # as the float layer has it
    assert layer.weight_codes.shape == (96, 32)
    x = torch.randn(3, 32)
    assert_close(layer(x), x @ layer.dequantize().weight + layer.bias)


@pytest.mark.parametrize("spec", SPECS)
def test_lora_over_codes_trains_and_leaves_them_alone(spec: str) -> None:
    model = quantized(spec)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    model = adapted(model)
    assert names_that_train(model)
    assert all("lora_" in name for name in names_that_train(model))
    losses = trained(model)
    assert losses[-1] < losses[0]
    for name, layer in layers.items():
        for key, value in layer.state_dict().items():
            assert_same_bytes(value, before[name][key], f"{name}.{key}")


@pytest.mark.parametrize("spec", SPECS)
def test_quantizing_under_adapters_keeps_them_trainable_floats(spec: str) -> None:
    model = adapted(llama())
    report = quantlib.quantize_(model, spec)
    assert all("lora_" not in layer.name for layer in report.layers)
    assert any(layer.name.endswith("q_proj.base_layer") for layer in report.layers)
    assert any("lora_" in name and "adapter" in why for name, why in report.skipped.items())
    assert names_that_train(model)
    assert all("lora_" in name for name in names_that_train(model))
    losses = trained(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "W8A8"])
def test_dora_takes_the_norms_of_the_weight(spec: str) -> None:
    """DoRA takes the norms of the values, not of the codes, which are hundreds of times as large."""
    model = quantized(spec)
    plain = copy.deepcopy(model)
    quantlib.dequantize_(plain)
    model, plain = adapted(model, use_dora=True), adapted(plain, use_dora=True)
    assert_close(logits(model), logits(plain))
    parameters = dict(plain.named_parameters())
    norms = {name: norm for name, norm in model.named_parameters() if "magnitude" in name}
    assert norms
    for name, norm in norms.items():
        assert_close(norm, parameters[name])


@pytest.mark.parametrize("spec", ["W8A16", "W4A16", "float8_e4m3fn:row"])
def test_merging_into_the_floats_of_codes(spec: str) -> None:
    model = adapted(quantized(spec))
    y = logits(model)
    quantlib.dequantize_(model)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert_close(logits(merged), y)


def test_the_trainer_trains_adapters(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = adapted(quantized("W4A16"))
    before = copy.deepcopy({name: p for name, p in model.named_parameters() if p.requires_grad})
    given = [{"input_ids": row, "labels": row} for row in IDS]
    options = {"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path), **options)
    transformers.Trainer(model=model, args=arguments, train_dataset=given).train()
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(after) == list(before)
    assert any(not torch.equal(after[name], before[name]) for name in after)


# ---- accelerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_offloaded_codes_give_the_same_bytes(spec: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = quantized(spec)
    y = logits(model)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert_same_bytes(logits(offloaded), y)
    offloaded = accelerate.disk_offload(copy.deepcopy(model), str(tmp_path), execution_device="cpu")
    assert_same_bytes(logits(offloaded), y)


@pytest.mark.parametrize("spec", SPECS)
def test_a_dispatched_model_is_quantized(spec: str) -> None:
    """accelerate has replaced the forward of every layer by then."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    y = logits(quantized(spec))
    model = llama()
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    report = quantlib.quantize_(model, spec)
    assert len(report.layers) == 15
    assert_same_bytes(logits(model), y)
    assert all(hasattr(layer, "_hf_hook") for layer in model.modules() if isinstance(layer, QuantLinear))


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_saved_by_transformers_and_loaded_again(spec: str, tmp_path: Path) -> None:
    model = quantized(spec, types=EVERY)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = llama()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    load_quantized(again, tmp_path)
    assert_same_bytes(logits(again), logits(model))


@pytest.mark.parametrize("spec", SPECS)
def test_more_tokens_than_before(spec: str) -> None:
    model = quantized(spec)
    y = logits(model)
    model.resize_token_embeddings(100)  # type: ignore[operator]
    again = logits(model)
    assert again.shape[-1] == 100
    assert_close(again[..., :96], y, 0.02 if spec == "W8A8" else 1e-5)  # the head is a float one from here on


@pytest.mark.parametrize("spec", SPECS)
def test_more_tokens_where_the_head_has_the_codes_of_the_embedding(spec: str) -> None:
    model = quantized(spec, tied=True, types=EVERY)
    y = logits(model)
    model.resize_token_embeddings(100)  # type: ignore[operator]
    again = logits(model)
    assert again.shape[-1] == 100
    assert_close(again[..., :96], y, 0.02 if spec == "W8A8" else 1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_ties_and_weights_that_are_initialized_again(spec: str) -> None:
    model = quantized(spec, tied=True, types=EVERY)
    y = logits(model)
    model.tie_weights()  # type: ignore[operator]
    model.init_weights()  # type: ignore[operator]
    assert_same_bytes(logits(model), y)


@pytest.mark.parametrize("types", [(nn.Linear,), EVERY], ids=["linear", "every"])
@pytest.mark.parametrize("spec", SPECS)
def test_all_parameters_are_asked_for_a_gradient(spec: str, types: Any) -> None:
    model = quantized(spec, types=types)
    model.requires_grad_(True)
    assert not any("codes" in name or "zero_point" in name for name in names_that_train(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.requires_grad_(False)
    assert names_that_train(model) == []


@pytest.mark.parametrize("spec", SPECS)
def test_the_dtype_of_a_model_is_the_one_it_computes_in(spec: str) -> None:
    model = quantized(spec, types=EVERY)
    assert model.dtype == torch.float32
    assert model.bfloat16().dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def test_an_input_by_name() -> None:
    layer, x = quantized("W8A16").model.layers[0].mlp.up_proj, torch.randn(3, 32)
    assert_same_bytes(layer(input=x), layer(x))
