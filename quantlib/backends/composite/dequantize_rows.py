"""out[r, j] = decode(codes[i, j]) * scale[i // br, j // bk], i = indices[r]"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.dequantize import dequantize
from quantlib.backends.weight import QuantizedWeight


def dequantize_rows(indices: Tensor, weight: QuantizedWeight, out: Tensor) -> None:
    codes, scale, _, (br, bk), zero_point, (N, K), _ = weight
    rows = indices.clamp(0, N - 1)
    if codes.dtype.itemsize == 1:  # torch looks up no FP8
        found = codes.view(torch.uint8).index_select(0, rows).view(codes.dtype)
    else:
        found = codes.index_select(0, rows)
    blocks = rows // br
    z = None if zero_point is None else zero_point.index_select(0, blocks)
    looked_up = weight._replace(
        codes=found, scale=scale.index_select(0, blocks), zero_point=z, block=(1, bk), shape=(len(rows), K)
    )
    dequantize(looked_up, out)
