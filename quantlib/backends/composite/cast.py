"""y[n] = encode(decode(x[n]))"""

from __future__ import annotations

from torch import Tensor

from quantlib.backends.composite.numerics import decode_float, encode_float, store
from quantlib.formats import FloatFormat


def cast(x: Tensor, x_format: FloatFormat, format: FloatFormat, saturate: bool, y: Tensor) -> None:
    store(y, encode_float(decode_float(x, x_format), format, saturate))
