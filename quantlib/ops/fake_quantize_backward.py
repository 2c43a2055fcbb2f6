"""dx[i, j] = m ? dy[i, j] : 0, dscale[I, J] = sum(dy * (m ? k - t : c)), dzero_point[I, J] = sum(m ? 0 : -dy * s)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.composite.numerics import spread
from quantlib.ops.autograd import Gradients, differentiable, keep
from quantlib.ops.check import Block, Result, check_tensor
from quantlib.ops.declare import Kernel, declare, matrices
from quantlib.ops.fake_quantize import Limits, check_fake_quantize, codes_of_range
from quantlib.spec import matrix_shape

OP = "fake_quantize_backward"


def _affine_results(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    block: Block,
    limits: Limits | None = None,
    lsq_mask: bool = False,
    grad_factor: float = 1.0,
) -> list[Result]:
    result = check_fake_quantize(OP, x, scale, format, block, zero_point, limits)
    check_tensor(OP, "dy", dy, result, x.device)
    shape = list(scale.shape)
    return [result, (shape, torch.float32), (shape, torch.float32)]


def _launch_affine(
    kernel: Kernel,
    outs: list[Tensor],
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: str,
    block: Block,
    limits: Limits | None = None,
    lsq_mask: bool = False,
    grad_factor: float = 1.0,
) -> None:
    M, K, block = matrices(x.shape, block)
    f = formats.get(format)
    dx, dscale, dzero_point = (*outs, None)[:3]
    assert dx is not None
    kernel(
        dy.contiguous().view(M, K),
        x.contiguous().view(M, K),
        scale.contiguous(),
        f,
        block,
        *codes_of_range(f, zero_point, limits),
        lsq_mask,
        grad_factor,
        dx.view(M, K),
        dscale,
        dzero_point,
    )


def _results(dy: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> list[Result]:
    return _affine_results(dy, x, scale, None, *rest)[:2]


def _launch(kernel: Kernel, outs: list[Tensor], dy: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> None:
    _launch_affine(kernel, outs, dy, x, scale, None, *rest)


_symmetric, _ = declare(OP, _results, _launch)
_affine, _ = declare(f"{OP}.affine", _affine_results, _launch_affine)


def _setup(ctx: Any, args: tuple[Any, ...]) -> None:
    x, scale, ctx.format, ctx.block, zero_point, ctx.limits, ctx.lsq_mask, ctx.grad_factor = args
    keep(ctx, x, scale, zero_point)


def _backward(ctx: Any, dy: Tensor) -> Gradients:
    x, scale, zero_point = ctx.saved_tensors
    rest = (ctx.format, ctx.block, ctx.limits, ctx.lsq_mask, ctx.grad_factor)
    dx, dscale, dzero_point = _gradients(dy, x, scale, zero_point, rest)
    return dx, dscale, None, None, dzero_point, None, None, None


def _tangent(ctx: Any, x_t: Tensor | None, scale_t: Tensor | None, *rest: Any) -> Tensor:
    """y_t = m ? x_t : 0, plus what the gradients of scale and zero point are a sum of, times their tangents."""
    x, scale, zero_point = ctx.saved_tensors
    (M, K), block = matrix_shape(x.shape), ctx.block

    def each(per_block: Tensor) -> Tensor:
        return spread(per_block, M, K, (min(block[0], max(M, 1)), min(block[1], max(K, 1)))).expand(M, K)

    # in blocks of one element a sum has one term
    zeros = None if zero_point is None else each(zero_point)
    ones, options = torch.ones_like(x).view(M, K), (ctx.format, (1, 1), ctx.limits, ctx.lsq_mask, ctx.grad_factor)
    inside, slope, zero_slope = _gradients(ones, x.reshape(M, K), each(scale), zeros, options)
    total = torch.zeros(M, K, device=x.device)
    if x_t is not None:
        total = torch.where(inside > 0, x_t.reshape(M, K), total)
    if scale_t is not None:
        total = total + slope * each(scale_t)
    if zero_slope is not None and rest[2] is not None:
        total = total + zero_slope * each(rest[2])
    return total.to(x.dtype).view(x.shape)


def _gradients(
    dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    if zero_point is None:
        return (*_symmetric(dy, x, scale, *rest), None)
    dx, dscale, dzero_point = _affine(dy, x, scale, zero_point, *rest)
    return dx, dscale, dzero_point


def _nothing(ctx: Any, args: tuple[Any, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(f"quantlib::{OP}: the gradient must be taken once, a rounding has no second derivative")


def attach_gradient() -> None:
    """Give ``fake_quantize`` its derivative, and the gradient none."""
    differentiable("fake_quantize", _setup, _backward, _tangent)
    for overload in (OP, f"{OP}.affine"):
        differentiable(overload, _nothing, _no_second_derivative, _no_second_derivative)
