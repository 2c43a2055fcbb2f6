"""Bad calls of the public functions, which take what the ops' schemas do not: the same errors, and never a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import quantlib

X, S = torch.ones(6, 35), torch.ones(6, 5)
B = [1, 8]
C8, C4 = torch.ones(6, 35, dtype=torch.int8), torch.ones(6, 18, dtype=torch.uint8)

PUBLIC: list[tuple[str, Callable[[], Any]]] = [
    ("format must be one of float32, ", lambda: quantlib.cast(X, torch.float64)),
    ("format must be one of float32, ", lambda: quantlib.quantize(X, S, None, block=B)),
    ("quantlib::cast: format must be ", lambda: quantlib.cast(X, "nope")),
    (
        "quantlib::quantize: block must be two sizes >= 1, got [-2, 8]",
        lambda: quantlib.quantize(X, S, "int8", block=(-2, 8)),
    ),
    (
        "quantlib::quantize: block must be two sizes >= 1, got [-1]",
        lambda: quantlib.quantize(X, S, "int8", block=(-1,)),
    ),
    ("quantlib::quantize: scale must be float32 [6, 1]", lambda: quantlib.quantize(X, S, "int8", block=(1, -1))),
    ("quantlib::quantize: block must be two sizes >= 1, got None", lambda: quantlib.quantize(X, S, "int8", block=None)),
    ("quantlib::quantize: x must be a tensor, got list", lambda: quantlib.quantize([1.0], S, "int8", block=B)),
    ("quantlib::quantize: scale must be a tensor, got NoneType", lambda: quantlib.quantize(X, None, "int8", block=B)),
    ("quantlib::cast: x must be a tensor, got NoneType", lambda: quantlib.cast(None, "float16")),
    (
        "quantlib::quantize: scale must not require a gradient",
        lambda: quantlib.quantize(X, S.clone().requires_grad_(), "int8", block=B),
    ),
    (
        "quantlib::quantize: x must not require a gradient",
        lambda: quantlib.quantize(X.clone().requires_grad_(), S, "int8", block=B),
    ),
    (
        "quantlib::quantize_dynamic: x must not require a gradient",
        lambda: quantlib.quantize_dynamic(X.clone().requires_grad_(), "int8", block=B),
    ),
    (
        "quantlib::compute_scale: x must not require a gradient",
        lambda: quantlib.compute_scale(X.clone().requires_grad_(), "int8", B),
    ),
    (
        "quantlib::dequantize: scale must not require a gradient",
        lambda: quantlib.dequantize(C8, S.clone().requires_grad_(), "int8", block=B),
    ),
    (
        "quantlib::cast: x must not require a gradient",
        lambda: quantlib.cast(X.clone().requires_grad_(), "float8_e4m3fn"),
    ),
    (
        "quantlib::cast: out must be None where x requires a gradient",
        lambda: quantlib.cast(X.clone().requires_grad_(), "float16", out=X.half()),
    ),
    (
        "quantlib::dequant_matmul: x must be a tensor, got list",
        lambda: quantlib.dequant_matmul([1.0], C8, S, "int8", block=B),
    ),
    (
        "quantlib::dequant_matmul: scale must be a tensor, got float",
        lambda: quantlib.dequant_matmul(X, C8, 0.1, "int8", block=B),
    ),
    (
        "quantlib::dequant_matmul: layout must be plain or tiles, got rows",
        lambda: quantlib.dequant_matmul(X, C8, S, "int8", block=B, layout="rows"),
    ),
    (
        "quantlib::dequant_matmul: rows must be the rows of the weight for tiles, got None",
        lambda: quantlib.dequant_matmul(X, C8, S, "int8", block=B, layout="tiles"),
    ),
    (
        "quantlib::dequant_matmul: rows must be None for plain codes, got 4",
        lambda: quantlib.dequant_matmul(X, C8, S, "int8", block=B, rows=4),
    ),
    (
        "quantlib::dequant_matmul: size must be an integer or None, got str",
        lambda: quantlib.dequant_matmul(X, C8, S, "int8", block=B, size="4"),
    ),
    (
        "quantlib::dynamic_matmul: x must be a tensor, got ndarray",
        lambda: quantlib.dynamic_matmul(X.numpy(), C8, S, block=B),
    ),
    (
        "quantlib::scaled_matmul: scale must be a tensor, got NoneType",
        lambda: quantlib.scaled_matmul(C8, S[:, :1], C8, None, block=B),
    ),
    *(
        (
            f"quantlib::fake_quantize: grad_factor must be a finite float32, at least 0, got {value}",
            lambda value=value: quantlib.fake_quantize(X, S, "int8", block=B, grad_factor=value),
        )
        for value in (float("nan"), float("inf"), -1.0, 1e300)
    ),
    (
        "quantlib::fake_quantize: zero_point must be in 0..255, got 300",
        lambda: quantlib.ops.fake_quantize_per_tensor_affine(X, 0.1, 300, 0, 255),
    ),
    (
        "quantlib::fake_quantize: zero_point must be in 0..255, got -1",
        lambda: quantlib.ops.fake_quantize_per_channel_affine(X, S[:, 0], -C8[:, 0].int(), 0, 0, 255),
    ),
    (
        "quantlib::fake_quantize: scale must be float32 or bfloat16, got float16",
        lambda: quantlib.ops.fake_quantize_per_channel_affine(X, S[:, 0].half(), C8[:, 0].int(), 0, 0, 255),
    ),
    ("quantlib::pack: format must be ", lambda: quantlib.pack(C8, "int8")),
    ("quantlib::pack: codes must be integers [..., K], got ", lambda: quantlib.pack(X, "int4")),
    ("quantlib::pack: codes must be in -8..7, got 99", lambda: quantlib.pack(C8 * 99, "int4")),
    ("quantlib::unpack: packed must be uint8 [..., K / 2], got ", lambda: quantlib.unpack(C8, "int4")),
    ("quantlib::unpack: size must be 35 or 36, got 12", lambda: quantlib.unpack(C4, "int4", 12)),
]


@pytest.mark.parametrize(("said", "call"), PUBLIC, ids=[said[:90] for said, _ in PUBLIC])
def test_public_functions(said: str, call: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, ValueError)) as error:
        call()
    assert said in str(error.value)


NOT_TENSORS: list[Callable[[], Any]] = [
    lambda: quantlib.cast("x", "float16"),
    lambda: quantlib.cast([1.0], "float16"),
    lambda: quantlib.quantize(3.0, S, "int8", block=(1, -1)),
    lambda: quantlib.quantize(X, None, "int8", block=(1, -1)),
    lambda: quantlib.quantize(X, S, "int8", block=1),
    lambda: quantlib.quantize(X, S, "int8", block="row"),
    lambda: quantlib.quantize(X, S, "int8", block=None),
    lambda: quantlib.quantize_dynamic(X, "int8", block=(1, -1), out=S),
    lambda: quantlib.quantize_dynamic(X, "int8", block=(1, -1), out=(S,)),
    lambda: quantlib.compute_scale(X, "int8", B, symmetric=False, out=S),
    lambda: quantlib.pack([1, 2], "int4"),
]


@pytest.mark.parametrize("number", range(len(NOT_TENSORS)))
def test_what_is_no_tensor_is_an_ordinary_error(number: int) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError, AttributeError)) as error:
        NOT_TENSORS[number]()
    assert str(error.value)


def test_a_tracer_that_takes_plain_tensors_alone_is_told_so() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    layer, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    quantlib.quantize_(layer, "int8")
    with pytest.raises(TypeError, match=r"codes, scale must be plain tensors .*torch\.export, or trace torch\.func"):
        make_fx(layer)(x)
    state = dict(layer.state_dict())
    traced = make_fx(lambda state, x: torch.func.functional_call(layer, state, (x,)))(state, x)
    assert torch.equal(traced(state, x), layer(x))


@pytest.mark.parametrize("given", [None, [[1.0] * 8], np.ones((2, 8), np.float32)])
def test_an_input_of_a_layer_that_is_no_tensor_is_named(given: object) -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    quantlib.quantize_(layer, "W8A8")
    with pytest.raises(TypeError, match=f"input must be a tensor, got {type(given).__name__}"):
        layer(given)
