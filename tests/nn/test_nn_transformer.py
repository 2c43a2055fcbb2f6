"""A small transformer block, quantized: everything that is done to a module is done to it."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib import dequantize_, quantize_
from quantlib.checkpoint import load_quantized, save_quantized
from quantlib.nn import QuantConv1d, QuantEmbedding, QuantLinear, QuantModule

pytestmark = pytest.mark.usefixtures("device")

SCHEMES = ("W8A16", "W8A8", "W4A16")
TYPES = (nn.Linear, nn.Embedding, nn.Conv1d)
WORDS, FEATURES, HEADS = 50, 32, 4


class Block(nn.Module):
    """Tokens [B, T] -> logits [B, T, WORDS], the head sharing the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, FEATURES, padding_idx=0)
        self.mix = nn.Conv1d(FEATURES, FEATURES, 3, padding=1, groups=2)
        self.first, self.second = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.up, self.down = nn.Linear(FEATURES, 4 * FEATURES), nn.Linear(4 * FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        x = x + self.down(F.gelu(self.up(self.second(x))))
        y: Tensor = self.head(x)
        return y


def ids() -> Tensor:
    return torch.arange(2 * 7).reshape(2, 7)


def block(scheme: str | None = None) -> Block:
    torch.manual_seed(0)
    model = Block().eval()
    if scheme is not None:
        quantize_(model, scheme, types=TYPES)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8)) for n in left
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_and_the_tie(scheme: str) -> None:
    model, source = block(scheme), block()
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, QuantModule)}
    linear = dict.fromkeys(("qkv", "out", "up", "down", "head"), QuantLinear)
    assert kinds == {"embedding": QuantEmbedding, "mix": QuantConv1d, **linear}
    assert model.head.weight_codes is model.embedding.weight_codes
    assert model.head.weight_scale is model.embedding.weight_scale
    assert model.head.spec.activation == model.qkv.spec.activation
    y, expected = model(ids()), source(ids())
    assert (y - expected).norm() < (0.03 if scheme.startswith("W8") else 0.3) * expected.norm()
    assert dequantize_(model) == list(dict.fromkeys(["embedding", "mix", "qkv", "out", "up", "down", "head"]))
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embedding.weight
    if scheme != "W8A8":
        torch.testing.assert_close(model(ids()), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_and_states(scheme: str, tmp_path: Path) -> None:
    model = block(scheme)
    y = model(ids())
    copied = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (
        copied,
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):
        assert same(other, model)
        assert torch.equal(other(ids()), y)
        assert other.head.weight_codes is other.embedding.weight_codes
    fresh = block(scheme)
    for module in fresh.modules():
        if isinstance(module, QuantModule):
            module.reset_parameters()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids()), y)
    assert fresh.head.weight_codes is fresh.embedding.weight_codes
    safetensors.torch.save_model(model, str(tmp_path / "state.safetensors"))
    safetensors.torch.load_model(copied, str(tmp_path / "state.safetensors"))
    assert same(copied, model)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("into", ["float", "quantized", "tiled", "meta"])
def test_a_checkpoint(scheme: str, into: str, device: str, tmp_path: Path) -> None:
    model = block(scheme)
    save_quantized(model, tmp_path / "q.safetensors")
    with torch.device("meta") if into == "meta" else contextlib.nullcontext():
        other = Block().eval()
    if into in ("quantized", "tiled"):
        quantize_(other, scheme, types=TYPES)
    if into == "tiled" and scheme != "W8A8":
        other.up.tile_()
    load_quantized(other, tmp_path / "q.safetensors")
    other.to(device)  # what was on meta comes to the CPU
    assert not other.up.tiled
    assert other.head.weight_codes is other.embedding.weight_codes
    assert other.head.spec == model.head.spec
    assert same(other, model)
    torch.testing.assert_close(other(ids()), model(ids()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_casts_and_moves(scheme: str) -> None:
    model = block(scheme)
    codes = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    half = copy.deepcopy(model).to(torch.bfloat16)
    y = half(ids())
    assert y.dtype == torch.bfloat16
    assert (y.float() - model(ids())).norm() < 0.05 * y.norm()
    after = dict(half.named_parameters())
    for name, kept in codes.items():
        assert after[name].dtype == kept.dtype
        assert torch.equal(after[name].view(torch.uint8), kept.view(torch.uint8))
    assert half.head.weight_codes is half.embedding.weight_codes
    assert copy.deepcopy(model).to("meta")(ids().to("meta")).shape == (2, 7, WORDS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compile(scheme: str) -> None:
    torch._dynamo.reset()
    model = block(scheme)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    torch.testing.assert_close(compiled(ids()), model(ids()))
    assert graphs.frame_count == 1
    for batch in (3, 5, 6):
        given = torch.randint(WORDS, (batch, 7))
        torch.testing.assert_close(compiled(given), model(given))
    assert graphs.frame_count == 2  # the second batch size makes it a symbol


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_inductor(scheme: str) -> None:
    torch._dynamo.reset()
    model = block(scheme)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(ids()), model(ids()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_export(scheme: str, strict: bool, tmp_path: Path) -> None:
    model = block(scheme)
    shapes = {"ids": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (ids(),), dynamic_shapes=shapes, strict=strict)
    products = "dynamic_matmul" if scheme == "W8A8" else "dequant_matmul"
    assert sum(products in str(node.target) for node in program.graph.nodes) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, tmp_path / "program.pt2")
        again = torch.export.load(tmp_path / "program.pt2")
    for given in (ids(), torch.randint(WORDS, (5, 7))):
        assert torch.equal(program.module()(given), model(given))
        assert torch.equal(again.module()(given), model(given))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_through_frozen_codes(scheme: str) -> None:
    model = block(scheme)
    model(ids()).square().mean().backward()
    for name, parameter in model.named_parameters():
        frozen = "weight" in name and not name.startswith(("first", "second"))
        assert (parameter.grad is None) == frozen, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def test_the_words_of_a_model() -> None:
    text = repr(block("W8A8"))
    assert "(embedding): QuantEmbedding(50, 32, padding_idx=0, spec=int8:row)" in text
    assert "(mix): QuantConv1d(32, 32, kernel_size=(3,), stride=(1,), padding=(1,), groups=2, spec=int8:row)" in text
    assert "(head): QuantLinear(in_features=32, out_features=50, bias=False, spec=int8:row@int8:row)" in text
