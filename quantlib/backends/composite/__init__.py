"""Every op in pure torch: any device, no compiler, no Triton."""

from __future__ import annotations

import torch

from quantlib.backends.composite.cast import cast
from quantlib.backends.composite.compute_scale import compute_scale
from quantlib.backends.composite.dequant_matmul import dequant_matmul
from quantlib.backends.composite.dequant_matmul_backward import dequant_matmul_backward
from quantlib.backends.composite.dequant_matmul_backward_scale import dequant_matmul_backward_scale
from quantlib.backends.composite.dequantize import dequantize
from quantlib.backends.composite.dynamic_matmul import dynamic_matmul
from quantlib.backends.composite.fake_quantize import fake_quantize
from quantlib.backends.composite.fake_quantize_backward import fake_quantize_backward
from quantlib.backends.composite.quantize import quantize
from quantlib.backends.composite.quantize_dynamic import quantize_dynamic
from quantlib.backends.composite.scaled_matmul import scaled_matmul

KERNELS = {
    "cast": cast,
    "compute_scale": compute_scale,
    "dequant_matmul": dequant_matmul,
    "dequant_matmul_backward": dequant_matmul_backward,
    "dequant_matmul_backward_scale": dequant_matmul_backward_scale,
    "dequantize": dequantize,
    "dynamic_matmul": dynamic_matmul,
    "fake_quantize": fake_quantize,
    "fake_quantize_backward": fake_quantize_backward,
    "quantize": quantize,
    "quantize_dynamic": quantize_dynamic,
    "scaled_matmul": scaled_matmul,
}
OPS = tuple(KERNELS)


def refuses(device: torch.device) -> str | None:
    """Nothing: pure torch runs wherever torch runs."""
    return None
