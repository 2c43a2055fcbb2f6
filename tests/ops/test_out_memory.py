"""Results in memory that is given: over an input they are right, over each other or themselves they are an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import quantlib
from quantlib import backends
from quantlib.testing import assert_same_bytes


@pytest.fixture(params=backends.order("cpu"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if why := backends.refuses(request.param, "cpu"):
        pytest.skip(f"{request.param}: {why}")
    with quantlib.use_backend(request.param):
        yield request.param


def test_over_the_zero_points(backend: str) -> None:
    x, s = torch.randn(4, 2048), torch.full((1, 2048), 0.05)
    for start in (0, 512):
        memory = torch.randint(-100, 100, (4 * 2048,), dtype=torch.int32)
        z = memory[:2048].view(1, 2048)
        options = {"block": (-1, 1), "zero_point": z}
        codes = quantlib.quantize(x, s, "int8", **options)
        values = quantlib.dequantize(codes, s, "int8", **options)
        kept = memory.clone()
        assert_same_bytes(
            quantlib.quantize(x, s, "int8", out=memory.view(torch.int8)[: 4 * 2048].view(4, 2048), **options), codes
        )
        memory.copy_(kept)
        if start:
            z = options["zero_point"] = memory[start : start + 2048].view(1, 2048)
            values = quantlib.dequantize(codes, s, "int8", **options)
        out = memory.view(torch.float32).view(4, 2048)
        assert_same_bytes(quantlib.dequantize(codes, s, "int8", out=out, **options), values)


def test_two_results_in_one_memory(backend: str) -> None:
    x, memory = torch.randn(4, 32), torch.zeros(4, 32, dtype=torch.int8)
    scale = memory.view(torch.float32).flatten()[4:8].view(4, 1)
    with pytest.raises(RuntimeError, match="quantize_dynamic: scale must be in memory of its own, got that of codes"):
        quantlib.quantize_dynamic(x, "int8", block=(1, -1), out=(memory, scale))
    assert not memory.any()


@pytest.mark.parametrize("strides", [(0, 1), (16, 1), (0, 0)])
def test_elements_in_one_memory(strides: tuple[int, int], backend: str) -> None:
    out = torch.zeros(256).as_strided((4, 32), strides)
    with pytest.raises(RuntimeError, match="out must be a tensor whose elements do not share memory, got strides"):
        quantlib.cast(torch.ones(4, 32, dtype=torch.float16), "float32", out=out)
    assert not out.any()


def test_a_result_with_gaps(backend: str) -> None:
    out, x = torch.zeros(64, 4, dtype=torch.float16).T[:, ::2], torch.randn(4, 32)
    assert_same_bytes(quantlib.cast(x, "float16", out=out), quantlib.cast(x, "float16"))


def test_sizes_whose_product_no_int64_holds(backend: str) -> None:
    x = torch.empty(2**32, 2**31, 0)
    assert quantlib.cast(x, "float16").shape == x.shape


def test_one_product_is_no_negative_zero(backend: str) -> None:
    codes, one = torch.full((4, 1), -5, dtype=torch.int8), torch.ones(1, 1)
    y = quantlib.scaled_matmul(codes, one, torch.zeros(3, 1, dtype=torch.int8), one, "int8", block=(3, 1))
    assert_same_bytes(y, torch.zeros(4, 3))


def test_no_examples(backend: str) -> None:
    y = torch.vmap(lambda x: quantlib.quantize_dynamic(x, "int4", block=(1, -1)))(torch.empty(0, 3, 8))
    assert [t.shape for t in y] == [(0, 3, 4), (0, 3, 1)]


def test_memory_that_autograd_needs(backend: str) -> None:
    v, (z, leaf) = torch.randn(8), torch.randn(2, 8, requires_grad=True).unbind()
    y = z.exp()
    for out in (y, leaf.detach().requires_grad_()):
        before = out.detach().clone()
        with pytest.raises(RuntimeError, match=r"out must be a tensor that requires no gradient, .* got one that does"):
            quantlib.cast(v, "float32", out=out)
        assert torch.equal(out, before)
    with torch.no_grad():
        quantlib.cast(v, "float32", out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    codes, scale = torch.empty(4, 8, dtype=torch.int8), torch.empty(4, 1)
    quantlib.quantize_dynamic(torch.randn(4, 8), "int8", block=(1, -1), out=(codes, scale))
    assert codes._version
    assert scale._version
    with torch.inference_mode():
        quantlib.cast(v, "float32", out=torch.empty(8))
