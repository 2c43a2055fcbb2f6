"""Work of transformers, peft and accelerate on a model that is quantized, or before it is."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.checkpoint import load_quantized
from quantlib.nn import QuantEmbedding, QuantLinear
from quantlib.testing import assert_same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SPECS = ("W8A16", "W8A8", "W4A16", "float8_e4m3fn:row", "uint8:row:affine", "bfloat16")
EVERY = (nn.Linear, nn.Embedding)
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("quiet_transformers")


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


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=ids).logits
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


def test_unmerging_from_the_floats_of_codes() -> None:
    model = adapted(quantized("W8A16"))
    model.merge_adapter()
    quantlib.dequantize_(model)
    merged = logits(model)
    model.unmerge_adapter()
    with model.disable_adapter():
        y = logits(model)
    assert (y - merged).abs().max() > 1e-3
    assert_close(logits(model), merged)


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


SHARED = ("int8:tensor", "uint8:tensor:affine", "int8:tile:16", "float8_e5m2:tensor", "int4:group:16:bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spec", [*SPECS, *SHARED])
def test_more_and_fewer_tokens_than_before(spec: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = llama(tied).to(dtype)
    quantlib.quantize_(model, spec, types=EVERY)
    head, table = model.lm_head, model.model.embed_tokens
    before = {layer: {k: v.clone() for k, v in layer.state_dict().items()} for layer in (head, table)}
    ids = IDS.clamp(max=60)  # of tokens that are always there
    y = logits(model, ids)
    for tokens in (100, 61, 96):
        model.resize_token_embeddings(tokens)
        assert model.lm_head is head
        assert model.model.embed_tokens is table
        assert head.weight.shape == table.weight.shape == (tokens, 32)
        assert head.out_features == table.num_embeddings == model.config.vocab_size == tokens
        assert (head.weight_codes is table.weight_codes) == tied
        kept = min(tokens, 96, *((61,) if tokens == 96 else ()))
        for layer, state in before.items():
            assert_same_bytes(layer.weight_codes[:kept], state["weight_codes"][:kept])
            if (scale := layer.weight_scale) is not None:
                rows = kept // layer.block[0] or 1
                assert_same_bytes(scale[:rows], state["weight_scale"][:rows])
        if tokens == 100:
            new = model.lm_head.weight[96:].float()  # the mean of the old ones, but for rounding
            assert_close(new, head.weight[:96].float().mean(0).expand(4, 32), 0.5)
    again = logits(model, ids)
    assert_same_bytes(again[..., :61], y[..., :61])
    model.save_pretrained(tmp_path)
    state = type(model).from_pretrained(tmp_path, dtype=dtype).state_dict()
    for name, value in model.state_dict().items():
        assert_same_bytes(state[name], value, name)


def test_more_tokens_where_the_output_layer_has_a_bias() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    model: Any = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    quantlib.quantize_(model, "W8A16")
    ids = IDS.clamp(max=60)
    y, head = logits(model, ids), model.lm_head
    with pytest.raises(ValueError, match=r"weight must be \[96, 32\], got \[100, 32\]"):
        head.set_weight_(torch.zeros(100, 32))
    for tokens in (100, 61):
        model.resize_token_embeddings(tokens)
        assert model.lm_head is head
        assert head.bias.shape == (tokens,)
    assert_same_bytes(logits(model, ids), y[..., :61])


@pytest.mark.parametrize("spec", ["int8:tile:8", "uint8:tile:8:affine"])
def test_new_rows_that_do_not_fit_the_scale_of_old_ones(spec: str) -> None:
    """All rows that share it are quantized anew."""
    torch.manual_seed(0)
    table = QuantEmbedding.from_float(nn.Embedding(20, 8), spec)
    before = table.weight_codes.clone(), table.weight_scale.detach().clone()
    weight = torch.cat([table.values(), 100 * torch.ones(12, 8)])
    table.set_weight_(weight)
    assert_same_bytes(table.weight_codes[:16], before[0][:16])
    assert_same_bytes(table.weight_scale[:2], before[1][:2])
    assert_close(table.values()[20:], weight[20:], 0.005)
    assert float(table.weight_scale[2]) > 10 * float(before[1][2])


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
