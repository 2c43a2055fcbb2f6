"""The executable form of the numeric contract: NumPy, integer operations on the bits, no torch.

>>> from quantlib import reference
>>> import numpy as np
>>> hex(reference.cast(np.float32(3.141592), "float16")[()])
'0x4248'
"""

from quantlib.reference import ops
from quantlib.reference.activation import activate
from quantlib.reference.adamw_step import adamw_step
from quantlib.reference.fake_quantize import fake_quantize, fake_quantize_backward
from quantlib.reference.matmul import (
    dequant_matmul,
    dequant_matmul_backward,
    dequant_matmul_backward_scale,
    dynamic_matmul,
    grouped_dequant_matmul,
    grouped_dequant_matmul_backward,
    grouped_dynamic_matmul,
    scaled_matmul,
)
from quantlib.reference.numerics import decode_float, encode_float
from quantlib.reference.ops import *  # noqa: F403  what its list names
from quantlib.reference.packing import pack, unpack
from quantlib.reference.search_scale import search_scale

__all__ = [
    "activate",
    "adamw_step",
    "decode_float",
    "dequant_matmul",
    "dequant_matmul_backward",
    "dequant_matmul_backward_scale",
    "dynamic_matmul",
    "encode_float",
    "fake_quantize",
    "fake_quantize_backward",
    "grouped_dequant_matmul",
    "grouped_dequant_matmul_backward",
    "grouped_dynamic_matmul",
    "pack",
    "scaled_matmul",
    "search_scale",
    "unpack",
]
__all__ += ops.__all__
