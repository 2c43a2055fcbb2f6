"""dx[m, k] = sum over n of dy[m, n] * w[n, k], w[n, k] = decode(codes[n, k]) * scale[n // br, k // bk]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib import backends, formats
from quantlib.backends.tiles import TileLayout
from quantlib.ops.check import INPUTS, Block, Result, check_dtype, check_format, fail
from quantlib.ops.declare import Kernel, declare
from quantlib.ops.dequant_matmul_backward_scale import gradient_of_scale
from quantlib.ops.weight import check_weight, last_size, launched
from quantlib.spec import matrix_shape

OP = "dequant_matmul_backward"
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
    K = codes.shape[1] if codes.dim() == 2 else 0
    if check_format(OP, format).packed:
        if size is not None and size not in (2 * K - 1, 2 * K):
            fail(OP, "size", f"{2 * K - 1} or {2 * K}", size)
        K = 2 * K if size is None else size
    elif size is not None and size != K:
        fail(OP, "size", K, size)
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, scale, ctx.format, ctx.block, zero_point, bias, ctx.activation, *_ = inputs
    if ctx.needs_input_grad[1]:
        fail("dequant_matmul", "codes", "frozen, they have no gradient", "codes that require one")
    ctx.save_for_backward(x, codes, scale, zero_point, bias)
    ctx.dynamic, ctx.size, ctx.bias_at = False, None, 6


def _setup_dynamic(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup(ctx, inputs, output)
    ctx.dynamic = True


def _setup_tiled(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tiles, scale, format, block, size, *rest = inputs
    _setup(ctx, (x, tiles, scale, format, block, *rest), output)
    ctx.size, ctx.bias_at = size, 7


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of dequant_matmul, and of dynamic_matmul, through whose rounding of x the gradient passes straight."""
    x, codes, scale, zero_point, bias = ctx.saved_tensors
    if ctx.size is not None:
        codes = TileLayout(formats.get(ctx.format)).unpack(codes, ctx.size, x.shape[-1])
    weight = (codes, scale, ctx.format, ctx.block, zero_point)
    if ctx.activation is not None:
        dy = _through_activation(ctx, dy, x, weight, bias)
    dx = dscale = dbias = None
    if ctx.needs_input_grad[0]:
        dx = _backward(dy, *weight, x.shape[-1])
    if ctx.needs_input_grad[2]:
        values = projected_rows(x) if ctx.dynamic else x
        dscale = gradient_of_scale(dy, values, *weight)
    if bias is not None and ctx.needs_input_grad[ctx.bias_at]:
        dbias = dy.reshape(-1, len(bias)).sum(0, dtype=torch.float32).to(bias.dtype)
    return dx, None, dscale, None, None, None, dbias, None


def _through_activation(ctx: Any, dy: Tensor, x: Tensor, weight: tuple[Any, ...], bias: Tensor | None) -> Tensor:
    """The gradient before the activation, whose input is computed again rather than kept."""
    op = torch.ops.quantlib.dynamic_matmul if ctx.dynamic else torch.ops.quantlib.dequant_matmul
    before = op(x, *weight, bias)
    if ctx.activation == "relu":
        return torch.where(before > 0, dy, 0)
    if ctx.activation == "silu":
        dy = torch.ops.aten.silu_backward(dy, before)
    else:
        dy = torch.ops.aten.gelu_backward(dy, before, approximate=GELU[ctx.activation])
    return dy


def projected_rows(x: Tensor) -> Tensor:
    """The values that the int8 codes of x stand for, one scale a row."""
    block = (1, max(x.shape[-1], 1))
    codes, scale = torch.ops.quantlib.quantize_dynamic(x, "int8", block)
    y: Tensor = torch.ops.quantlib.dequantize(codes, scale, "int8", block, None, x.dtype)
    return y


def _weight_only(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gradients(ctx, dy), None)


def _tiled(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, _, dscale, *_, dbias, _ = _gradients(ctx, dy)
    return dx, None, dscale, None, None, None, None, dbias, None, None


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(f"quantlib::{OP}: the gradient must be taken once, it has no gradient of its own")


def attach_gradients() -> None:
    """Give the matmuls their gradients, with respect to x, scale and bias, and those none."""
    backends.autograd("dequant_matmul", _weight_only, _setup)
    backends.autograd("dequant_matmul.tiled", _tiled, _setup_tiled)
    backends.autograd("dynamic_matmul", _gradients, _setup_dynamic)
    for overload in (OP, f"{OP}_scale"):
        backends.autograd(overload, _no_second_derivative)
