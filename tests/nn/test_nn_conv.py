"""QuantConv2d in floats of 16 bits that torch is slow in: convolved in float32, rounded once, derivatives included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantlib
from quantlib import reference
from quantlib.nn import QuantConv2d, conv
from quantlib.ops.autograd import recorded
from quantlib.testing import assert_same_bytes
from quantlib.testing.bytes import bits

HALVES = (torch.bfloat16, torch.float16)


def layer(spec: str, dtype: torch.dtype, **options: Any) -> QuantConv2d:
    """A convolution whose weight has small values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, **options).to(dtype))
    quantlib.quantize_(model, spec, types=(nn.Conv2d,))
    found = model[0]
    assert isinstance(found, QuantConv2d)
    return found


@pytest.mark.parametrize("slow", [(), HALVES], ids=["native", "slow"])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_exact_operands_have_the_bytes_of_the_product(
    dtype: torch.dtype, slow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "SLOW", slow)
    q = layer("W8A16", dtype, bias=False, padding=1)
    q.weight_codes.data.copy_(torch.randint(-8, 9, q.weight_codes.shape, dtype=torch.int8))
    q.weight_scale.data.fill_(0.25)
    x = torch.randint(-4, 5, (2, 8, 6, 5)).to(dtype)
    patches = F.unfold(x.float(), 3, padding=1).transpose(1, 2).numpy()
    codes, scale = q.weight_codes.numpy().reshape(16, -1), q.weight_scale.numpy()
    name = str(dtype).removeprefix("torch.")
    want = reference.dequant_matmul(patches, codes, scale, "int8", block=(1, codes.shape[1]), dtype=name)
    assert_same_bytes(bits(q(x)), np.ascontiguousarray(want.transpose(0, 2, 1)).reshape(2, 16, 6, 5))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2, "padding": "valid"}, {"padding_mode": "reflect",
                                     "padding": 1}], ids=["plain", "groups", "reflect"])  # fmt: skip
def test_a_slow_dtype_is_rounded_once(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "SLOW", HALVES)
    q = layer("W8A16", dtype, **options)
    x = torch.randn(2, 8, 9, 9).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    y, exact = q(x), q(wide)
    assert y.dtype == dtype
    assert torch.equal(y, exact.to(dtype))
    dy = torch.randn_like(y)
    y.backward(dy)
    exact.backward(dy.float())
    assert x.grad is not None
    assert wide.grad is not None
    if q.padding_mode == "zeros":  # torch sums the gradient of any other padding in the dtype of x
        assert torch.equal(x.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_float32_comes_nearer_than_sixteen_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = layer("int4:group:32", dtype, bias=False), torch.randn(1, 8, 12, 12).to(dtype)
    exact = F.conv2d(x.double(), q.values(torch.float32).double())

    def away(slow: Any) -> float:
        monkeypatch.setattr(conv, "SLOW", slow)
        return float((q(x).double() - exact).norm())

    assert away(HALVES) <= away(())


def test_a_call_that_nothing_is_derived_of_binds_no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = layer("W8A16", torch.float32), torch.randn(1, 8, 5, 5)
    q.requires_grad_(False)
    want = q(x)

    def refuse(*args: Any) -> Any:
        raise AssertionError("torch.autograd.Function was called")

    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(refuse))
    assert torch.equal(q(x), want)
    with torch.inference_mode():
        assert torch.equal(q(x), want)
    with torch.no_grad():
        assert torch.equal(q(x.requires_grad_()), want)
    with pytest.raises(AssertionError, match="was called"):
        q(x)


def test_what_is_recorded() -> None:
    x, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert not recorded(x, None, "int8", (1, 2))
    assert recorded(x, leaf, None, "int8")
    with torch.no_grad():
        assert not recorded(leaf)
    seen = []
    torch.func.grad(lambda t: (seen.append(recorded(t)), t.sum())[1])(x)
    torch.func.jvp(lambda t: (seen.append(recorded(t)), t.sum())[1], (x,), (x,))
    torch.func.vmap(lambda t: (seen.append(recorded(t)), t)[1])(x)
    assert seen == [True] * 3
