"""x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.backend import Kernel
from quantlib.backends.triton.quantize_dynamic import quantize_dynamic
from quantlib.backends.triton.scaled_matmul import scaled_matmul
from quantlib.backends.weight import Epilogue, QuantizedWeight

INT8 = formats.get("int8")


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes of int8 and a scale a row, of 1 where there are no columns"""
    M, K = x.shape
    codes, scale = results(M, K, x.device)
    if not K:
        return codes, scale.fill_(1)
    quantize_dynamic(x, INT8, (1, K), codes, scale)
    return codes, scale


def results(M: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for codes of int8 [M, K] and a scale a row."""
    codes = torch.empty_strided((M, K), (max(K, 1), 1), dtype=torch.int8, device=device)
    return codes, torch.empty_strided((M, 1), (1, 1), dtype=torch.float32, device=device)


def dynamic_matmul(x: Tensor, weight: QuantizedWeight, epilogue: Epilogue, y: Tensor) -> None:
    x_codes, x_scale = quantize_rows(x)
    scaled_matmul(x_codes, x_scale, weight, None, epilogue, y)


def prepare(x: Tensor, weight: QuantizedWeight, epilogue: Epilogue, y: Tensor) -> Kernel | None:
    """Return the kernel of calls like this one, where each of its two has one."""
    (M, K), device = x.shape, x.device
    if not K:
        return None
    x_codes, x_scale = results(M, K, device)
    project = quantize_dynamic.prepare(x, INT8, (1, K), x_codes, x_scale)
    product = scaled_matmul.prepare(x_codes, x_scale, weight, None, epilogue, y)
    if project is None or product is None:
        return None

    def multiply(x: Tensor, weight: QuantizedWeight, epilogue: Epilogue, y: Tensor) -> None:
        x_codes, x_scale = results(M, K, device)
        project(x, INT8, (1, K), x_codes, x_scale)
        product(x_codes, x_scale, weight, None, epilogue, y)

    return multiply


dynamic_matmul.prepare = prepare
