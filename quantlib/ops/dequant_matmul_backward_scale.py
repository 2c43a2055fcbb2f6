"""dscale[I, J] = sum over block (I, J) of (sum over m of dy[m, n] * x[m, k]) * decode(codes[n, k])"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.ops.check import INPUTS, Block, Result, check_dtype, check_tensor
from quantlib.ops.declare import Kernel, declare
from quantlib.ops.weight import check_weight, last_size, launched
from quantlib.spec import matrix_shape

OP = "dequant_matmul_backward_scale"


def _results(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None = None,
) -> list[Result]:
    check_dtype(OP, "x", x.dtype, INPUTS)
    _, N = check_weight(OP, codes, scale, format, block, zero_point, last_size(OP, "x", x), x)
    check_tensor(OP, "dy", dy, ([*x.shape[:-1], N], x.dtype), x.device)
    return [(scale.shape, torch.float32)]


def _launch(
    kernel: Kernel,
    outs: list[Tensor],
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None = None,
) -> None:
    (M, K), N = matrix_shape(x.shape), codes.shape[0]
    weight = launched(codes, scale, format, block, zero_point, (N, K))
    kernel(dy.contiguous().view(M, N), x.contiguous().view(M, K), *weight, outs[0])


gradient_of_scale, _ = declare(OP, _results, _launch)
