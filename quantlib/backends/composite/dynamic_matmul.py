"""x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.composite.quantize_dynamic import quantize_dynamic
from quantlib.backends.composite.scaled_matmul import scaled_matmul
from quantlib.backends.weight import Epilogue, QuantizedWeight


def dynamic_matmul(x: Tensor, weight: QuantizedWeight, epilogue: Epilogue, y: Tensor) -> None:
    M, K = x.shape
    x_codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    x_scale = torch.ones(M, 1, dtype=torch.float32, device=x.device)
    if K:
        quantize_dynamic(x, formats.get("int8"), (1, K), x_codes, x_scale)
    scaled_matmul(x_codes, x_scale, weight, None, epilogue, y)
