"""The public functions over ``torch.ops.quantlib``; importing this registers the ops."""

from quantlib import backends
from quantlib.ops.cast import cast
from quantlib.ops.compute_scale import compute_scale
from quantlib.ops.dequantize import dequantize
from quantlib.ops.fake_quantize import (
    fake_quantize,
    fake_quantize_per_channel_affine,
    fake_quantize_per_tensor_affine,
    grad_factor,
)
from quantlib.ops.fake_quantize_backward import attach_gradient
from quantlib.ops.packing import pack, unpack
from quantlib.ops.quantize import quantize
from quantlib.ops.quantize_dynamic import quantize_dynamic

attach_gradient()
backends.start()

__all__ = [
    "cast",
    "compute_scale",
    "dequantize",
    "fake_quantize",
    "fake_quantize_per_channel_affine",
    "fake_quantize_per_tensor_affine",
    "grad_factor",
    "pack",
    "quantize",
    "quantize_dynamic",
    "unpack",
]
