"""The executable form of the numeric contract: NumPy, integer operations on the bits, no torch.

>>> from quantlib import reference
>>> import numpy as np
>>> hex(reference.cast(np.float32(3.141592), "float16")[()])
'0x4248'
"""

from quantlib.reference.numerics import decode_float, encode_float
from quantlib.reference.ops import cast, compute_scale, dequantize, quantize, quantize_dynamic
from quantlib.reference.packing import pack, unpack

__all__ = [
    "cast",
    "compute_scale",
    "decode_float",
    "dequantize",
    "encode_float",
    "pack",
    "quantize",
    "quantize_dynamic",
    "unpack",
]
