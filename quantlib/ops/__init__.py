"""The public functions over ``torch.ops.quantlib``; importing this registers the ops."""

from quantlib import backends
from quantlib.ops.cast import cast
from quantlib.ops.compute_scale import compute_scale
from quantlib.ops.dequantize import dequantize
from quantlib.ops.packing import pack, unpack
from quantlib.ops.quantize import quantize
from quantlib.ops.quantize_dynamic import quantize_dynamic

backends.start()

__all__ = ["cast", "compute_scale", "dequantize", "pack", "quantize", "quantize_dynamic", "unpack"]
