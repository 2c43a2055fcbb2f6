"""dx[m, k] = sum over n of dy[m, n] * w[n, k], w = dequantize(codes)"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.dequant_matmul import epilogue, product, weight_slabs
from quantlib.backends.composite.numerics import Block
from quantlib.formats import Format


def dequant_matmul_backward(
    dy: Tensor, codes: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None, dx: Tensor
) -> None:
    total = torch.zeros(dx.shape, dtype=torch.float32, device=dx.device)
    for n, w in weight_slabs(codes, scale, format, block, zero_point, dx.shape[1]):
        total += product(dy[:, n].float(), w)
    epilogue(total, None, None, dx)
