"""dx[i, j] = m ? dy[i, j] : 0, dscale[I, J] = sum(dy * (m ? k - t : c)), dzero_point[I, J] = sum(m ? 0 : -dy * s)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.backends.composite.numerics import spread
from quantlib.formats import Format
from quantlib.ops.autograd import Gradients, differentiable
from quantlib.ops.check import Block, Result, check_tensor
from quantlib.ops.declare import Kernel, declare, launch_matrices
from quantlib.ops.fake_quantize import Limits, check_fake_quantize, codes_of_range
from quantlib.spec import matrix_shape

OP = "fake_quantize_backward"


def _affine_results(dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor | None, **rest: Any) -> list[Result]:
    result = check_fake_quantize(OP, x, scale, rest["format"], rest["block"], zero_point, rest["limits"])
    check_tensor(OP, "dy", dy, result, x.device)
    shape = list(scale.shape)
    return [result, (shape, torch.float32), (shape, torch.float32)]


def _launch(
    kernel: Kernel,
    outs: list[Tensor],
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    format: Format,
    block: Block,
    limits: Limits | None,
    zero_point: Tensor | None = None,
    **options: Any,
) -> None:
    zero_point, limits = codes_of_range(format, zero_point, limits)
    among = {"format": format, "block": block, "zero_point": zero_point, "limits": limits}
    launch_matrices(kernel, outs, dy=dy, x=x, scale=scale, **among, **options)


def _results(**arguments: Any) -> list[Result]:
    return _affine_results(zero_point=None, **arguments)[:2]


_symmetric, _ = declare(OP, _results, _launch)
_affine, _ = declare(f"{OP}.affine", _affine_results, _launch)


def _backward(
    dy: Tensor, _: set[str], *, x: Tensor, scale: Tensor, zero_point: Tensor | None, **rest: Any
) -> Gradients:
    dx, dscale, dzero_point = _gradients(dy, x, scale, zero_point, **rest)
    return {"x": dx, "scale": dscale, "zero_point": dzero_point}


def _tangent(
    tangents: dict[str, Tensor], *, x: Tensor, scale: Tensor, zero_point: Tensor | None, block: Block, **rest: Any
) -> Tensor:
    """y_t = m ? x_t : 0, plus the terms of the gradients of scale and zero point times their tangents."""
    M, K = matrix_shape(x.shape)

    def each(per_block: Tensor) -> Tensor:
        return spread(per_block, M, K, (min(block[0], max(M, 1)), min(block[1], max(K, 1)))).expand(M, K)

    # in blocks of one element a sum has one term
    zeros, ones = None if zero_point is None else each(zero_point), torch.ones_like(x).view(M, K)
    inside, slope, zero_slope = _gradients(ones, x.reshape(M, K), each(scale), zeros, block=(1, 1), **rest)
    total = torch.zeros(M, K, dtype=torch.float32, device=x.device)
    if "x" in tangents:
        total = torch.where(inside > 0, tangents["x"].reshape(M, K), total)
    if "scale" in tangents:
        total = total + slope * each(tangents["scale"])
    if zero_slope is not None and "zero_point" in tangents:
        total = total + zero_slope * each(tangents["zero_point"])
    return total.to(x.dtype).view(x.shape)


def _gradients(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    format: Format,
    block: Block,
    limits: Limits | None,
    lsq_mask: bool,
    grad_factor: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    rest = (format.name, block, limits, lsq_mask, grad_factor)
    if zero_point is None:
        return (*_symmetric(dy, x, scale, *rest), None)
    dx, dscale, dzero_point = _affine(dy, x, scale, zero_point, *rest)
    return dx, dscale, dzero_point


def _no_second_derivative(*_: Any, **__: Any) -> Any:
    raise RuntimeError(f"quantlib::{OP}: the gradient must be taken once, a rounding has no second derivative")


def attach_gradient() -> None:
    """Give ``fake_quantize`` its derivative, and the gradient none."""
    differentiable("fake_quantize", _backward, _tangent)
    for overload in (OP, f"{OP}.affine"):
        differentiable(overload, _no_second_derivative, _no_second_derivative)
