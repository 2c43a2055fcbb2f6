"""An adapter of low rank over a frozen layer of codes: what it learns, and what merging it costs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from quantlib.nn import LoRALinear, QuantLinear

pytestmark = pytest.mark.usefixtures("device")

N, K = 24, 40


def adapted(spec: str = "int8", rank: int = 4, alpha: float | None = None) -> LoRALinear:
    return LoRALinear(QuantLinear.from_float(nn.Linear(K, N), spec), rank, alpha)


def test_it_starts_as_its_base() -> None:
    layer, x = adapted("W8A8"), torch.randn(5, K)
    assert torch.equal(layer(input=x), layer.base(x))  # called and asked as the nn.Linear that it replaces
    assert (layer.in_features, layer.out_features) == (K, N)


@pytest.mark.parametrize("spec", ["int8", "W8A8", "int4:group:8", "float8_e4m3fn"])
def test_gradients_reach_the_adapter_and_the_input_and_nothing_else(spec: str) -> None:
    layer, x, dy = adapted(spec, alpha=8), torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    nn.init.normal_(layer.b)
    layer(x).backward(dy)
    twice = 8 / 4
    torch.testing.assert_close(layer.b.grad, twice * dy.T @ (x @ layer.a.T))
    torch.testing.assert_close(layer.a.grad, twice * (dy @ layer.b).T @ x)
    torch.testing.assert_close(x.grad, dy @ (layer.base.values() + layer.update()))
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"a", "b"}
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"a", "b"}


def test_training_moves_the_adapter_alone() -> None:
    layer, x = adapted(), torch.randn(64, K)
    target, before = x @ torch.randn(K, N) * 0.1, copy.deepcopy(layer.base.state_dict())
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in layer.base.state_dict().items())


@pytest.mark.parametrize("spec", ["int8", "W8A8", "int4:group:8", "uint8", "bfloat16"])
def test_merging_gives_the_codes_of_the_sum_and_says_what_they_miss(spec: str) -> None:
    layer = adapted(spec)
    nn.init.normal_(layer.b, std=0.1)
    merged, error = layer.merge()
    whole = nn.Linear(K, N, bias=False)
    whole.weight = nn.Parameter(layer.base.values() + layer.update())
    expected = QuantLinear.from_float(whole, spec)
    assert all(torch.equal(p, dict(merged.named_parameters())[n]) for n, p in expected.named_parameters())
    miss = (merged.values() - whole.weight).detach().double()
    assert error.max_error == miss.abs().max()
    for got, signal in ((error.snr_db, whole.weight), (error.adapter_snr_db, layer.update())):
        ratio = signal.detach().double().square().sum() / miss.square().sum()
        assert math.isclose(got, 10 * math.log10(ratio), rel_tol=1e-6)
    assert merged.bias is layer.base.bias
    assert str(merged.spec) == str(layer.base.spec)


def test_an_adapter_that_the_codes_cannot_hold_shows() -> None:
    layer = adapted("int4:row")
    nn.init.constant_(layer.b, 1e-4)
    assert layer.merge()[1].adapter_snr_db < 0 < layer.merge()[1].snr_db


def test_the_adapter_keeps_its_dtype_and_the_result_that_of_x() -> None:
    layer = adapted()
    assert layer(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.a.dtype == torch.float32
    merged, _ = layer.bfloat16().merge()
    assert merged.dtype == torch.bfloat16


def test_compiled_it_trains_the_same() -> None:
    layer, x = adapted(), torch.randn(8, K)
    nn.init.normal_(layer.b)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for module in (layer, compiled):
        module(x).square().mean().backward()
    for p, q in zip(layer.parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_it_reads_as_a_linear_layer() -> None:
    """T5 of transformers casts its input to ``self.wo.weight.dtype``."""
    base = QuantLinear.from_float(nn.Linear(16, 8, dtype=torch.bfloat16), "int8")
    layer = LoRALinear(base, rank=2)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.shape == (8, 16)
    assert layer.bias is base.bias
    assert set(layer.state_dict()) == {"a", "b", *(f"base.{name}" for name in base.state_dict())}


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="base must be a QuantLinear, got Linear"):
        LoRALinear(nn.Linear(K, N))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.24, got 25"):
        adapted(rank=25)
    layer = adapted()
    nn.init.constant_(layer.b, math.nan)
    with pytest.raises(ValueError, match="adapter must be finite, got nan"):
        layer.merge()
