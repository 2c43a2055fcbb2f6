"""dx[m, k] = sum over n of dy[m, n] * w[n, k], w[n, k] = decode(codes[n, k]) * scale[n // br, k // bk]"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from quantlib import formats
from quantlib.backends.composite.numerics import spread
from quantlib.backends.tiles import TileLayout
from quantlib.ops.autograd import Gradients, differentiable, keep
from quantlib.ops.check import INPUTS, Block, Result, check_dtype, check_format, check_size, fail
from quantlib.ops.declare import Kernel, declare
from quantlib.ops.dequant_matmul_backward_scale import gradient_of_scale
from quantlib.ops.weight import check_weight, last_size, launched
from quantlib.spec import matrix_shape

OP = "dequant_matmul_backward"
SIZE = 5  # which argument of dequant_matmul.tiled is not one of dequant_matmul
GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def _results(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None = None,
    size: int | None = None,
) -> list[Result]:
    check_dtype(OP, "dy", dy.dtype, INPUTS)
    K = check_size(OP, codes.shape[1] if codes.dim() == 2 else 0, check_format(OP, format), size)
    _, N = check_weight(OP, codes, scale, format, block, zero_point, K, dy)
    if last_size(OP, "dy", dy) != N:
        fail(OP, "dy", f"[..., {N}]", list(dy.shape))
    return [([*dy.shape[:-1], K], dy.dtype)]


def _launch(
    kernel: Kernel,
    outs: list[Tensor],
    dy: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None = None,
    size: int | None = None,
) -> None:
    M, K = matrix_shape(outs[0].shape)
    N = dy.shape[-1]
    weight = launched(codes, scale, format, block, zero_point, (N, K))
    kernel(dy.contiguous().view(M, N), *weight, outs[0].view(M, K))


_backward, _ = declare(OP, _results, _launch)


def _setup(ctx: Any, args: tuple[Any, ...]) -> None:
    x, codes, scale, ctx.format, ctx.block, zero_point, bias, ctx.activation, *_ = args
    keep(ctx, x, codes, scale, zero_point, bias)
    ctx.dynamic, ctx.size = False, None


def _setup_dynamic(ctx: Any, args: tuple[Any, ...]) -> None:
    _setup(ctx, args)
    ctx.dynamic = True


def _setup_tiled(ctx: Any, args: tuple[Any, ...]) -> None:
    size = args[SIZE]
    _setup(ctx, (*args[:SIZE], *args[SIZE + 1 :]))
    ctx.size = size


class _Saved(NamedTuple):
    """The arguments of a matmul, as its derivative reads them."""

    x: Tensor  # [..., K]; of dynamic_matmul the values of its codes, whose derivative is that of x
    weight: tuple[Any, ...]
    bias: Tensor | None
    before: Tensor | None  # [..., N]: the input of the activation, computed again rather than kept

    @classmethod
    def of(cls, ctx: Any) -> _Saved:
        x, codes, scale, zero_point, bias = ctx.saved_tensors
        if ctx.size is not None:
            codes = TileLayout(formats.get(ctx.format)).unpack(codes, ctx.size, x.shape[-1])
        weight, before = (codes, scale, ctx.format, ctx.block, zero_point), None
        if ctx.activation is not None:
            op = torch.ops.quantlib.dynamic_matmul if ctx.dynamic else torch.ops.quantlib.dequant_matmul
            before = op(x, *weight, bias)
        return cls(x, weight, bias, before)


def _gradients(ctx: Any, dy: Tensor) -> Gradients:
    """Of dequant_matmul, and of dynamic_matmul, through whose rounding of x the gradient passes straight."""
    x, weight, bias, before = _Saved.of(ctx)
    need = [n for at, n in enumerate(ctx.needs_input_grad) if ctx.size is None or at != SIZE]
    _check_frozen(need[1])
    if before is not None:
        dy = _through_activation(ctx.activation, dy, before)
    dx = dscale = dbias = None
    if need[0]:
        dx = _backward(dy, *weight, x.shape[-1])
    if need[2]:
        dscale = gradient_of_scale(dy, projected_rows(x) if ctx.dynamic else x, *weight)
    if bias is not None and need[6]:
        dbias = gradient_of_bias(dy, bias.dtype)
    return dx, None, dscale, None, None, None, dbias, None


def _tangent(ctx: Any, x_t: Tensor | None, codes_t: Tensor | None, scale_t: Tensor | None, *rest: Any) -> Tensor:
    x, weight, _, before = _Saved.of(ctx)
    _check_frozen(codes_t is not None)
    values = projected_rows(x) if ctx.dynamic and scale_t is not None else x
    y_t = tangent_of_product(values, weight, x_t, scale_t, rest[3])
    return y_t if before is None else _through_activation(ctx.activation, y_t, before)


def tangent_of_product(
    x: Tensor, weight: tuple[Any, ...], x_t: Tensor | None, scale_t: Tensor | None, bias_t: Tensor | None
) -> Tensor:
    """y_t = x_t w^T + x w_t^T + bias_t, of what there is of it"""
    terms: list[Tensor] = []
    if x_t is not None:
        terms.append(torch.ops.quantlib.dequant_matmul(x_t, *weight, bias_t))
    elif bias_t is not None:
        terms.append(bias_t.to(x.dtype).expand(*x.shape[:-1], *bias_t.shape))
    if scale_t is not None:
        terms.append(_product(x, _values(weight, scale_t, x.shape[-1]).mT))
    return _sum(terms)


def _gradients_with_flag(ctx: Any, dy: Tensor) -> Gradients:
    return (*_gradients(ctx, dy), None)  # of batch_invariant


def _gradients_tiled(ctx: Any, dy: Tensor) -> Gradients:
    found = _gradients(ctx, dy)
    return (*found[:SIZE], None, *found[SIZE:], None)


def _tangent_tiled(ctx: Any, *tangents: Any) -> Tensor:
    return _tangent(ctx, *tangents[:SIZE], *tangents[SIZE + 1 :])


def _setup_backward(ctx: Any, args: tuple[Any, ...]) -> None:
    dy, codes, scale, ctx.format, ctx.block, zero_point, size = args
    ctx.K = codes.shape[1] if size is None else size
    keep(ctx, dy, codes, scale, zero_point)


def _second_gradients(ctx: Any, g: Tensor) -> Gradients:
    """Of dx, which is linear in dy and in the scale."""
    dy, codes, scale, zero_point = ctx.saved_tensors
    weight = (codes, scale, ctx.format, ctx.block, zero_point)
    _check_frozen(ctx.needs_input_grad[1])
    ddy = torch.ops.quantlib.dequant_matmul(g, *weight) if ctx.needs_input_grad[0] else None
    dscale = gradient_of_scale(dy, g, *weight) if ctx.needs_input_grad[2] else None
    return ddy, None, dscale, None, None, None, None


def _second_tangent(
    ctx: Any, dy_t: Tensor | None, codes_t: Tensor | None, scale_t: Tensor | None, *rest: Any
) -> Tensor:
    dy, codes, scale, zero_point = ctx.saved_tensors
    weight = (codes, scale, ctx.format, ctx.block, zero_point)
    _check_frozen(codes_t is not None)
    terms = [] if dy_t is None else [_backward(dy_t, *weight, ctx.K)]
    if scale_t is not None:
        terms.append(_product(dy, _values(weight, scale_t, ctx.K)))
    return _sum(terms)


def _setup_scale(ctx: Any, args: tuple[Any, ...]) -> None:
    dy, x, codes, scale, ctx.format, ctx.block, zero_point = args
    keep(ctx, dy, x, codes, scale, zero_point)


def _second_gradients_of_scale(ctx: Any, g: Tensor) -> Gradients:
    """Of dscale, which is linear in dy and in x, and does not depend on the scale."""
    dy, x, codes, scale, zero_point = ctx.saved_tensors
    _check_frozen(ctx.needs_input_grad[2])
    values = _values((codes, scale, ctx.format, ctx.block, zero_point), g, x.shape[-1])
    ddy = _product(x, values.mT) if ctx.needs_input_grad[0] else None
    dx = _product(dy, values) if ctx.needs_input_grad[1] else None
    return ddy, dx, None, None, None, None, None


def _second_tangent_of_scale(
    ctx: Any, dy_t: Tensor | None, x_t: Tensor | None, codes_t: Tensor | None, scale_t: Tensor | None, *_: None
) -> Tensor:
    dy, x, codes, scale, zero_point = ctx.saved_tensors
    weight = (codes, scale, ctx.format, ctx.block, zero_point)
    _check_frozen(codes_t is not None)
    terms = [gradient_of_scale(*pair, *weight) for pair in ((dy_t, x), (dy, x_t)) if None not in pair]
    return _sum(terms) if terms else torch.zeros_like(scale)


def projected_rows(x: Tensor) -> Tensor:
    """The values that the int8 codes of x stand for, one scale a row; the derivative passes straight through."""
    primal, block = x.detach(), (1, max(x.shape[-1], 1))
    codes, scale = torch.ops.quantlib.quantize_dynamic(primal, "int8", block)
    y: Tensor = torch.ops.quantlib.dequantize(codes, scale, "int8", block, None, x.dtype)
    return y + (x - primal) if _followed() else y  # a zero with x's derivative


def gradient_of_bias(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dbias[n] = sum over m of dy[m, n]"""
    return dy.reshape(matrix_shape(dy.shape)).sum(0, dtype=torch.float32).to(dtype)


