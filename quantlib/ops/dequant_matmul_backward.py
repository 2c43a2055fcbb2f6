"""dx[m, k] = sum over n of dy[m, n] * w[n, k], w[n, k] = decode(codes[n, k]) * scale[n // br, k // bk]"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from quantlib.backends.composite.numerics import spread
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.autograd import Gradients, differentiable
from quantlib.ops.check import INPUTS, Result, check_dtype, fail, last_size
from quantlib.ops.declare import declare
from quantlib.ops.dequant_matmul_backward_scale import gradient_of_scale
from quantlib.ops.sharding import size_of
from quantlib.ops.weight import check_weight
from quantlib.spec import matrix_shape

OP = "dequant_matmul_backward"
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def _results(dy: Tensor, weight: QuantizedWeight) -> list[Result]:
    check_dtype(OP, "dy", dy.dtype, INPUTS)
    check_weight(OP, weight, dy)
    N, K = weight.shape
    if last_size(OP, "dy", dy) != N:
        fail(OP, "dy", f"[..., {N}]", list(dy.shape))
    return [([*dy.shape[:-1], K], dy.dtype)]


_backward, _ = declare(OP, _results)


def _gradients(
    dy: Tensor,
    needs: set[str],
    *,
    x: Tensor,
    weight: QuantizedWeight,
    epilogue: Epilogue,
    dynamic: bool = False,
    **_: Any,
) -> Gradients:
    """Gradients of dequant_matmul, and of dynamic_matmul, whose rounding of x passes the gradient straight through."""
    _check_frozen(needs)
    weight, bias = weight.plain(), epilogue.bias
    dy = _through_activation(dy, x, weight, epilogue, dynamic)
    found: Gradients = {}
    if "x" in needs:
        found["x"] = _backward(dy, *weight.arguments, size_of(weight.codes, x.shape[-1]))
    if "scale" in needs:
        found["scale"] = gradient_of_scale(dy, projected_rows(x) if dynamic else x, *weight.arguments)
    if bias is not None and "bias" in needs:
        found["bias"] = gradient_of_bias(dy, bias.dtype)
    return found


def _tangent(
    tangents: dict[str, Tensor],
    *,
    x: Tensor,
    weight: QuantizedWeight,
    epilogue: Epilogue,
    dynamic: bool = False,
    **_: Any,
) -> Tensor:
    _check_frozen(tangents)
    weight = weight.plain()
    values = projected_rows(x) if dynamic and "scale" in tangents else x
    y_t = tangent_of_product(values, weight, *map(tangents.get, ("x", "scale", "bias")))
    return _through_activation(y_t, x, weight, epilogue, dynamic)


def tangent_of_product(
    x: Tensor, weight: QuantizedWeight, x_t: Tensor | None, scale_t: Tensor | None, bias_t: Tensor | None
) -> Tensor:
    """y_t = x_t w^T + x w_t^T + bias_t, of the terms that have a tangent"""
    terms: list[Tensor] = []
    if x_t is not None:
        terms.append(torch.ops.quantlib.dequant_matmul(x_t, *weight.arguments, bias_t))
    elif bias_t is not None:
        terms.append(bias_t.to(x.dtype).expand(*x.shape[:-1], *bias_t.shape))
    if scale_t is not None:
        terms.append(_product(x, _values(weight, scale_t).mT))
    return _sum(terms)


def _second_gradients(g: Tensor, needs: set[str], *, dy: Tensor, weight: QuantizedWeight) -> Gradients:
    """Gradients of dx, which is linear in dy and in the scale."""
    _check_frozen(needs)
    found: Gradients = {}
    if "dy" in needs:
        found["dy"] = torch.ops.quantlib.dequant_matmul(g, *weight.arguments)
    if "scale" in needs:
        found["scale"] = gradient_of_scale(dy, g, *weight.arguments)
    return found


def _second_tangent(tangents: dict[str, Tensor], *, dy: Tensor, weight: QuantizedWeight) -> Tensor:
    _check_frozen(tangents)
    terms = []
    if "dy" in tangents:
        terms.append(_backward(tangents["dy"], *weight.arguments, size_of(weight.codes, weight.shape[1])))
    if "scale" in tangents:
        terms.append(_product(dy, _values(weight, tangents["scale"])))
    return _sum(terms)


def _second_gradients_of_scale(
    g: Tensor, needs: set[str], *, dy: Tensor, x: Tensor, weight: QuantizedWeight
) -> Gradients:
    """Gradients of dscale, which is linear in dy and in x, and does not depend on the scale."""
    _check_frozen(needs)
    values = _values(weight, g)
    found: Gradients = {}
    if "dy" in needs:
        found["dy"] = _product(x, values.mT)
    if "x" in needs:
        found["x"] = _product(dy, values)
    return found


def _second_tangent_of_scale(tangents: dict[str, Tensor], *, dy: Tensor, x: Tensor, weight: QuantizedWeight) -> Tensor:
    _check_frozen(tangents)
    pairs = ((tangents.get("dy"), x), (dy, tangents.get("x")))
    terms = [gradient_of_scale(*pair, *weight.arguments) for pair in pairs if None not in pair]
    return _sum(terms) if terms else torch.zeros_like(weight.scale)


def projected_rows(x: Tensor) -> Tensor:
    """The values that the int8 codes of x stand for, one scale a row; the derivative passes straight through."""
    primal, block = x.detach(), (1, max(x.shape[-1], 1))
    codes, scale = torch.ops.quantlib.quantize_dynamic(primal, "int8", block)
    y: Tensor = torch.ops.quantlib.dequantize(codes, scale, "int8", block, None, x.dtype)
    return y + (x - primal) if _followed() else y  # a zero with x's derivative


def gradient_of_bias(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dbias[n] = sum over m of dy[m, n]"""
    return dy.reshape(matrix_shape(dy.shape)).sum(0, dtype=torch.float32).to(dtype)


