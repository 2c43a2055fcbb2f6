"""dscale[I, J] = sum over block (I, J) of (sum over m of dy[m, n] * x[m, k]) * decode(codes[n, k])"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.dequant_matmul import product, weight_slabs
from quantlib.backends.composite.numerics import Block, canonical
from quantlib.formats import Format


def dequant_matmul_backward_scale(
    dy: Tensor,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: Format,
    block: Block,
    zero_point: Tensor | None,
    dscale: Tensor,
) -> None:
    K, (br, bk) = x.shape[1], block
    rows = x.float()
    sums = torch.zeros(dscale.shape, dtype=torch.float32, device=x.device)
    ones = torch.ones_like(scale)
    for n, w in weight_slabs(codes, ones, format, block, zero_point, K):
        terms = product(dy[:, n].float().T, rows).mul_(w)
        terms = torch.nn.functional.pad(terms, (0, -K % bk)).unflatten(1, (-1, bk)).sum(2)
        for row in range(n.start // br, -(-n.stop // br)):
            within = slice(max(row * br - n.start, 0), (row + 1) * br - n.start)
            sums[row] += terms[within].sum(0)
    dscale.copy_(canonical(sums))