def _values(weight: tuple[Any, ...], scale: Tensor, K: int) -> Tensor:
    """w[n, k] = decode(codes[n, k]) * scale[n // br, k // bk]: a derivative may be negative, which no kernel takes."""
    codes, _, format, block, zero_point = weight
    ones = torch.ones_like(weight[1])
    size = K if formats.get(format).packed else None
    units = torch.ops.quantlib.dequantize(codes, ones, format, block, zero_point, torch.float32, size)
    w: Tensor = units * spread(scale, len(codes), K, (min(block[0], max(len(codes), 1)), min(block[1], max(K, 1))))
    return w


def _sum(terms: list[Tensor]) -> Tensor:
    total, *rest = terms
    for term in rest:
        total = total + term
    return total


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 b, of a's dtype"""
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b).to(a.dtype)


def _through_activation(activation: str, dy: Tensor, before: Tensor) -> Tensor:
    """dy * activation'(before), which is the same in reverse and in forward mode."""
    if activation == "relu":
        return torch.where(before > 0, dy, 0)
    if activation == "silu" and _followed():  # silu_backward has no derivative
        s = torch.sigmoid(before.float())
        return (dy * (s * (1 + before * (1 - s)))).to(dy.dtype)
    if activation == "silu":
        dy = torch.ops.aten.silu_backward(dy, before)
    else:
        dy = torch.ops.aten.gelu_backward(dy, before, approximate=GELU[activation])
    return dy


def _followed() -> bool:
    """Whether a derivative is itself differentiated."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _check_frozen(asked: bool) -> None:
    if asked:
        fail("dequant_matmul", "codes", "frozen, they have no gradient", "codes that require one")


def attach_gradients() -> None:
    """Give the matmuls their derivatives, with respect to x, scale and bias."""
    differentiable("dequant_matmul", _setup, _gradients_with_flag, _tangent)
    differentiable("dequant_matmul.tiled", _setup_tiled, _gradients_tiled, _tangent_tiled)
    differentiable("dynamic_matmul", _setup_dynamic, _gradients, _tangent)
    differentiable(OP, _setup_backward, _second_gradients, _second_tangent)
    differentiable(f"{OP}_scale", _setup_scale, _second_gradients_of_scale, _second_tangent_of_scale)
