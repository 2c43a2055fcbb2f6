"""x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.triton.quantize_dynamic import quantize_dynamic
from quantlib.backends.triton.scaled_matmul import scaled_matmul
from quantlib.backends.weight import Epilogue, QuantizedWeight


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes of int8 and a scale a row, of 1 where there are no columns"""
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    if not K:
        return codes, torch.ones(M, 1, dtype=torch.float32, device=x.device)
    scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    quantize_dynamic(x, formats.get("int8"), (1, K), codes, scale)
    return codes, scale


def dynamic_matmul(x: Tensor, weight: QuantizedWeight, epilogue: Epilogue, y: Tensor) -> None:
    x_codes, x_scale = quantize_rows(x)
    scaled_matmul(x_codes, x_scale, weight, None, epilogue, y)
