"""No tensor of the library lies on another device than its arguments: ops and layers, on a device that is made up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import stand_in
import torch
from conftest import Served, forced
from test_graph_capture import EVERY
from test_torch import into, results
from torch import Tensor, nn

import quantlib
from quantlib.nn import QuantConv2d, QuantEmbedding, QuantLinear
from quantlib.testing import assert_same_bytes

WORDS = ("int8", "int8@int8:row", "int4:group:8:affine", "float8_e4m3fn", "bf16")


@pytest.fixture(autouse=True)
def away() -> Iterator[Served]:
    yield from forced(Served("composite", stand_in.NAME))


@pytest.mark.parametrize("name", EVERY)
def test_ops(name: str) -> None:
    function, arguments = EVERY[name]
    moved = tuple(a.to(stand_in.NAME) if isinstance(a, Tensor) else a for a in arguments)
    out, given = into((function, moved))
    out(*moved, **given)
    for got, want in zip(results(function(*moved)), results(function(*arguments)), strict=True):
        assert got.device.type == stand_in.NAME
        assert_same_bytes(got, want)


@pytest.mark.parametrize("words", WORDS)
def test_layers_forward_and_backward(words: str) -> None:
    x = torch.randn(3, 16, requires_grad=True)
    for layer in (QuantLinear.from_float(nn.Linear(16, 8), words), QuantLinear(16, 8, spec=words)):
        layer(x).sum().backward()
    table = QuantEmbedding.from_float(nn.Embedding(9, 16), words.partition("@")[0])
    picture = QuantConv2d.from_float(nn.Conv2d(16, 8, 1), words.partition("@")[0])
    y = picture(table(torch.arange(6).view(2, 3)).mT.unsqueeze(-1))
    assert {t.device.type for t in (y, x.grad, layer.values(), table.values())} == {stand_in.NAME}


@pytest.mark.parametrize("words", WORDS[:3])
def test_training(words: str) -> None:
    model = quantlib.nn.QATLinear.from_float(nn.Linear(16, 8), words)
    model(torch.randn(3, 16)).sum().backward()
    assert all(p.grad is None or p.grad.device.type == stand_in.NAME for p in model.parameters())


def test_it_bites() -> None:
    x = torch.randn(4)
    assert x.device.type == stand_in.NAME
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(4, device="cpu")
    with pytest.raises((RuntimeError, TypeError)):
        x.detach().__array__()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(4, device=stand_in.NAME, generator=torch.Generator())
    assert_same_bytes(x.cpu(), x.numpy())
