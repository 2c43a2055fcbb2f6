"""dscale[I, J] = sum over block (I, J) of (sum over m of dy[m, n] * x[m, k]) * decode(codes[n, k])"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.weight import QuantizedWeight
from quantlib.ops.check import INPUTS, Result, check_dtype, check_tensor
from quantlib.ops.declare import declare
from quantlib.ops.weight import check_weight

OP = "dequant_matmul_backward_scale"


def _results(dy: Tensor, x: Tensor, weight: QuantizedWeight) -> list[Result]:
    check_dtype(OP, "x", x.dtype, INPUTS)
    check_weight(OP, weight, x)
    check_tensor(OP, "dy", dy, ([*x.shape[:-1], weight.shape[0]], x.dtype), x.device)
    return [(weight.scale.shape, torch.float32)]


gradient_of_scale, _ = declare(OP, _results)
