"""dscale[I, J] = sum over block (I, J) of (sum over m of dy[m, n] * x[m, k]) * decode(codes[n, k])"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.dequant_matmul import product, weight_slabs
from quantlib.backends.composite.numerics import canonical
from quantlib.backends.weight import QuantizedWeight


def dequant_matmul_backward_scale(dy: Tensor, x: Tensor, weight: QuantizedWeight, dscale: Tensor) -> None:
    K, (br, bk) = x.shape[1], weight.block
    rows = x.float()
    sums = torch.zeros(dscale.shape, dtype=torch.float32, device=x.device)
    for n, w in weight_slabs(weight._replace(scale=torch.ones_like(weight.scale))):
        terms = product(dy[:, n].float().T, rows).mul_(w)
        terms = torch.nn.functional.pad(terms, (0, -K % bk)).unflatten(1, (-1, bk)).sum(2)
        for row in range(n.start // br, -(-n.stop // br)):
            within = slice(max(row * br - n.start, 0), (row + 1) * br - n.start)
            sums[row] += terms[within].sum(0)
    dscale.copy_(canonical(sums))
