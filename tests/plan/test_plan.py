"""The contents of a plan: rules of thumb, bytes by hand, cache, compute, verdicts, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlib.plan import Plan, plan
from quantlib.plan import cache as caches
from quantlib.plan.compute import PETAFLOP_DAY, besiroglu, hoffmann, kaplan
from quantlib.plan.devices import DEVICES, device_of
from quantlib.plan.lines import amount
from quantlib.plan.parameters import count, kind_of
from quantlib.spec import QuantSpec

CONFIGS = Path(__file__).parent / "configs"
GB = 10**9


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return found


def value(found: Plan, section: str, line: str) -> float:
    return found[section][line].value


def test_a_billion_parameters() -> None:
    found = plan(params=1e9, to=["int8", "int4:group:32"], train="full")
    assert value(found, "weights", "float32") == 4 * GB
    assert value(found, "weights", "float16") == value(found, "weights", "bfloat16") == 2 * GB
    assert value(found, "weights", "int8:row") == 1 * GB
    assert value(found, "weights", "int4:group:32") == GB // 2 + GB // 32 * 4
    training = found["training, full"]
    assert training["in all"].value == 16 * GB + 4  # and the counter of AdamW
    assert training["rule of thumb"].value == 24 * GB
    assert training["rule of thumb"].parts == {
        "weights": 4 * GB,
        "gradients": 4 * GB,
        "optimizer": 8 * GB,
        "activations and temporaries": 8 * GB,
    }


def test_optimizers_and_precision_of_a_billion() -> None:
    def total(**options: Any) -> float:
        return value(plan(params=1e9, train="full", **options), "training, full", "in all")

    assert total(precision="bfloat16") == (2 + 2 + 4) * GB + 4
    assert total(optimizer="sgd") == 8 * GB
    assert total(optimizer="adamw8bit") == 8 * GB + 2 * (GB + GB * 4 / 128) + 4


def test_shards_of_a_billion() -> None:
    found = plan(params=1e9, train="full", gpus=8, parallel="zero3")["training, full"]
    assert found["weights"].value == found["gradients"].value == GB / 2
    assert found["optimizer"].value == pytest.approx(GB, abs=8)
    copies = plan(params=1e9, train="full", gpus=8)["training, full"]
    assert copies["weights"].value == 4 * GB
    assert copies["buckets"].value == 4 * GB


# Parameters by hand: [vocabulary, hidden] tables, and for each layer q, k, v, o, the MLP and the norms.
LLAMA_LAYER = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336
LLAMA_ROWS = 4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096
T5_ATTENTION, T5_MLP = 4 * 2048 * 2048, 3 * 2048 * 5120
MIXTRAL_ATTENTION, MIXTRAL_EXPERT = 2 * 4096 * 4096 + 2 * 1024 * 4096, 3 * 4096 * 14336


@pytest.fixture(scope="module")
def llama() -> Plan:
    pytest.importorskip("transformers")
    return plan(
        CONFIGS / "llama-3-8b.json", to=["W8A16", "int4:group:128"], context=8192, device="H100", activations=False
    )


def test_a_dense_8b_by_hand(llama: Plan) -> None:
    table, norms = 128256 * 4096, 65 * 4096
    assert value(llama, "parameters", "all") == 8_030_261_248 == 2 * table + 32 * LLAMA_LAYER + norms
    assert value(llama, "parameters", "attention") == 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    assert value(llama, "parameters", "MLP") == 32 * 3 * 4096 * 14336
    assert value(llama, "parameters", "multiplied a token") == 8_030_261_248 - table
    quantized = 32 * LLAMA_LAYER + table
    assert llama["weights"]["int8:row (93.5%)"].parts == {
        "codes": quantized,
        "scales": 4 * (32 * LLAMA_ROWS + 128256),
        "zero points": 0,
        "floats": 2 * (table + norms),
    }
    assert llama["weights"]["int4:group:128 (93.5%)"].parts == {
        "codes": quantized // 2,
        "scales": 4 * (quantized // 128),
        "zero points": 0,
        "floats": 2 * (table + norms),
    }
    assert value(llama, "weights", "as stored") == 2 * 8_030_261_248


def test_the_cache_of_grouped_queries(llama: Plan) -> None:
    token = 2 * 8 * 128 * 32
    assert value(llama, "cache", "a token, 16 bits") == 2 * token == 131072
    assert value(llama, "cache", "1 x 8,192 tokens, 16 bits") == 8192 * 2 * token == 2**30
    assert value(llama, "cache", "1 x 8,192 tokens, 8 bits") == 8192 * (token + 4 * 2 * 8 * 32)


def test_decoding_reads_what_a_token_meets(llama: Plan) -> None:
    read = 2 * (8_030_261_248 - 128256 * 4096) + 2**30
    assert value(llama, "compute", "decoding, as stored") == pytest.approx(3.35e12 / read)
    parts = llama["weights"]["int8:row (93.5%)"].parts
    read = parts["codes"] + parts["scales"] + 2 * 65 * 4096 + 2**30
    assert value(llama, "compute", "decoding, int8:row") == pytest.approx(3.35e12 / read)


def test_flan_t5_xl_by_hand() -> None:
    pytest.importorskip("transformers")
    found = plan(CONFIGS / "flan-t5-xl.json", to=["W8A16"], context=16, activations=False)
    table, buckets, norms = 32128 * 2048, 2 * 32 * 32, (24 * 2 + 24 * 3 + 2) * 2048
    linear = 24 * (T5_ATTENTION + T5_MLP) + 24 * (2 * T5_ATTENTION + T5_MLP)
    tied = value(found, "parameters", "all") == table + linear + buckets + norms
    head = 0 if tied else table  # transformers 5 shares the table, as the checkpoint's own code did not
    assert value(found, "parameters", "all") == table + head + linear + buckets + norms
    rows = 24 * (3 * 4 * 2048 + 2 * (2 * 5120 + 2048)) + (0 if tied else 32128)
    name = next(line.name for line in found["weights"].lines if line.name.startswith("int8"))
    assert found["weights"][name].parts == {
        "codes": linear + head,
        "scales": 4 * rows,
        "zero points": 0,
        "floats": 4 * (table + buckets + norms),
    }
    # keys and values of 32 heads of 64, of the decoder itself and of what the encoder has read
    assert value(found, "cache", "1 x 16 tokens, 16 bits") == 2 * 16 * 24 * 2 * (2 * 32 * 64)
    assert value(found, "cache", "a token, 16 bits") == 2 * 24 * 2 * 32 * 64


def test_a_mixture_of_experts_by_hand() -> None:
    pytest.importorskip("transformers")
    found = plan(CONFIGS / "mixtral-8x7b.json", to=["W4A16"], context=16, activations=False)
    table, norms, router = 32000 * 4096, 65 * 4096, 8 * 4096
    total = 2 * table + norms + 32 * (MIXTRAL_ATTENTION + router + 8 * MIXTRAL_EXPERT)
    assert value(found, "parameters", "all") == total == 46_702_792_704
    assert value(found, "parameters", "experts") == 32 * 8 * MIXTRAL_EXPERT
    assert value(found, "parameters", "router") == 32 * router
    assert value(found, "parameters", "active a token") == total - 32 * 6 * MIXTRAL_EXPERT == 12_879_925_248
    quantized = table + 32 * (MIXTRAL_ATTENTION + 8 * MIXTRAL_EXPERT)
    spec = QuantSpec.parse("W4A16")
    name = next(line.name for line in found["weights"].lines if line.name.startswith(str(spec)))
    matrices = [(32000, 4096), *([(4096, 4096)] * 2 + [(1024, 4096)] * 2) * 32]
    matrices += [(2 * 14336, 4096), (4096, 14336)] * 8 * 32
    assert sum(rows * columns for rows, columns in matrices) == quantized
    parts = found["weights"][name].parts
    assert parts["codes"] + parts["scales"] + parts["zero points"] == sum(map(spec.nbytes, matrices))
    assert parts["floats"] == 2 * (table + norms + 32 * router)


@pytest.mark.parametrize(
    ("told", "elements", "kept"),
    [
        pytest.param({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 4 * 576, 4 * 576 * 100, id="latent"),
        pytest.param({"num_key_value_heads": 2}, 4 * 4 * 16, 4 * 4 * 16 * 100, id="grouped"),
        pytest.param({"head_dim": 32}, 4 * 16 * 32, 4 * 16 * 32 * 100, id="wide heads"),
        pytest.param({"multi_query": True}, 4 * 2 * 16, 4 * 2 * 16 * 100, id="one head of keys"),
        pytest.param({"sliding_window": 10}, 0, 4 * 16 * 16 * 10, id="window"),
        pytest.param({"sliding_window": 1000}, 0, 4 * 16 * 16 * 100, id="window beyond the context"),
        pytest.param(
            {"sliding_window": 10, "sliding_window_pattern": 2},
            2 * 256,
            2 * 256 * 100 + 2 * 256 * 10,
            id="every second",
        ),
        pytest.param(
            {"sliding_window": 10, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
            256,
            256 * 100 + 3 * 256 * 10,
            id="layer types",
        ),
        pytest.param({"sliding_window": 10, "use_sliding_window": False}, 4 * 256, 4 * 256 * 100, id="window unused"),
        pytest.param(
            {
                "layer_types": ["linear_attention"] * 3 + ["full_attention"],
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_conv_kernel_dim": 4,
            },
            256,
            256 * 100 + 3 * (4 * 8 * 8 + (2 * 2 * 8 + 4 * 8) * 4),
            id="states",
        ),
    ],
)
def test_what_layers_keep(told: dict[str, Any], elements: int, kept: int) -> None:
    base = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 128}
    layers = caches.layers_of({**base, **told}, 100)
    assert layers is not None
    assert sum(layer.a_token for layer in layers) == elements
    assert sum(layer.nbytes(torch.bfloat16) for layer in layers) == 2 * kept


def test_no_cache_without_a_decoder() -> None:
    assert caches.layers_of({"hidden_size": 8}, 10) is None
    assert caches.layers_of(config("llama-3-8b") | {"architectures": ["BertForMaskedLM"]}, 10) is None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("shared.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("encoder.block.0.layer.0.SelfAttention.o.weight", "attention"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
        ("bert.encoder.layer.0.output.dense.weight", "MLP"),
        ("model.layers.0.mlp.gate_proj.weight", "MLP"),
        ("decoder.block.0.layer.2.DenseReluDense.wo.weight", "MLP"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", "experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "MLP"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.norm.weight", "norm"),
        ("lm_head.weight", "head"),
        ("base.layers.0.q_proj.lora_A.default.weight", "adapter"),
        ("something.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name, (4, 4)) == kind


def test_a_tied_head_is_multiplied_by() -> None:
    shapes = {"wte.weight": (100, 8), "h.0.attn.c_attn.weight": (24, 8)}
    found = count(shapes, {"vocab_size": 100, "architectures": ["GPT2LMHeadModel"]})
    assert (found.total, found.multiplied) == (800 + 192, 192 + 800)
    assert count(shapes, {"vocab_size": 100, "architectures": ["GPT2Model"]}).multiplied == 192


def test_compute() -> None:
    found = plan(params=1e9, device="A100", gpus=2, tokens=1e9, utilization=0.5)["compute"]
    assert found["training"].value == 6e18
    assert found["training in time"].value == 6e18 / PETAFLOP_DAY
    assert PETAFLOP_DAY == 8.64e19
    assert found["days"].value == pytest.approx(6e18 / (2 * 312e12 * 0.5) / 86400)
    assert found["devices of a petaflop/s"].value == pytest.approx(3.205, abs=1e-3)
    assert found["20 tokens a parameter"].value == 20e9


def test_published_estimates() -> None:
    # Kaplan et al. 2020, table 6; Hoffmann et al. 2022, tables 3 and A3
    assert kaplan(1.3e9) == pytest.approx(2e10)
    assert hoffmann(1e9) / 1e9 == pytest.approx(44, abs=1)
    for N in (1e8, 1e10):  # where the two terms of the loss have their least sum at this C
        D = besiroglu(N)
        loss = [482.01 / (N * s) ** 0.3478 + 2085.43 / (D / s) ** 0.3658 for s in (0.99, 1, 1.01)]
        assert min(loss) == loss[1]


def test_devices() -> None:
    assert device_of("h100").memory == DEVICES["H100"].memory
    assert device_of("24GB").memory == 24 * GB
    assert device_of("80 GiB").memory == 80 << 30
    assert device_of("1.5e10").memory == 15 * GB
    for text in ("X100", "-3", "0", "GB", ""):
        with pytest.raises(ValueError, match=r"^device must be B200, .* or a number of bytes .*, got "):
            device_of(text)


def test_verdicts(llama: Plan) -> None:
    assert "as stored: fits H100, 17.13 GB of 84.98 GB" in llama.fits
    small = plan(CONFIGS / "llama-3-8b.json", to=["W8A16"], device="8GB", context=512, activations=False)
    assert small.fits[0].startswith("as stored: does not fit 8GB")
    assert small.fits[-1].startswith(f"fits 8GB with {QuantSpec.parse('W4A16')}: ")
    tiny = plan(CONFIGS / "llama-3-8b.json", to=["W8A16"], device="2GB", context=16, activations=False)
    assert tiny.fits[-1].startswith("fits 3 x 2GB at the least, split: weights alone ")


def test_a_fit_of_training_is_found() -> None:
    model = tiny_model()
    whole = plan(model, train="full", context=64, batch=4)
    need = next(s for s in whole.sections if s.title.startswith("training"))["in all"].value
    assert plan(model, train="full", context=64, batch=4, device=f"{need:.0f}").fits[-1].startswith("training: fits")
    found = plan(model, train="full", context=64, batch=4, device=f"{need - 1:.0f}").fits
    assert found[-2].startswith("training: does not fit")
    assert " with checkpointing: " in found[-1]


def tiny_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    told = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**told, num_hidden_layers=4))
    return model


def test_a_module_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    found = plan(model, to=["W8A16"], train="full", inputs={"input": torch.empty(16, 64)})
    assert not found.missing
    assert value(found, "parameters", "all") == 64 * 32 + 32 + 32 * 8 + 8
    assert found["inference, 1 x 2,048 tokens"]["as stored"].parts["activations"] == 4 * 16 * (32 + 32)
    without = plan(model, to=["W8A16"])
    why = "inputs must be given for a model whose forward takes neither input_ids nor images, got input"
    assert without.missing == [f"activations of forward: {why}"]
    assert model[0].weight.device.type == "cpu"


def test_it_prints_and_explains() -> None:
    found = plan(params=1e9, train="full", device="RTX4090")
    lines = str(found).splitlines()
    assert lines[0] == "1,000,000,000 parameters"
    assert any(line.split() == ["float32", "4.000", "GB"] for line in lines)
    explained = found.text(explain=True)
    for section in found.sections:
        for line in section.lines:
            assert line.formula
            assert line.formula in explained
    assert json.loads(json.dumps(found.as_dict()))["sections"][1]["lines"][0]["value"] == 4 * GB
    with pytest.raises(KeyError, match=r"the plan has parameters, weights"):
        found["colours"]
    with pytest.raises(KeyError, match=r"weights has float32"):
        found["weights"]["float31"]


@pytest.mark.parametrize(
    ("n", "unit", "text"),
    [
        (4e9, "bytes", "4.000 GB"),
        (1, "bytes", "1 B"),
        (999, "bytes", "999 B"),
        (8.03e9, "parameters", "8.030 G"),
        (20e9, "tokens", "20.000 G tokens"),
        (6e18, "FLOP", "6.000e+18 FLOP"),
        (3.2051, "", "3.21"),
    ],
)
def test_amounts(n: float, unit: str, text: str) -> None:
    assert amount(n, unit) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model or params must be given, and not both, got None and None"),
        ({"model": "x", "params": 1e9}, "model or params must be given, and not both, got 'x' and 1000000000.0"),
        ({"params": -1}, "params must be a whole number >= 1, such as 1e9, got -1"),
        ({"params": 1.5}, "params must be a whole number >= 1, such as 1e9, got 1.5"),
        ({"params": 1e9, "context": 0}, "context must be a whole number >= 1, got 0"),
        ({"params": 1e9, "batch": True}, "batch must be a whole number >= 1, got True"),
        ({"params": 1e9, "train": "half"}, "train must be one of full, lora, qat, got 'half'"),
        ({"params": 1e9, "precision": "int8"}, "precision must be one of float32, bfloat16, autocast, got 'int8'"),
        ({"params": 1e9, "optimizer": "lion"}, "optimizer must be one of adamw, adamw8bit, sgd, got 'lion'"),
        ({"params": 1e9, "gpus": 0}, "gpus must be a whole number >= 1, got 0"),
        ({"params": 1e9, "gpus": 4, "parallel": "zero4"}, "parallel must be one of ddp, .*, got 'zero4'"),
        ({"params": 1e9, "gpus": 4, "parallel": "tp:0"}, "parallel must be one of ddp, .*, got 'tp:0'"),
        ({"params": 1e9, "gpus": 4, "parallel": "tp:3"}, "parallel must split 4 devices evenly, got 'tp:3'"),
        ({"params": 1e9, "parallel": "ddp,zero1"}, "parallel must name one of ddp, .*, got 'ddp,zero1'"),
        ({"params": 1e9, "tokens": 0.5}, "tokens must be a whole number >= 1, such as 1e9, got 0.5"),
        ({"params": 1e9, "utilization": 1.5}, "utilization must be above 0 and at most 1, got 1.5"),
        ({"params": 1e9, "to": ["int9"]}, "spec must be .*, got 'int9'"),
        ({"params": 1e9, "to": [], "train": "lora"}, "to must name a format to train lora with, got none"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        plan(options.pop("model", None), **options)


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^model must be an nn.Module or a path, got int$"):
        plan(3)
    with pytest.raises(FileNotFoundError, match=r"^model must be a folder, .*, not there$"):
        plan(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"^model must have a config.json or safetensors files, got a folder"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"must be a JSON object, got list$"):
        plan(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"must be JSON, got "):
        plan(tmp_path)


def test_an_unknown_architecture_without_files(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "nobody", "hidden_size": 8}')
    with pytest.raises(ValueError, match=r"must be a model that transformers builds, .* model_type 'nobody'$"):
        plan(tmp_path)


def test_stages_and_heads_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match=r"^parallel must have at most 4 stages, the layers of the model, got pp:8$"):
        plan(tiny_model(), train="full", gpus=8, parallel="pp:8", context=8)
    with pytest.raises(ValueError, match=r"^parallel must divide 4 attention heads, got tp:3$"):
        plan(tiny_model(), train="full", gpus=3, parallel="tp:3", context=8)
