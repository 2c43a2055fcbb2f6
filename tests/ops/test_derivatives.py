"""Derivatives in every mode: forward and reverse agree, under torch.func too, and what has none raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import quantlib
from quantlib.nn import QuantConv1d, QuantLinear

N, K = 6, 10


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def matmul(op: Any, format: str, block: tuple[int, int], symmetric: bool, activation: str | None) -> Any:
    codes, scale, *zero_point = quantlib.quantize_dynamic(normal(N, K), format, block=block, symmetric=symmetric)
    options = {"block": block, "zero_point": zero_point[0] if zero_point else None, "activation": activation}
    return lambda x, s, b: op(x, codes, s, format, bias=b, **options), (normal(3, K), scale, normal(N))


def layer(spec: str) -> Any:
    m = QuantLinear.from_float(torch.nn.Linear(K, N), spec)
    arguments = (normal(3, K), m.weight_scale.detach(), m.bias.detach())
    return lambda x, s, b: functional_call(m, {"weight_scale": s, "bias": b}, (x,)), arguments


def convolution(spec: str, groups: int, of_scale: bool = True) -> Any:
    m = QuantConv1d.from_float(torch.nn.Conv1d(4, N, 3, padding=1, groups=groups), spec)
    arguments = (normal(2, 4, 5), m.bias.detach(), m.weight_scale.detach())

    def call(x: Tensor, b: Tensor, *s: Tensor) -> Tensor:
        y: Tensor = functional_call(m, {"bias": b, **({"weight_scale": s[0]} if s else {})}, (x,))
        return y

    return call, arguments[: 2 + of_scale]


def fake(format: str, block: tuple[int, int], affine: bool, **options: Any) -> Any:
    x = normal(3, K)
    scale = torch.full_like(quantlib.compute_scale(x, "int8", block), 0.3)

    def call(x: Tensor, s: Tensor, *z: Tensor) -> Tensor:
        return quantlib.fake_quantize(x, s, format, block=block, zero_point=z[0] if z else None, **options)

    return call, (x, scale, torch.full_like(scale, 3.0)) if affine else (x, scale)


LINEAR = {
    "int8": matmul(quantlib.dequant_matmul, "int8", (1, -1), True, None),
    "uint8 silu": matmul(quantlib.dequant_matmul, "uint8", (1, 4), False, "silu"),
    "int4 gelu": matmul(quantlib.dequant_matmul, "int4", (2, 4), True, "gelu"),
    "fp8 relu": matmul(quantlib.dequant_matmul, "float8_e4m3fn", (-1, -1), True, "relu"),
    "dynamic": matmul(quantlib.dynamic_matmul, "int8", (1, -1), True, None),
    "dynamic silu": matmul(quantlib.dynamic_matmul, "int4", (1, 4), True, "silu"),
}
EVERY = {
    **LINEAR,
    "fake": fake("int8", (1, -1), False),
    "fake lsq": fake("int4", (2, 4), False, mask="lsq", grad_factor=0.5),
    "fake affine": fake("uint8", (-1, -1), True),
    "fake fp8": fake("float8_e4m3fn", (1, 4), False),
    "cast": (lambda x: quantlib.cast(quantlib.cast(x, "bfloat16"), "float32"), (normal(3, K),)),
    "hadamard": (lambda x: quantlib.hadamard(x, 4), (normal(3, 8),)),
    "fake_cast": (lambda x: quantlib.ops.fake_cast(x, "float8_e5m2"), (normal(3, K),)),
    "convolution": convolution("int8", 1),
    "convolution in groups": convolution("int4:group:4:affine", 2),
    "layer W8A8": layer("W8A8"),
    "layer whole": layer("int8:row@uint8:tensor:affine"),
    "layer floats": layer("int8:row@float8_e4m3fn:row"),
}


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", EVERY)
def test_forward_mode_is_the_transpose_of_reverse_mode(name: str) -> None:
    f, arguments = EVERY[name]
    every = tuple(range(len(arguments)))
    tangents = tuple(normal(*a.shape, 1)[..., 0] for a in arguments)
    y, tangent = jvp(f, arguments, tangents)
    assert torch.equal(y, f(*arguments))
    with forward_ad.dual_level():
        dual = f(*(forward_ad.make_dual(a, t) for a, t in zip(arguments, tangents, strict=True)))
        assert_close(forward_ad.unpack_dual(dual).tangent, tangent)
    dy = normal(*y.shape, 2)[..., 0]
    _, back = vjp(f, *arguments)
    leaves = [a.clone().requires_grad_() for a in arguments]
    for a, b in zip(back(dy), torch.autograd.grad(f(*leaves), leaves, dy), strict=True):
        assert_close(a, b)
    for a, b in zip(jacfwd(f, every)(*arguments), jacrev(f, every)(*arguments), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_of_each_example(name: str) -> None:
    f, arguments = EVERY[name]
    gradients = grad(lambda *a: f(*a).square().sum(), tuple(range(len(arguments))))
    batch = tuple(torch.stack([a, a / 2]) for a in arguments)
    got = vmap(gradients)(*batch)
    for n in range(2):
        for a, b in zip(got, gradients(*(t[n] for t in batch)), strict=True):
            assert_close(a[n], b)


@pytest.mark.parametrize("name", LINEAR)
def test_second_derivatives_of_a_product(name: str) -> None:
    f, arguments = LINEAR[name]

    def loss(*a: Tensor) -> Tensor:
        return f(*a).square().mean()

    forward, reverse = hessian(loss, (0, 1))(*arguments), jacrev(jacrev(loss, (0, 1)), (0, 1))(*arguments)
    for i in range(2):
        for j in range(2):
            torch.testing.assert_close(forward[i][j], reverse[i][j], rtol=1e-2, atol=1e-2)


X, ONE, C8 = normal(3, K), torch.full((3, 1), 0.1), torch.ones(3, K, dtype=torch.int8)
NONE: dict[str, Callable[[Tensor], Any]] = {
    "quantize": lambda x: quantlib.quantize(x, ONE, "int8", block=(1, -1)),
    "quantize_dynamic": lambda x: quantlib.quantize_dynamic(x, "int8", block=(1, -1))[1],
    "compute_scale": lambda x: quantlib.compute_scale(x, "int8", (1, -1)),
    "dequantize": lambda x: quantlib.dequantize(C8, x[:, :1], "int8", block=(1, -1)),
    "dequantize_rows": lambda x: quantlib.ops.dequantize_rows(torch.tensor([0]), C8, x[:, :1], "int8", block=(1, -1)),
    "scaled_matmul": lambda x: quantlib.scaled_matmul(C8, ONE, C8, x[:, :1]),
    "cast": lambda x: quantlib.cast(x, "float8_e5m2"),
}


@pytest.mark.parametrize("name", NONE)
@pytest.mark.parametrize("inside", [False, True], ids=["plain", "under vmap"])
def test_what_has_no_derivative_raises_in_every_mode(name: str, inside: bool) -> None:
    f = NONE[name]
    call = (lambda x: vmap(f)(x[None])) if inside else f
    with pytest.raises(RuntimeError, match=f"quantlib::{name}: .* must not require a gradient"):
        jvp(call, (X,), (X,))
    with pytest.raises(RuntimeError, match=f"quantlib::{name}: .* must not require a gradient"):
        grad(lambda x: call(x).float().sum())(X)


def test_a_rounding_has_no_second_derivative() -> None:
    f, arguments = EVERY["fake"]
    with pytest.raises(RuntimeError, match="a rounding has no second derivative"):
        hessian(lambda x: f(x, arguments[1]).sum())(arguments[0])


@pytest.mark.parametrize("spec", ["int8:row@uint8:tensor:affine", "W8A8", "int8", "int4:group:32"])
@pytest.mark.parametrize("sizes", [(16, 7), (0, 7), (16, 0)])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
def test_backward_of_every_shape(spec: str, sizes: tuple[int, int], leading: tuple[int, ...]) -> None:
    if 0 in sizes:
        with pytest.warns(UserWarning, match="zero-element"):
            m = QuantLinear.from_float(torch.nn.Linear(*sizes), spec)
    else:
        m = QuantLinear.from_float(torch.nn.Linear(*sizes), spec)
    m.weight_scale.requires_grad_()
    x = torch.ones(*leading, sizes[0], requires_grad=True)
    m(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    rows = torch.Size(leading).numel()
    assert torch.equal(m.bias.grad, torch.full((sizes[1],), float(rows)))
