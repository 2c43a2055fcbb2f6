"""x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)"""

from __future__ import annotations

import torch

from quantlib import formats
from quantlib.backends.triton.quantize_dynamic import quantize_dynamic
from quantlib.backends.triton.scaled_matmul import scaled_matmul
from quantlib.backends.weight import Epilogue, QuantizedWeight


def dynamic_matmul(x: torch.Tensor, weight: QuantizedWeight, epilogue: Epilogue, y: torch.Tensor) -> None:
    M, K = x.shape
    x_codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    if K:
        x_scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
        quantize_dynamic(x, formats.get("int8"), (1, K), x_codes, x_scale)
    else:
        x_scale = torch.ones(M, 1, dtype=torch.float32, device=x.device)
    scaled_matmul(x_codes, x_scale, weight, None, epilogue, y)
