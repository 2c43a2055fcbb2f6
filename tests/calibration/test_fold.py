"""Scaled channels: the model computes what it did, and what is quantized loses less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.calibration.fold import PATTERNS, VALUES, channels_of, fold_, pairs_of, sinkhorn
from quantlib.calibration.stages import Call
from quantlib.spec import QuantSpec

transformers = pytest.importorskip("transformers", reason="a Llama of transformers: not installed")


def llama() -> Any:
    """Make a model with a few channels of large activations and small weights, as large models have."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        for layer in model.model.layers:
            for norm, after in (
                (layer.input_layernorm, (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                (layer.post_attention_layernorm, (layer.mlp.gate_proj, layer.mlp.up_proj)),
            ):
                norm.weight.div_(3)
                norm.weight[::13] *= 40
                for linear in after:
                    linear.weight[:, ::13] /= 40
    return model


def tokens() -> list[Tensor]:
    return list(torch.randint(64, (6, 1, 32), generator=torch.Generator().manual_seed(1)))


def but_the_head(module: nn.Module, name: str) -> bool:
    return name != "lm_head"


def loss(model: nn.Module, float_model: nn.Module) -> float:
    windows = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(2))
    return quantlib.evaluate(model, float_model, windows).kl.mean


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("smoothquant", "W8A8"),
        ("smoothquant+gptq", "W8A8"),
        ("awq", "int4:group:32"),
        ("awq+gptq", "int4:group:32"),
    ],
)
def test_less_is_lost(method: str, spec: str) -> None:
    float_model = llama()
    model, plain = copy.deepcopy(float_model), copy.deepcopy(float_model)
    report = quantlib.calibrate(model, tokens(), spec, method, filter_fn=but_the_head)
    quantlib.quantize_(plain, spec, but_the_head)
    assert loss(model, float_model) < 0.7 * loss(plain, float_model)
    scaled = {name.split(".", 3)[3] for name in report.scaled}
    assert scaled == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    }  # fmt: skip
    assert len(report.report.layers) == 14
    assert (len(report.layers), len(report.data_free)) == ((14, 0) if "gptq" in method else (0, 14))


class Tapped(nn.Module):
    """A model that reads the norm's output elsewhere too: scaling it would change what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()
        self.seen: list[Tensor] = []
        self.inner.model.layers[0].input_layernorm.register_forward_hook(lambda m, a, y: self.seen.append(y))

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids, use_cache=False).logits
        return logits + self.seen.pop().mean(-1, keepdim=True).abs().log()


def test_a_model_that_would_compute_something_else_is_put_back_and_refused() -> None:
    model, ids = Tapped().eval(), tokens()
    with torch.no_grad():
        before = model(ids[0])
    with pytest.raises(ValueError, match="model must compute the same once smoothquant has scaled its channels"):
        quantlib.calibrate(model, ids, "W8A8", "smoothquant", filter_fn=lambda m, n: "lm_head" not in n)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[0]), before, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, quantlib.nn.QuantLinear) for m in model.modules())


def test_a_model_with_other_names_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    with pytest.raises(ValueError, match="model must have norms and layers named as those of Llama for awq, got none"):
        quantlib.calibrate(model, [torch.randn(4, 16)], "int4:group:16", "awq")


def grouped() -> Any:
    """A Llama whose heads share keys and values, with spreads that differ by columns, and in the values by heads."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
        for layer in model.model.layers:
            gain = torch.logspace(-1, 1, 32)[torch.randperm(32)]
            layer.self_attn.v_proj.weight.mul_(gain[:, None])
            layer.self_attn.o_proj.weight.div_(gain.view(2, 1, 16).expand(2, 2, 16).flatten())
            gain = torch.logspace(-1, 1, 96)[torch.randperm(96)]
            layer.mlp.up_proj.weight.mul_(gain[:, None])
            layer.mlp.down_proj.weight.div_(gain)
    return model


@pytest.mark.parametrize("inputs", [None, tokens()])
def test_equal_spreads_need_no_inputs(inputs: list[Tensor] | None) -> None:
    float_model = grouped()
    model, plain = copy.deepcopy(float_model), copy.deepcopy(float_model)
    report = quantlib.calibrate(model, inputs, "int4:group:32", "sinkhorn", filter_fn=but_the_head)
    quantlib.quantize_(plain, "int4:group:32", but_the_head)
    assert loss(model, float_model) < 0.5 * loss(plain, float_model)
    assert len(report.scaled) == len(report.data_free) == 14  # o_proj too
    assert {n: str(m) for n, m in model.named_modules()} == {n: str(m) for n, m in plain.named_modules()}


def test_a_scaled_model_computes_what_it_did() -> None:
    float_model = grouped()
    model = copy.deepcopy(float_model)
    specs = {name: QuantSpec.parse("int8") for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    ids = tokens()[0]
    assert len(fold_(model, [Call((ids,))], specs, "sinkhorn")) == 14
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, float_model(ids).logits, rtol=1e-4, atol=1e-4)
    for pair in pairs_of(model, specs, (*PATTERNS, *VALUES)).values():
        assert float((sinkhorn(pair) - 1).abs().max()) < 0.5  # nearly balanced: what is left, later pairs brought


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel"])
def test_the_values_of_an_encoder(name: str) -> None:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = kind(kind.config_class(**sizes, intermediate_size=64)).eval()
    float_model, ids = copy.deepcopy(model), tokens()[0]
    report = quantlib.calibrate(model, None, "int8:row", "sinkhorn")
    assert report.scaled == ["encoder.layer.0.attention.output.dense"]
    with torch.no_grad():
        y, expected = model(ids).last_hidden_state, float_model(ids).last_hidden_state
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        ("gptq", grouped, "inputs must be batches for gptq, got None"),
        ("sinkhorn+gptq", grouped, r"inputs must be batches for sinkhorn\+gptq, got None"),
        ("sinkhorn", Tapped, "inputs must hold a batch for a model without dummy_inputs, got None"),
    ],
)
def test_inputs_that_are_missing_are_named(method: str, model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantlib.calibrate(model(), None, "int8:row", method)


def test_values_whose_heads_are_unknown_stay() -> None:
    value, out = nn.Linear(64, 32), nn.Linear(64, 64)
    assert channels_of(value, out, None) is None
    assert channels_of(value, nn.Linear(48, 64), 16) is None
    found = channels_of(value, out, 16)
    assert found is not None
    assert found.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]
