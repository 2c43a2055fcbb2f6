"""dx[i, j] = m ? dy[i, j] : 0, dscale[I, J] = sum(dy * (m ? k - t : c)), dzero_point[I, J] = sum(m ? 0 : -dy * s)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib import backends, formats
from quantlib.ops.check import Block, Result, check_tensor
from quantlib.ops.declare import Kernel, declare, matrices
from quantlib.ops.fake_quantize import Limits, check_fake_quantize, codes_of_range

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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, ctx.format, ctx.block, zero_point, ctx.limits, ctx.lsq_mask, ctx.grad_factor = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    rest = (ctx.format, ctx.block, ctx.limits, ctx.lsq_mask, ctx.grad_factor)
    dzero_point = None
    if zero_point is None:
        dx, dscale = _symmetric(dy, x, scale, *rest)
    else:
        dx, dscale, dzero_point = _affine(dy, x, scale, zero_point, *rest)
    return dx, dscale, None, None, dzero_point, None, None, None


def _no_second_derivative(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(f"quantlib::{OP}: the gradient must be taken once, a rounding has no second derivative")


def attach_gradient() -> None:
    """Give ``fake_quantize`` its gradient, and the gradient none."""
    backends.autograd("fake_quantize", _backward, _setup)
    for overload in (OP, f"{OP}.affine"):
        backends.autograd(overload, _no_second_derivative)
