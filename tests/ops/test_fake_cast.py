"""Training with a float format without a scale: the bytes of the cast, and where a gradient passes."""

from __future__ import annotations

import math

import pytest
import torch

from quantlib import ops

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("format", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fake_cast_has_the_bytes_of_the_cast(format: str, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(100), torch.tensor([1e5, -1e5, 448.0, 470.0, math.inf, math.nan, -0.0, 1e-8])]).to(dtype)
    leaf = x.clone().requires_grad_()
    y = ops.fake_cast(leaf, format)
    expected = ops.cast(ops.cast(x, format), dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(y.detach().view(integer), expected.view(integer))
    y.sum().backward()
    assert torch.equal(leaf.grad[:100], torch.ones(100, dtype=dtype))
    saturated = format.startswith("float8")
    assert leaf.grad[104] == (0 if saturated else 1)  # infinity: outside of 8 bits
    assert ops.fake_cast(torch.empty(0, 3), format).shape == (0, 3)


def test_bad_input() -> None:
    with pytest.raises(RuntimeError, match="format must be"):
        ops.fake_cast(torch.ones(2), "int8")
