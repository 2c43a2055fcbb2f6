"""The convolution over codes in C++: the bytes of exact sums, and torch's own where others look on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import quantlib
from quantlib.backends import compiled
from quantlib.nn import QuantConv1d, QuantConv2d, conv
from quantlib.testing import assert_same_bytes
from quantlib.testing.bytes import bits

pytestmark = pytest.mark.skipif(compiled.path_of("cpu") is None, reason="no compiled kernels")

SPECS = ("int8:row", "int4:group:32", "int8:group:7", "int4:group:32:affine", "nf4:group:32", "float8_e4m3fn:tensor")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every convolution that follows, whether C++ did it."""
    seen: list[bool] = []
    real = conv.convolve

    def noted(*args: Any) -> Tensor | None:
        y = real(*args)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(conv, "convolve", noted)
    return seen


def exact(spec: str, float_module: nn.Module, dtype: torch.dtype) -> Any:
    """The layer, its values being multiples of 1/8 of at most 4 bits where the format has such."""
    model = nn.Sequential(float_module).to(dtype).requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randint(-7, 8, p.shape) / 8)
    quantlib.quantize_(model, spec, types=(nn.Conv1d, nn.Conv2d))
    q: Any = model[0]
    for p in (q.weight_scale, q.bias):
        if p is not None:
            p.data = torch.full_like(p, 0.5)
    return q


def wanted(q: Any, x: Tensor) -> Tensor:
    """The convolution with the weight's values in float64, rounded once."""
    of = F.conv2d if x.dim() == 4 else F.conv1d
    bias = None if q.bias is None else q.bias.double()
    return of(x.double(), q.values(torch.float32).double(), bias, q.stride, q.padding, q.dilation).to(x.dtype)


@pytest.mark.parametrize("seed", range(24))
def test_sums_that_are_exact(seed: int, served: list[bool]) -> None:
    torch.manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high + 1, ()))  # noqa: E731
    B, C, N, H, W, sides = draw(1, 3), draw(1, 24), draw(16, 70), draw(5, 9), draw(5, 20), (draw(1, 3), draw(1, 4))
    how: dict[str, Any] = {name: (draw(1, 3), draw(1, 3)) for name in ("stride", "dilation")}
    how |= {"padding": (draw(0, 2), draw(0, 3)), "bias": seed % 2 == 0}
    fits = all(
        s + 2 * p > d * (k - 1) for s, p, d, k in zip((H, W), how["padding"], how["dilation"], sides, strict=True)
    )
    q = exact(SPECS[seed % 4], nn.Conv2d(C, N, sides, **(how if fits else {"padding": 4})), DTYPES[seed % 3])
    x = torch.randint(-4, 5, (B, C, H, W)).to(DTYPES[seed % 3])
    assert_same_bytes(bits(q(x)), bits(wanted(q, x)))
    assert len(served) == 1


@pytest.mark.parametrize(("spec", "dtype"), list(itertools.product(SPECS, DTYPES)), ids=str)
def test_every_format_within_rounding(spec: str, dtype: torch.dtype, served: list[bool]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(20, 33, 3, padding=1)).to(dtype)
    quantlib.quantize_(model, spec, types=(nn.Conv2d,))
    q, x = model[0].requires_grad_(False), torch.randn(1, 20, 11, 11).to(dtype)
    exact_y = F.conv2d(x.double(), q.values(torch.float32).double(), q.bias.double(), padding=1)
    of_sums = F.conv2d(x.double().abs(), q.values(torch.float32).double().abs(), padding=1) * 2.0**-15
    if q(x) is None or not served[0]:
        pytest.skip("torch is faster here")
    assert ((q(x).double() - exact_y).abs() <= of_sums + exact_y.abs() * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan"), 1e-30], ids=str)
def test_values_that_pairs_do_not_hold(value: float, dtype: torch.dtype) -> None:
    q = exact("int8:row", nn.Conv2d(8, 16, 3), dtype)
    q.weight_codes.data.abs_().clamp_(min=1)
    x = torch.zeros(1, 8, 5, 5, dtype=dtype)
    x[0, 3, 2, 2] = min(value, 60000.0) if dtype == torch.float16 and value == 1e30 else value
    want = wanted(q, x)
    torch.testing.assert_close(q(x), want, rtol=2e-2, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lines(dtype: torch.dtype) -> None:
    q = exact("int8:row", nn.Conv1d(12, 20, 5, stride=2, padding=3), dtype)
    assert isinstance(q, QuantConv1d)
    x = torch.randint(-4, 5, (2, 12, 31)).to(dtype)
    assert_same_bytes(bits(q(x)), bits(wanted(q, x)))
    assert_same_bytes(bits(q(x[0])), bits(wanted(q, x)[0]))


def test_who_else_looks_gets_torch(served: list[bool]) -> None:
    q = exact("int8:row", nn.Conv2d(8, 16, 1), torch.bfloat16)
    assert isinstance(q, QuantConv2d)
    x = torch.randint(-4, 5, (2, 8, 6, 6)).bfloat16()
    want = wanted(q, x)
    q(x)
    usual = served.pop()
    torch.func.vmap(q)(x.unsqueeze(1))
    torch.jit.trace(q, x, check_trace=False)
    with FlopCounterMode(display=False) as flops:
        q(x)
    assert flops.get_total_flops() == 2 * 2 * 36 * 8 * 16
    q(x.to(memory_format=torch.channels_last))
    with quantlib.use_backend("composite"):
        q(x)
    assert not any(served)
    served.clear()
    y = q(x.requires_grad_())
    y.float().sum().backward()
    assert served[0] == usual
    assert x.grad is not None
    np.testing.assert_array_equal(bits(y.detach()), bits(want))
    with pytest.raises(RuntimeError):
        q(torch.zeros(2, 9, 6, 6).bfloat16())
