"""y[m, n] = activation(fl(fl(d[m, n] * x_scale[m]) * scale[n]) + bias[n]), d the exact integer product of the codes"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.composite.dequant_matmul import finish, product, weight_slabs
from quantlib.backends.composite.numerics import effective_scale, spread
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.formats import IntFormat


def scaled_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    weight: QuantizedWeight,
    x_zero_point: Tensor | None,
    epilogue: Epilogue,
    y: Tensor,
) -> None:
    scale, (br, bk) = weight.scale, weight.block
    x_format = formats.get(x_codes.dtype)
    assert isinstance(x_format, IntFormat)
    a = x_codes.double()
    if x_zero_point is not None:
        a = a - x_zero_point.clamp(*x_format.range(affine=True))
    s_x = effective_scale(x_scale, x_format)
    s = spread(effective_scale(scale, weight.format), weight.shape[0], scale.shape[1], (br, 1))
    total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    for n, values in weight_slabs(weight._replace(scale=torch.ones_like(scale))):
        # integers below 2^53: float64 is exact in any order
        w, s_n = values.double(), (s if len(s) == 1 else s[n])
        if scale.shape[1] == 1:
            total[:, n] = (product(a, w.T).float() + 0) * s_x * s_n.T  # a sum starts at +0
            continue
        for J in range(scale.shape[1]):
            k = slice(J * bk, (J + 1) * bk)
            total[:, n] += product(a[:, k], w[:, k].T).float() * s_n[:, J]
    finish(total if scale.shape[1] == 1 else total * s_x, epilogue, y)