def _values(weight: QuantizedWeight, scale: Tensor) -> Tensor:
    """w[n, k] = decode(codes[n, k]) * scale[n // br, k // bk]: a derivative may be negative, which no kernel takes."""
    (N, K), (br, bk) = weight.shape, weight.block
    units = weight._replace(scale=torch.ones_like(weight.scale))
    size = K if weight.format.packed else None
    w: Tensor = torch.ops.quantlib.dequantize(*units.arguments, torch.float32, size)
    return w * spread(scale, N, K, (min(br, max(N, 1)), min(bk, max(K, 1))))


def _sum(terms: list[Tensor]) -> Tensor:
    total, *rest = terms
    for term in rest:
        total = total + term
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 b, of a's dtype"""
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b).to(a.dtype)


def _through_activation(dy: Tensor, x: Tensor, weight: QuantizedWeight, epilogue: Epilogue, dynamic: bool) -> Tensor:
    op = torch.ops.quantlib.dynamic_matmul if dynamic else torch.ops.quantlib.dequant_matmul
    return through_activation(dy, epilogue.activation, lambda: op(x, *weight.arguments, epilogue.bias))


def through_activation(dy: Tensor, activation: str | None, product: Callable[[], Tensor]) -> Tensor:
    """dy * activation'(before), the same in reverse and in forward mode.

    ``before`` [..., N], the input of the activation, is computed again by ``product`` rather than kept.
    """
    if activation is None:
        return dy
    before = product()
    if activation == "relu":
        return torch.where(before > 0, dy, 0)
    if activation == "silu" and _followed():  # silu_backward has no derivative
        s = torch.sigmoid(before.float())
        return (dy * (s * (1 + before * (1 - s)))).to(dy.dtype)
    if activation == "silu":
        through: Tensor = torch.ops.aten.silu_backward(dy, before)
    else:
        through = torch.ops.aten.gelu_backward(dy, before, approximate=GELU[activation])
    return through


def _followed() -> bool:
    """True if a derivative is itself differentiated."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _check_frozen(asked: Collection[str]) -> None:
    """Check that no derivative of codes is asked for; ``asked`` are the names of arguments."""
    if "codes" in asked or "tiles" in asked:
        fail("dequant_matmul", "codes", "frozen, they have no gradient", "codes that require one")


def attach_gradients() -> None:
    """Give the matmuls their derivatives, with respect to x, scale and bias."""
    differentiable("dequant_matmul", _gradients, _tangent)
    differentiable("dequant_matmul.tiled", _gradients, _tangent)
    differentiable("dynamic_matmul", partial(_gradients, dynamic=True), partial(_tangent, dynamic=True))
    differentiable(OP, _second_gradients, _second_tangent)
    differentiable(f"{OP}_scale", _second_gradients_of_scale, _second_tangent_of_scale)
