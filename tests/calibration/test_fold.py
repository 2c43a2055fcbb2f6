"""Scaled channels: the model computes what it did, and what is quantized loses less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib

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
