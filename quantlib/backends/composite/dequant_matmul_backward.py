"""dx[m, k] = sum over n of dy[m, n] * w[n, k], w = dequantize(codes)"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.dequant_matmul import finish, product, weight_slabs
from quantlib.backends.weight import Epilogue, QuantizedWeight


def dequant_matmul_backward(dy: Tensor, weight: QuantizedWeight, dx: Tensor) -> None:
    total = torch.zeros(dx.shape, dtype=torch.float32, device=dx.device)
    for n, w in weight_slabs(weight):
        total += product(dy[:, n].float(), w)
    finish(total, Epilogue(), dx)
