"""The public functions over ``torch.ops.quantlib``; importing this registers the ops.

An op is found by its file, ``<op>.py``, whose public function has its name. Type checkers see those that are
what type checkers see.
"""

import importlib

from quantlib import backends
from quantlib.ops import flops, sharding
from quantlib.ops.adamw_step import adamw_step
from quantlib.ops.cast import cast
from quantlib.ops.compute_scale import compute_scale
from quantlib.ops.dequant_matmul import dequant_matmul
from quantlib.ops.dequant_matmul_backward import attach_gradients
from quantlib.ops.dequantize import dequantize
from quantlib.ops.dequantize_rows import dequantize_rows
from quantlib.ops.dynamic_matmul import dynamic_matmul
from quantlib.ops.fake_cast import fake_cast
from quantlib.ops.fake_quantize import (
    fake_quantize,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    grad_factor,
)
from quantlib.ops.fake_quantize_backward import attach_gradient
from quantlib.ops.grouped_dequant_matmul import grouped_dequant_matmul
from quantlib.ops.grouped_dequant_matmul_backward import attach_gradients as attach_gradients_of_experts
from quantlib.ops.grouped_dynamic_matmul import grouped_dynamic_matmul
from quantlib.ops.hadamard import hadamard
from quantlib.ops.packing import pack, unpack
from quantlib.ops.quantize import quantize
from quantlib.ops.quantize_dynamic import quantize_dynamic
from quantlib.ops.scaled_matmul import scaled_matmul
from quantlib.ops.search_scale import search_scale
from quantlib.ops.tile import tile, untile

for _op in backends.OPS:
    _module = importlib.import_module(f"{__name__}.{_op}")
    if hasattr(_module, _op):
        globals()[_op] = getattr(_module, _op)
attach_gradient()
attach_gradients()
attach_gradients_of_experts()
backends.start()
flops.register_where_cheap()
sharding.register_if_imported()

__all__ = [
    "adamw_step",
    "cast",
    "compute_scale",
    "dequant_matmul",
    "dequantize",
    "dequantize_rows",
    "dynamic_matmul",
    "fake_cast",
    "fake_quantize",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "grad_factor",
    "grouped_dequant_matmul",
    "grouped_dynamic_matmul",
    "hadamard",
    "pack",
    "quantize",
    "quantize_dynamic",
    "scaled_matmul",
    "search_scale",
    "tile",
    "unpack",
    "untile",
]
