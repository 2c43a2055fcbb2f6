"""y[..., b n + i] = sum over j of (-1)^(bits that i and j share) x[..., b n + j] / sqrt(n), n the block"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.composite.numerics import decode_float, encode_float, store
from quantlib.formats import FloatFormat


def hadamard(x: Tensor, block: int, y: Tensor) -> None:
    f = formats.get(x.dtype)
    assert isinstance(f, FloatFormat)
    z, h = decode_float(x, f), 1
    while h < block:
        a, b = z.reshape(-1, 2, h).unbind(1)
        z, h = torch.stack([a + b, a - b], 1), 2 * h
    z = z.reshape(x.shape) * block**-0.5  # which torch rounds to float32
    store(y, encode_float(z, f, False))
